#!/usr/bin/env python3
"""Engines before they are needed: build them, and see which are there."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.prebuild import run
    raise SystemExit(run())
