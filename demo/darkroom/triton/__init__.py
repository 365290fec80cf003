"""Darkroom behind a Triton Inference Server, and the client that asks it for pictures."""
