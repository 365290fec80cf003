"""Darkroom: a diffusion model taken apart, compiled once for this machine, and run fast from then on."""

__version__ = "0.1.0"


def __getattr__(name):  # type: (str) -> object
    """`Darkroom`, for notebooks and programs: imported when it is asked for, for scripts have no use for it."""
    if name != "Darkroom":
        raise AttributeError("darkroom has no " + name)
    import importlib

    return importlib.import_module("darkroom.notebook").Darkroom
