"""Dataclasses become JSON and come back the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from darkroom.contract import Job, Lora, Network, Profile, Stage, Tensor
from darkroom.values import from_json, to_json

LORA = Lora(Path("/some/lora.safetensors"), "0" * 64, frozenset({"unet", "text_encoder"}), 0.5)
LATENTS = Tensor("latents", ("B", 4, "h", "w"))
STAGE = Stage("unet", (LATENTS,), (Tensor("output", ("B", 4, "h", "w")),), (Network("unet", "diffusers:UNet"),), "a:b")


@dataclass(frozen=True)
class Nested:
    jobs: dict[int | None, Job]
    folders: tuple[tuple[Path, int], ...]
    size: tuple[int, int] | None = None
    facts: Any = None


@pytest.mark.parametrize("size", [None, (64, 128)])
def test_what_becomes_json_comes_back_equal(size: tuple[int, int] | None) -> None:
    stage = Stage(**vars(STAGE) | {"loras": (LORA,), "options": {"guided": True}, "steady": ("text",)})
    job = Job(stage, Profile(None, 64, 64), "fp32")
    nested = Nested({None: job, 4: job}, ((Path("a/b"), 77), (Path("c"), 512)), size, {"zeros": [0, 0]})
    assert from_json(Nested, json.loads(json.dumps(to_json(nested)))) == nested


@pytest.mark.parametrize("broken", [{"profile": {}}, {"stage": 3}, {"unknown": 1}, {"precision": "fp32"}])
def test_other_values_are_no_dataclass(broken: dict[str, Any]) -> None:
    whole = {} if "precision" in broken else to_json(Job(STAGE, Profile(1, 64, 64), "fp32"))
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
        from_json(Job, whole | broken)
