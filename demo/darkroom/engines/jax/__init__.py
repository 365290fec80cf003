"""XLA programs."""
