"""Darkroom behind a Triton Inference Server, and the client that requests pictures from it."""
