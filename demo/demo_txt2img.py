#!/usr/bin/env python3
"""Stable Diffusion 1.x and 2.x: text to image."""

from darkroom.cli.main import txt2img

if __name__ == "__main__":
    raise SystemExit(txt2img())
