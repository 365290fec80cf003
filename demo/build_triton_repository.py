#!/usr/bin/env python3
"""A model repository for Triton Inference Server."""

from darkroom.cli.triton_repository import run

if __name__ == "__main__":
    raise SystemExit(run())
