#!/usr/bin/env python3
"""Serves a model repository with Triton Inference Server."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.serve import run
    raise SystemExit(run())
