"""Flags, progress and messages; the one main that every script calls."""
