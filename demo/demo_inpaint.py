#!/usr/bin/env python3
"""Stable Diffusion and SDXL: a prompt paints a part of a picture anew, or around it."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import INPAINT
        from darkroom.cli.main import run
    raise SystemExit(run(INPAINT))
