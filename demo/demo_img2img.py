#!/usr/bin/env python3
"""Stable Diffusion and SDXL: a picture and a prompt to another picture."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.checkpoint.catalog import IMG2IMG
        from darkroom.cli.main import run
    raise SystemExit(run(IMG2IMG))
