#!/usr/bin/env python3
"""Stable Diffusion 1.x and 2.x: text to image."""

from darkroom.catalog import TXT2IMG
from darkroom.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run(TXT2IMG))
