"""Artefacts on disk under keys that hold all they depend on."""
