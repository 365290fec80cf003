#!/usr/bin/env python3
"""Which engine, precision and batch size make most pictures: sweeps, reports, and comparisons with others."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.benchmark import run
    raise SystemExit(run())
