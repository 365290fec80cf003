"""The families of models, each in a file of its own, by the classes that a model index names."""

from typing import Any

from darkroom.families.family import Family
from darkroom.families.flux import Flux
from darkroom.families.flux2 import Flux2Klein
from darkroom.families.stable_diffusion import StableDiffusion
from darkroom.families.stable_diffusion_3 import StableDiffusion3
from darkroom.families.stable_diffusion_xl import StableDiffusionXl

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known; one of the same name gives way to it."""
    _FAMILIES[family.name] = family


def forget(name: str) -> None:
    """Undoes `register`."""
    _FAMILIES.pop(name, None)


def every_family() -> list[Family]:
    return list(_FAMILIES.values())


def find_family(name: str) -> Family:
    """The family that scripts, plans and recipes call `name`. Raises KeyError where it is not registered."""
    return _FAMILIES[name]


def family_of(index: dict[str, Any]) -> Family | None:
    """The family of the model that an index describes; None where no family answers to its class."""
    kind = index.get("_class_name")
    return next((family for family in _FAMILIES.values() if kind in family.pipelines), None)


for each in (StableDiffusion(), StableDiffusionXl(), StableDiffusion3(), Flux(), Flux2Klein()):
    register(each)
