"""Darkroom: a diffusion model taken apart, compiled once for this machine, and run fast from then on."""

__version__ = "0.1.0"
