#!/usr/bin/env python3
"""Pictures from a Triton server: prompts sent by one client or many, and how fast they are answered."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.client import run
    raise SystemExit(run())
