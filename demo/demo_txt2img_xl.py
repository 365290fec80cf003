#!/usr/bin/env python3
"""SDXL: text to image."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import TXT2IMG_XL
        from darkroom.cli.main import run
    raise SystemExit(run(TXT2IMG_XL))
