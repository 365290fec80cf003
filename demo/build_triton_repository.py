#!/usr/bin/env python3
"""A model repository for Triton Inference Server."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.triton_repository import run
    raise SystemExit(run())
