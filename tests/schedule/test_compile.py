"""A compiled schedule makes the samples that the diffusers scheduler makes, whatever the network answers."""

import inspect
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from darkroom.errors import InvalidRequest
from darkroom.noise import NoiseStream, initial_latents
from darkroom.schedule import SCHEDULERS, Chosen, chosen
from darkroom.schedule.compile import compile_schedule
from darkroom.schedule.table import Table, Trajectory
from tests.support import NOISE_SCHEDULERS, SCHEDULER_CONFIG

SHAPE = (4, 6, 5)


def fake_network(latents: np.ndarray, timestep: float) -> np.ndarray:
    """Nonlinear in the latents, different at every timestep, and not the identity in any direction."""
    wide = latents.astype(np.float64)
    answer = np.tanh(0.6 * wide - 0.4 * np.roll(wide, 1, axis=-1)) + 0.3 * np.sin(wide[:, ::-1] + timestep / 300)
    return answer.astype(np.float32)


def choice_of(name: str | None, sigmas: str | None = None, own: str = "PNDMScheduler", **more: Any) -> Chosen:
    """What `--scheduler name --sigmas sigmas` means for a model of Stable Diffusion 1.5's configuration, but for these
    settings."""
    return chosen(name, own, SCHEDULER_CONFIG | more, sigmas=sigmas)


def scheduler_of_diffusers(choice: Chosen) -> Any:
    """Loaded with a pipeline, and exchanged as diffusers' documentation has it."""
    scheduler = getattr(diffusers, choice.own or choice.class_name).from_config(choice.config)
    if choice.corrected:
        scheduler = StableDiffusionPipeline(None, None, None, None, scheduler, None, None, None, False).scheduler
    if choice.own:
        scheduler = getattr(diffusers, choice.class_name).from_config(scheduler.config, **choice.overrides)
    return scheduler


def samples_of_diffusers(choice: Chosen, steps: int, seed: int) -> list[np.ndarray]:
    """The initial sample and the sample after each call, as StableDiffusionPipeline drives its scheduler."""
    scheduler = scheduler_of_diffusers(choice)
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


def samples_of_table(table: Table, seed: int, image: np.ndarray | None = None) -> list[np.ndarray]:
    streams = [NoiseStream(seed)]
    trajectory = Trajectory(table, initial_latents(streams, SHAPE), image)
    samples = [trajectory.sample]
    for call, timestep in enumerate(table.timesteps):
        output = fake_network(trajectory.network_input(call), float(timestep))
        noise = initial_latents(streams, SHAPE) if table.noise_drawn[call] else None
        trajectory.advance(call, output, noise)
        samples.append(trajectory.sample)
    return samples


def assert_follows_diffusers(choice: Chosen, steps: int, tolerance: float = 1e-5) -> None:
    try:
        expected = samples_of_diffusers(choice, steps, seed=3)
    except (ValueError, IndexError) as error:
        with pytest.raises(InvalidRequest, match=str(steps)):
            compile_schedule(choice, steps)
        pytest.skip(f"diffusers cannot make {steps} steps: {error}")
    found = samples_of_table(compile_schedule(choice, steps), seed=3)
    assert len(found) == len(expected)
    for call, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance, f"after call {call} of {len(expected) - 1}: {error:.1e}"


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_schedule_follows_diffusers(name: str, prediction: str, steps: int) -> None:
    # Two steps of KDPM2A subtract large numbers of one another: diffusers' own rounding in float32 is 1.6e-5 there.
    tolerance = 2e-5 if (name, steps) == ("KDPM2A", 2) else 1e-5
    assert_follows_diffusers(choice_of(name, prediction_type=prediction), steps, tolerance)


@pytest.mark.parametrize("name", ["DDIM", "Euler", "EulerA", "DPM++", "Heun", "LMSD", "PNDM", "UniPC"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timestep_spacing_of_the_model_is_kept(name: str, spacing: str) -> None:
    assert_follows_diffusers(choice_of(name, timestep_spacing=spacing), 7)


SPACED = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}
"""By which setting diffusers' documentation says that its schedulers space their steps so."""

ONE_SPACING = {"karras": ("DDIM", "DDPM", "EulerA", "LCM", "PNDM", "TCD"), "sgm_uniform": ("LCM", "TCD", "DPM++SDE")}
ONE_SPACING |= dict.fromkeys(("exponential", "beta"), ONE_SPACING["karras"])
"""The schedulers of diffusers that do not know the setting."""


@pytest.mark.parametrize("sigmas", SPACED)
@pytest.mark.parametrize("name", [None, *NOISE_SCHEDULERS])
def test_steps_are_spaced_as_asked(name: str | None, sigmas: str) -> None:
    own = "EulerDiscreteScheduler"
    asked = choice_of(name, sigmas, own)
    if name in ONE_SPACING[sigmas]:
        with pytest.raises(InvalidRequest, match="--sigmas has no effect"):
            compile_schedule(asked, 8)
        return
    class_name, overrides = SCHEDULERS[name] if name else (own, {})
    theirs = overrides | ({"use_karras_sigmas": False} if name == "DPM++Karras" else {}) | SPACED[sigmas]
    assert_follows_diffusers(asked, 8)
    expected = samples_of_diffusers(Chosen(class_name, SCHEDULER_CONFIG, own, theirs), 8, 3)
    assert np.allclose(samples_of_table(compile_schedule(asked, 8), seed=3)[-1], expected[-1], atol=1e-4)


def test_sde_variant_of_dpm_solver_follows_diffusers() -> None:
    assert_follows_diffusers(choice_of("DPM++", algorithm_type="sde-dpmsolver++"), 12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_any_noise_schedule_follows_diffusers(name: str, schedule: str) -> None:
    """The last begins at ten thousand times as much noise as picture."""
    assert_follows_diffusers(choice_of(name, beta_schedule=schedule), 12, tolerance=1e-4)


def test_terminal_snr_of_zero_follows_diffusers() -> None:
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert_follows_diffusers(choice_of("DDIM", **more), 10)


def test_without_a_name_the_scheduler_is_the_models_own() -> None:
    choice = chosen(None, "DDIMScheduler", SCHEDULER_CONFIG)
    assert (choice.class_name, choice.config["beta_end"]) == ("DDIMScheduler", 0.012)
    assert_follows_diffusers(choice, 10)


def test_pndm_by_name_always_skips_its_runge_kutta_warm_up() -> None:
    assert len(compile_schedule(choice_of("PNDM", skip_prk_steps=False), 20)) == 21


def test_own_pndm_that_does_not_skip_it_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="more history than a table holds"):
        compile_schedule(choice_of(None, skip_prk_steps=False), 20)


OUTDATED = [{"steps_offset": None}, {"steps_offset": 0}, {"clip_sample": None}, {"clip_sample": True}]
"""Settings of old configurations; None where they say nothing."""


@pytest.mark.parametrize("outdated", OUTDATED, ids=str)
@pytest.mark.parametrize("own", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("name", [None, "DDIM", "Euler", "PNDM"])
def test_outdated_configuration_is_corrected_as_diffusers_corrects_it(
    name: str | None, own: str, outdated: dict[str, Any]
) -> None:
    config = SCHEDULER_CONFIG | {"_class_name": own, "timestep_spacing": "leading"} | outdated
    choice = chosen(name, own, {key: value for key, value in config.items() if value is not None}, corrected=True)
    if scheduler_of_diffusers(choice).config.get("clip_sample"):
        # Of another scheduler than the model's own diffusers does not correct what the configuration leaves out.
        with pytest.raises(InvalidRequest, match="clip_sample"):
            compile_schedule(choice, 10)
    else:
        assert_follows_diffusers(choice, 10)


@pytest.mark.parametrize("outdated", OUTDATED[:2], ids=str)
def test_outdated_configuration_of_a_model_that_is_not_corrected_is_kept(outdated: dict[str, Any]) -> None:
    config = SCHEDULER_CONFIG | outdated
    choice = chosen(None, "PNDMScheduler", {key: value for key, value in config.items() if value is not None})
    assert_follows_diffusers(choice, 10)
    corrected = compile_schedule(replace(choice, corrected=True), 10)
    assert not np.array_equal(compile_schedule(choice, 10).timesteps, corrected.timesteps)


@pytest.mark.parametrize("name", [None, "Euler", "DPM++", "DDIM"])
def test_configuration_of_another_class_than_the_models_own_is_read_as_diffusers_reads_it(name: str | None) -> None:
    config = SCHEDULER_CONFIG | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    assert_follows_diffusers(chosen(name, "PNDMScheduler", config), 10)


def test_heun_calls_the_network_twice_a_step_but_once_in_the_last() -> None:
    assert len(compile_schedule(choice_of("Heun"), 10)) == 19


@pytest.mark.parametrize("switch", ["clip_sample", "thresholding"])
@pytest.mark.parametrize("name", ["Euler", "LMSD", "PNDM", "Heun"])
def test_switch_of_another_class_is_nothing_to_those_that_do_not_know_it(name: str, switch: str) -> None:
    """A configuration keeps what the model's own scheduler was told, as SDXL's and LCM's pipelines leave it."""
    if switch in inspect.signature(getattr(diffusers, SCHEDULERS[name][0])).parameters:
        pytest.skip("this one knows it")
    assert_follows_diffusers(choice_of(name, **{switch: True}), 10)


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
    choice = choice_of(name, **{switch: True})
    with pytest.raises(InvalidRequest) as refusal:
        compile_schedule(choice, 10)
    assert choice.class_name.removesuffix("Scheduler") in str(refusal.value)
    assert switch in str(refusal.value)


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_lcm_cannot_make_more_steps_than_its_own_fifty(name: str) -> None:
    with pytest.raises(InvalidRequest, match="51"):
        compile_schedule(choice_of(name), 51)


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_more_than_a_thousand_steps_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="1001"):
        compile_schedule(choice_of(name), 1001)


def test_unknown_scheduler_class_in_a_model_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="NoSuchScheduler"):
        compile_schedule(Chosen("NoSuchScheduler", {}), 10)


def test_class_that_is_no_scheduler_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="UNet2DModel"):
        compile_schedule(Chosen("UNet2DModel", {}), 10)


@pytest.mark.parametrize(
    ("own", "setting"),
    [
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDIMScheduler", {"num_train_timesteps": 0}),
        ("DDIMScheduler", {"num_train_timesteps": -5}),
        ("DDIMScheduler", {"num_train_timesteps": "1000"}),
        ("DDIMScheduler", {"num_train_timesteps": 1000.5}),
        ("PNDMScheduler", {"beta_start": "small"}),
        ("PNDMScheduler", {"beta_schedule": "no such"}),
        ("DDIMScheduler", {"trained_betas": []}),
        ("DDIMScheduler", {"steps_offset": "one"}),
        ("DPMSolverMultistepScheduler", {"solver_order": None}),
    ],
    ids=str,
)
def test_configuration_that_diffusers_cannot_follow_is_refused_in_one_line(own: str, setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        compile_schedule(chosen(None, own, SCHEDULER_CONFIG | setting), 10)
    assert own.removesuffix("Scheduler") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="torchsde is installed")
def test_package_that_a_scheduler_lacks_is_named() -> None:
    with pytest.raises(InvalidRequest, match="torchsde"):
        compile_schedule(Chosen("DPMSolverSDEScheduler", SCHEDULER_CONFIG), 10)


def test_table_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    table = compile_schedule(choice_of("EulerA"), 5)
    table.save(tmp_path / "table.npz")
    again = Table.load(tmp_path / "table.npz")
    assert again.initial_scale == table.initial_scale
    for name in ("timesteps", "input_scale", "sample_weights", "output_weights", "noise_weights", "noise_drawn"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
