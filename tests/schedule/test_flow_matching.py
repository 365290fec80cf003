"""Schedulers of flow matching, compiled as diffusers' pipelines drive them, with shifts that follow the size."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from darkroom.errors import InvalidRequest
from darkroom.schedule import LINEAR_SIGMAS, SCHEDULERS, Chosen, chosen, schedulers_for, shift_mu
from darkroom.schedule.compile import compile_schedule
from darkroom.schedule.table import Table
from tests.schedule.test_compile import SHAPE, fake_network, samples_of_table
from tests.support import SCHEDULER_CONFIG

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
SD3 = {"num_train_timesteps": 1000, "shift": 3.0}
FLUX = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""As published with Stable Diffusion 3 and with FLUX.1-dev."""

IMAGE = np.random.default_rng(8).standard_normal((1, *SHAPE)).astype(np.float32)
"""Latents to start from."""

TOKENS = {512: 1024, 1024: 4096}
"""Tokens of square pictures of Flux, by their pixels along a side."""


def samples_of_diffusers(choice: Chosen, steps: int, seed: int, strength: float | None = None) -> list[np.ndarray]:
    """The first sample and the one after each call, as the pipelines of Flux and Stable Diffusion 3 drive it."""
    scheduler = getattr(diffusers, choice.own or choice.class_name).from_config(choice.config)
    if choice.own:
        scheduler = getattr(diffusers, choice.class_name).from_config(scheduler.config, **choice.overrides)
    given: dict[str, Any] = {"num_inference_steps": steps}
    if choice.sigmas:
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if choice.mu is not None:
        given["mu"] = choice.mu
    scheduler.set_timesteps(**given)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(1, *SHAPE, generator=generator)
    timesteps, sample = scheduler.timesteps, noise
    if strength is not None:
        start = int(max(steps - min(steps * strength, steps), 0))
        timesteps = timesteps[start * scheduler.order :]
        scheduler.set_begin_index(start * scheduler.order)
        sample = scheduler.scale_noise(torch.from_numpy(IMAGE), timesteps[:1], noise)
    samples = [sample.numpy()]
    for timestep in timesteps:
        output = torch.from_numpy(fake_network(sample.numpy(), float(timestep)))
        sample = scheduler.step(output, timestep, sample, generator=generator, return_dict=False)[0]
        samples.append(sample.numpy())
    return samples


def assert_follows_diffusers(choice: Chosen, steps: int, strength: float | None = None) -> Table:
    skipped = None if strength is None else int(max(steps - min(steps * strength, steps), 0))
    expected = samples_of_diffusers(choice, steps, seed=3, strength=strength)
    table = compile_schedule(choice, steps, skipped)
    found = samples_of_table(table, 3, None if strength is None else IMAGE)
    assert len(found) == len(expected)
    for call, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < 1e-5, f"after call {call} of {len(expected) - 1}: {error:.1e}"
    return table


@pytest.mark.parametrize("strength", [None, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("name", [None, *schedulers_for(EULER, SD3)])
def test_static_shift_follows_diffusers(name: str | None, steps: int, strength: float | None) -> None:
    if strength is not None and int(steps * strength) < 1:
        pytest.skip("no step is left")
    assert_follows_diffusers(chosen(name, EULER, SD3), steps, strength)


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sigmas", [None, LINEAR_SIGMAS])
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("side", TOKENS)
def test_shift_by_the_pictures_size_follows_diffusers(
    side: int, steps: int, sigmas: str | None, strength: float | None
) -> None:
    if strength is not None and int(steps * strength) < 1:
        pytest.skip("no step is left")
    choice = replace(chosen(None, EULER, FLUX), mu=shift_mu(FLUX, TOKENS[side]), sigmas=sigmas)
    assert_follows_diffusers(choice, steps, strength)


@pytest.mark.parametrize(
    "more",
    [
        {"time_shift_type": "linear"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("sigmas", [None, LINEAR_SIGMAS])
def test_every_setting_of_the_class_follows_diffusers(more: dict[str, Any], sigmas: str | None) -> None:
    config = FLUX | more
    assert_follows_diffusers(replace(chosen(None, EULER, config), mu=shift_mu(config, 2304), sigmas=sigmas), 9)


def test_two_sizes_have_two_schedules() -> None:
    small, large = (
        compile_schedule(replace(chosen(None, EULER, FLUX), mu=shift_mu(FLUX, tokens)), 4) for tokens in TOKENS.values()
    )
    assert not np.array_equal(small.timesteps, large.timesteps)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 16384])
def test_shift_is_the_one_that_diffusers_calculates(tokens: int) -> None:
    assert shift_mu({"use_dynamic_shifting": True}, tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    stated = {"base_image_seq_len": 100, "max_image_seq_len": 8000, "base_shift": 0.2, "max_shift": 3.0}
    expected = calculate_shift(tokens, 100, 8000, 0.2, 3.0)
    assert shift_mu(stated | {"use_dynamic_shifting": True}, tokens) == pytest.approx(expected, rel=1e-12)


def test_size_does_not_matter_where_the_scheduler_does_not_say_so() -> None:
    assert shift_mu(SD3, 4096) is None


def test_choice_says_in_its_key_what_the_pipeline_gives_and_nothing_else() -> None:
    plain = chosen(None, EULER, FLUX)
    assert not {"mu", "sigmas"} & plain.as_json().keys()
    small, large, linear = (replace(plain, **more) for more in ({"mu": 0.63}, {"mu": 1.15}, {"sigmas": LINEAR_SIGMAS}))
    assert len({str(each.as_json()) for each in (plain, small, large, linear)}) == 4
    assert Chosen(**small.as_json()) == small


@pytest.mark.parametrize("given", [{"mu": 0.8}, {"sigmas": LINEAR_SIGMAS}], ids=str)
def test_scheduler_that_cannot_follow_what_the_pipeline_gives_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"FlowMatchHeunDiscrete.*{next(iter(given))}.*--scheduler"):
        compile_schedule(replace(chosen("FlowMatchHeun", EULER, SD3), **given), 4)


def test_shift_that_the_pipeline_does_not_give_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="mu"):
        compile_schedule(chosen(None, EULER, FLUX), 4)


@pytest.mark.filterwarnings("error")
def test_shift_that_one_step_has_no_room_for_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidRequest, match="FlowMatchEulerDiscrete cannot make 1 denoising steps"):
        compile_schedule(chosen(None, EULER, SD3 | {"shift_terminal": 0.1}), 1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_of_the_other_kind_is_refused_by_the_flag(name: str) -> None:
    for own, config in ((EULER, SD3), (HEUN, SD3), ("PNDMScheduler", SCHEDULER_CONFIG)):
        if name in schedulers_for(own, config):
            assert chosen(name, own, config).class_name == SCHEDULERS[name][0]
            continue
        with pytest.raises(InvalidRequest) as refusal:
            chosen(name, own, config)
        assert f"--scheduler {name}" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert (name in schedulers_for(EULER, SD3)) != (name in schedulers_for("PNDMScheduler", SCHEDULER_CONFIG))


def test_solver_with_the_sigmas_of_flow_matching_is_of_that_kind() -> None:
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert "Euler" not in schedulers_for("DPMSolverMultistepScheduler", config)
