#!/usr/bin/env python3
"""Stable Diffusion 3: text, or a picture and a text, to image."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import TXT2IMG_SD3
        from darkroom.cli.main import run
    raise SystemExit(run(TXT2IMG_SD3))
