"""A model on disk or on the hub: its folder, files and weights."""
