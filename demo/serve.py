#!/usr/bin/env python3
"""Serves pictures: a page to make them on, OpenAI's images API, and AUTOMATIC1111's."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which python -P and -I leave out

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.web import run
    raise SystemExit(run())
