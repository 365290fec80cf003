#!/usr/bin/env python3
"""Stable Diffusion and SDXL: a picture and a prompt to another picture."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import IMG2IMG
        from darkroom.cli.main import run
    raise SystemExit(run(IMG2IMG))
