"""A small network as a torch engine, denoised on its device, and the same by diffusers' scheduler."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from darkroom.contract import DENOISER, Job, Profile, Stage, Tensor
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Denoiser, Options
from darkroom.schedule import Chosen
from darkroom.schedule.compile import compile_schedule
from darkroom.schedule.table import Table
from tests.support import SCHEDULER_CONFIG

LATENTS = Tensor("latents", ("B", 4, "h", "w"))
STAGE = Stage("unet", (LATENTS, Tensor("timestep", ("B",))), (Tensor("output", LATENTS.shape),), role=DENOISER)
EULER = SCHEDULER_CONFIG | {"_class_name": "EulerDiscreteScheduler"}
SIZE = 64


class Small(nn.Module):
    """A network with the UNet's contract, whose answer depends on all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        generator = torch.Generator().manual_seed(3)
        for weight in self.parameters():
            weight.data.normal_(0, 0.2, generator=generator)
        self.requires_grad_(False)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.convolution(latents) + timestep.reshape(-1, 1, 1, 1) / 1000)


def engine_of(module: nn.Module, name: str = "torch", **options: Any) -> Any:
    """An engine of a batch of two for a module that is there."""
    return find_runtime(name, Options(**options)).engine(Job(STAGE, Profile(2, SIZE, SIZE), "fp32"), module)


def schedule(name: str = "EulerAncestralDiscreteScheduler", steps: int = 5) -> Table:
    return compile_schedule(Chosen(name, EULER), steps)


def denoised(engine: Denoiser, table: Table, seed: int = 0, size: int = 8) -> np.ndarray:
    random = np.random.default_rng(seed)
    draws = [random.standard_normal((2, 4, size, size)).astype(np.float32) for _ in range(1 + len(table))]
    drawn = int(table.noise_drawn.sum())
    *nothing, latest = engine.denoise(table, draws[0] * np.float32(table.initial_scale), draws[1 : 1 + drawn], {})
    assert nothing == [None] * (len(table) - 1)
    return latest


def by_diffusers(name: str, steps: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """The same by diffusers' scheduler."""
    import diffusers
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    random = np.random.default_rng(seed)
    draws = [
        torch.from_numpy(random.standard_normal((2, 4, size, size)).astype(np.float32)) for _ in range(1 + 2 * steps)
    ]
    scheduler = getattr(diffusers, name).from_config(EULER)
    scheduler.set_timesteps(steps)
    sample, network = draws.pop(0) * scheduler.init_noise_sigma, Small()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "randn_tensor", lambda *_, **__: draws.pop(0))
        for timestep in scheduler.timesteps:
            output = network(scheduler.scale_model_input(sample, timestep), timestep.expand(2))
            sample = scheduler.step(output, timestep, sample).prev_sample
    return sample.numpy()
