#!/usr/bin/env python3
"""Engines before they are needed: build them, and see which are there."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.prebuild import run
    raise SystemExit(run())
