#!/usr/bin/env python3
"""Serves a model repository with Triton Inference Server."""

from darkroom.cli.serve import run

if __name__ == "__main__":
    raise SystemExit(run())
