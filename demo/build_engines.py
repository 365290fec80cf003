#!/usr/bin/env python3
"""Engines before they are needed: build them, and see which are there."""

from darkroom.cli.prebuild import run

if __name__ == "__main__":
    raise SystemExit(run())
