#!/usr/bin/env python3
"""Engines before they are needed: build them, and see which are there."""

from darkroom.cli.start import Start

if __name__ == "__main__":
    with Start():
        from darkroom.cli.prebuild import run
    raise SystemExit(run())
