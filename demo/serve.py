#!/usr/bin/env python3
"""Serves pictures: a page to make them on, OpenAI's images API, and AUTOMATIC1111's."""

from darkroom.cli.start import Startup

if __name__ == "__main__":
    with Startup():
        from darkroom.cli.web import run
    raise SystemExit(run())
