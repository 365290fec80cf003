#!/usr/bin/env python3
"""Models that need few steps: SD-Turbo and SDXL-Turbo."""

from darkroom.catalog import TURBO
from darkroom.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run(TURBO))
