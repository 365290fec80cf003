"""Which engine, precision and batch size make most pictures: sweeps, reports, and comparisons with others."""

import sys

from darkroom.cli.benchmark import run

if __name__ == "__main__":
    sys.exit(run())
