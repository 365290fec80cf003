"""Sweeps, comparisons, and their reports."""
