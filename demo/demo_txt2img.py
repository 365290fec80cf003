#!/usr/bin/env python3
"""Stable Diffusion 1.x and 2.x: text to image."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import TXT2IMG
        from darkroom.cli.main import run
    raise SystemExit(run(TXT2IMG))
