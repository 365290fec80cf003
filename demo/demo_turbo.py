#!/usr/bin/env python3
"""Models that need one to eight steps: SD-Turbo, SDXL-Turbo, latent consistency models."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import TURBO
        from darkroom.cli.main import run
    raise SystemExit(run(TURBO))
