#!/usr/bin/env python3
"""Models that need one to eight steps: SD-Turbo, SDXL-Turbo, latent consistency models."""

from darkroom.catalog import TURBO
from darkroom.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run(TURBO))
