"""Pictures on a GPU, held against diffusers' in float32 on the CPU, and against what is wrong on purpose."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.parity import MARGIN
from tests.support import Diffusers, psnr

LEAST = {"fp32": 60.0, "fp16": 42.0, "bf16": 31.0}
"""dB, by precision; on a CPU torch reaches 80, 52 and 36 of these."""

STEPS = 8
"""With as many, the noise that an ancestral scheduler draws shows."""

WRONG: tuple[dict[str, Any], ...] = (
    {"seed": 1005},
    {"guidance_scale": 1.0},
    {"guidance_scale": 3.0},
    {"scheduler": "Euler"},
    {"scheduler": "DDIM"},
)


def assert_by_diffusers(
    pictures: Sequence[np.ndarray], diffusers: Diffusers, *prompts: str, precision: str = "fp32", **asked: Any
) -> None:
    """That they are those of diffusers, and closer to them than with another seed, guidance or scheduler.

    A scheduler that draws the very same is the model's own.
    """
    asked = {"denoising_steps": STEPS} | asked
    expected = diffusers.draw(*prompts, **asked)
    wrong = [picture for change in WRONG for picture in diffusers.draw(*prompts, **asked | change)]
    nearest = max(each for each in map(psnr, expected * len(WRONG), wrong) if np.isfinite(each))
    reached = min(map(psnr, pictures, expected))
    assert len(pictures) == len(expected)
    assert reached >= max(LEAST[precision], nearest + MARGIN), f"{reached:.1f} dB; what is wrong reaches {nearest:.1f}"
