#!/usr/bin/env python3
"""A model repository for Triton Inference Server."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.triton_repository import run
    raise SystemExit(run())
