"""A compiled schedule makes the samples that the diffusers scheduler makes, whatever the network answers."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from darkroom.errors import AskedWrongly
from darkroom.noise import NoiseStream, initial_latents
from darkroom.schedule import SCHEDULERS, scheduler_class
from darkroom.schedule.compile import compile_schedule
from darkroom.schedule.table import Table, Trajectory
from tests.support import SCHEDULER_CONFIG

SHAPE = (4, 6, 5)


def fake_network(latents: np.ndarray, timestep: float) -> np.ndarray:
    """Nonlinear in the latents, different at every timestep, and not the identity in any direction."""
    wide = latents.astype(np.float64)
    answer = np.tanh(0.6 * wide - 0.4 * np.roll(wide, 1, axis=-1)) + 0.3 * np.sin(wide[:, ::-1] + timestep / 300)
    return answer.astype(np.float32)


def samples_of_diffusers(class_name: str, config: dict[str, Any], steps: int, seed: int) -> list[np.ndarray]:
    """The initial sample and the sample after each call, as StableDiffusionPipeline drives its scheduler."""
    scheduler = getattr(diffusers, class_name).from_config(config)
    generator = torch.Generator("cpu").manual_seed(seed)
    scheduler.set_timesteps(steps)
    extra = {"eta": 0.0, "generator": generator}
    extra = {name: value for name, value in extra.items() if name in inspect.signature(scheduler.step).parameters}
    sample = torch.randn(1, *SHAPE, generator=generator) * scheduler.init_noise_sigma
    samples = [sample.numpy()]
    for timestep in scheduler.timesteps:
        shown = scheduler.scale_model_input(sample, timestep)
        output = torch.from_numpy(fake_network(shown.numpy(), float(timestep)))
        sample = scheduler.step(output, timestep, sample, **extra, return_dict=False)[0]
        samples.append(sample.numpy())
    return samples


def samples_of_table(table: Table, seed: int) -> list[np.ndarray]:
    streams = [NoiseStream(seed)]
    trajectory = Trajectory(table, initial_latents(streams, SHAPE))
    samples = [trajectory.sample]
    for call, timestep in enumerate(table.timesteps):
        output = fake_network(trajectory.network_input(call), float(timestep))
        noise = initial_latents(streams, SHAPE) if table.noise_drawn[call] else None
        trajectory.advance(call, output, noise)
        samples.append(trajectory.sample)
    return samples


def assert_follows_diffusers(class_name: str, config: dict[str, Any], steps: int, tolerance: float = 1e-5) -> None:
    try:
        expected = samples_of_diffusers(class_name, config, steps, seed=3)
    except (ValueError, IndexError) as error:
        with pytest.raises(AskedWrongly, match=str(steps)):
            compile_schedule(class_name, config, steps)
        pytest.skip(f"diffusers cannot make {steps} steps: {error}")
    found = samples_of_table(compile_schedule(class_name, config, steps), seed=3)
    assert len(found) == len(expected)
    for call, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance, f"after call {call} of {len(expected) - 1}: {error:.1e}"


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_follows_diffusers(name: str, prediction: str, steps: int) -> None:
    class_name, config = scheduler_class(name, SCHEDULER_CONFIG | {"prediction_type": prediction})
    assert_follows_diffusers(class_name, config, steps)


@pytest.mark.parametrize("name", ["DDIM", "Euler", "EulerA", "DPM++", "Heun", "LMSD", "PNDM", "UniPC"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timestep_spacing_of_the_model_is_kept(name: str, spacing: str) -> None:
    class_name, config = scheduler_class(name, SCHEDULER_CONFIG | {"timestep_spacing": spacing})
    assert_follows_diffusers(class_name, config, 7)


def test_sde_variant_of_dpm_solver_follows_diffusers() -> None:
    config = {key: value for key, value in SCHEDULER_CONFIG.items() if not key.startswith("_")}
    assert_follows_diffusers("DPMSolverMultistepScheduler", config | {"algorithm_type": "sde-dpmsolver++"}, 12)


def test_terminal_snr_of_zero_follows_diffusers() -> None:
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    class_name, config = scheduler_class("DDIM", SCHEDULER_CONFIG | more)
    assert_follows_diffusers(class_name, config, 10)


def test_without_a_name_the_scheduler_is_the_models_own() -> None:
    class_name, config = scheduler_class(None, SCHEDULER_CONFIG | {"_class_name": "DDIMScheduler"})
    assert class_name == "DDIMScheduler"
    assert config["beta_end"] == 0.012


def test_pndm_always_skips_its_runge_kutta_warm_up() -> None:
    class_name, config = scheduler_class("PNDM", SCHEDULER_CONFIG | {"skip_prk_steps": False})
    assert (class_name, config["skip_prk_steps"]) == ("PNDMScheduler", True)
    assert len(compile_schedule(class_name, config, 20)) == 21


def test_heun_calls_the_network_twice_a_step_but_once_in_the_last() -> None:
    assert len(compile_schedule(*scheduler_class("Heun", SCHEDULER_CONFIG), 10)) == 19


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("DDIM", "clip_sample"),
        ("DDPM", "clip_sample"),
        ("DDIM", "thresholding"),
        ("DPM++", "thresholding"),
        ("UniPC", "thresholding"),
    ],
)
def test_scheduler_that_clips_is_refused_by_name(name: str, switch: str) -> None:
    class_name, config = scheduler_class(name, SCHEDULER_CONFIG | {switch: True})
    with pytest.raises(AskedWrongly) as refusal:
        compile_schedule(class_name, config, 10)
    assert class_name.removesuffix("Scheduler") in str(refusal.value)
    assert switch in str(refusal.value)


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_lcm_cannot_make_more_steps_than_its_own_fifty(name: str) -> None:
    with pytest.raises(AskedWrongly, match="51"):
        compile_schedule(*scheduler_class(name, SCHEDULER_CONFIG), 51)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_more_than_a_thousand_steps_are_refused(name: str) -> None:
    with pytest.raises(AskedWrongly, match="1001"):
        compile_schedule(*scheduler_class(name, SCHEDULER_CONFIG), 1001)


def test_unknown_scheduler_class_in_a_model_is_refused_by_name() -> None:
    with pytest.raises(AskedWrongly, match="NoSuchScheduler"):
        compile_schedule("NoSuchScheduler", {}, 10)


def test_class_that_is_no_scheduler_is_refused_by_name() -> None:
    with pytest.raises(AskedWrongly, match="UNet2DModel"):
        compile_schedule("UNet2DModel", {}, 10)


def test_table_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    table = compile_schedule(*scheduler_class("EulerA", SCHEDULER_CONFIG), 5)
    table.save(tmp_path / "table.npz")
    again = Table.load(tmp_path / "table.npz")
    assert again.initial_scale == table.initial_scale
    for name in ("timesteps", "input_scale", "sample_weights", "output_weights", "noise_weights", "noise_drawn"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
