#!/usr/bin/env python3
"""Flux: image to image."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import IMG2IMG_FLUX
        from darkroom.cli.main import run
    raise SystemExit(run(IMG2IMG_FLUX))
