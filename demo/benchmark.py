#!/usr/bin/env python3
"""Which engine, precision and batch size make most pictures: sweeps, reports, and comparisons with others."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.benchmark import run
    raise SystemExit(run())
