#!/usr/bin/env python3
"""Serves a model repository with Triton Inference Server."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.serve import run
    raise SystemExit(run())
