#!/usr/bin/env python3
"""SDXL: text to image."""

from darkroom.catalog import TXT2IMG_XL
from darkroom.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run(TXT2IMG_XL))
