"""Reads a diffusers scheduler off into a `Table` by running it once on basis vectors instead of images.

The initial noise, the picture to start from, each network output and each noise draw is one axis of a vector space.
After a run through the real scheduler every sample is a row of coefficients over those axes, and each step's short
recurrence is solved from the rows. Where a mask blends a picture into every sample, each sample is an axis of its own:
the recurrence must hold whatever became of the samples. Nothing about any scheduler is written down here, so all of
them come out exactly as diffusers has them. A scheduler that is not linear, or needs a longer history than the table's
windows, is refused.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from darkroom.errors import InvalidRequest
from darkroom.schedule import KEPT, LINEAR_SIGMAS, Chosen
from darkroom.schedule.table import OUTPUT_WINDOW, OUTPUTS_KEPT, SAMPLE_WINDOW, Table, Trajectory

NONLINEAR = ("thresholding", "clip_sample")
"""Configuration switches that make a scheduler clip its samples, which no table of weights can do."""

ONE_SPACING = ("LCMScheduler", "TCDScheduler")
"""They take a `timestep_spacing` and never look at it."""


class LongHistory(ValueError):
    """A step depends on more than the table's windows hold."""


CANNOT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers and torch raise for a configuration that they cannot follow."""

CLOSE_ENOUGH = 1e-6
TOLERANCE = 3e-5
"""Relative residuals: where the search for a shorter recurrence stops, and an input is taken for a scaled sample; and
what is still accepted of a recurrence (float32 schedulers divide by alphas down to 0.07, so their own rounding reaches
1e-6)."""


def compile_schedule(
    choice: Chosen, steps: int, skipped: int | None = None, share: float = 1.0, mask: str | None = None
) -> Table:
    """Compiles `steps` steps of the diffusers scheduler that was chosen.

    With `skipped` it starts from a picture, noised for the step after so many, as diffusers' image-to-image does. A
    `share` below 1, which SPREADABLE takes, spreads the steps over the timesteps with least noise. With a `mask`, as
    diffusers' inpainting does, none skipped starts from noise alone; KEPT blends the picture in after each step.
    Raises `InvalidRequest` when the scheduler does not exist, cannot make so many steps, or cannot be compiled.
    """
    scheduler = _make(choice)
    name = choice.class_name.removesuffix("Scheduler")
    told = _told(choice, steps, share)
    if strange := told.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys():
        raise InvalidRequest(
            f"the scheduler {name} does not take the {' and '.join(sorted(strange))} that this model's pipeline gives: "
            f"use another --scheduler."
        )
    scheduler.set_timesteps = partial(scheduler.set_timesteps, **told)
    known = inspect.signature(type(scheduler).__init__).parameters  # a configuration may keep those of another class
    asked = {setting for setting, value in choice.overrides.items() if value}
    if asked - known.keys() or (asked and choice.class_name in ONE_SPACING):
        raise InvalidRequest(f"the scheduler {name} has one spacing of its steps: --sigmas has no effect with it.")
    for switch in NONLINEAR:
        if switch in known and getattr(scheduler.config, switch, False):
            raise InvalidRequest(
                f"the scheduler {name} with {switch}=true clips its samples: not linear, so it cannot be compiled. "
                f"Set {switch} to false in the model's scheduler_config.json, or use another --scheduler."
            )
    limit = int(scheduler.config.num_train_timesteps)
    if steps > limit:
        raise InvalidRequest(f"--denoising-steps {steps} is more than the {limit} timesteps this model was trained on.")
    try:
        with np.errstate(all="ignore"):  # what comes of it is looked at
            table = _Run(scheduler, skipped, mask).solve()
            agrees = _agrees_off_basis(scheduler, skipped, mask, table)
    except LongHistory as error:
        if mask != KEPT:
            raise InvalidRequest(f"the scheduler {name} cannot make {steps} denoising steps: {error}") from error
        raise InvalidRequest(
            f"the scheduler {name} goes on from samples of its own, into which no picture can be blended: use another "
            f"--scheduler, or an inpainting model, whose UNet takes the mask."
        ) from error
    except CANNOT as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest(f"the scheduler {name} cannot make {steps} denoising steps: {reason}") from error
    if not agrees:
        raise InvalidRequest(f"the scheduler {name} is not linear in its inputs: it cannot be compiled.")
    return table


def _told(choice: Chosen, steps: int, share: float) -> dict[str, Any]:
    """What the model's pipeline gives `set_timesteps`."""
    linear = choice.sigmas == LINEAR_SIGMAS
    told: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if linear else {"num_inference_steps": steps}
    if choice.mu is not None:
        told["mu"] = choice.mu + (choice.mu_per_step or 0.0) * steps
    return told if share == 1 else told | {"strength": share}


def _make(choice: Chosen) -> Any:
    """The scheduler as a pipeline has it that was loaded from the model's folder, and then given another if one was
    asked for."""
    scheduler = _from_config(choice.own or choice.class_name, choice.config)
    if choice.corrected:
        _correct(scheduler)
    if choice.own is None:
        return scheduler
    return _from_config(choice.class_name, scheduler.config, **choice.overrides)


def _from_config(class_name: str, config: dict[str, Any], **overrides: Any) -> Any:
    diffusers = importlib.import_module("diffusers")
    cls = getattr(diffusers, class_name, None)
    try:
        if cls is None or not hasattr(cls, "set_timesteps"):
            raise InvalidRequest(f"diffusers has no scheduler called {class_name!r}, which the model's index names.")
        return cls.from_config(config, **overrides)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"the scheduler {class_name} needs a package that is missing: {reason}") from None
    except CANNOT as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest(f"the scheduler {class_name} cannot be made from its configuration: {reason}") from None


def _correct(scheduler: Any) -> None:
    """What StableDiffusionPipeline makes of the configuration of a scheduler that it is given (diffusers 0.42)."""
    from diffusers.configuration_utils import FrozenDict

    said = dict(scheduler.config)
    if said.get("steps_offset", 1) != 1:
        said["steps_offset"] = 1
    if said.get("clip_sample") is True:
        said["clip_sample"] = False
    scheduler._internal_dict = FrozenDict(said)


def _set_timesteps(scheduler: Any, skipped: int | None) -> Any:
    """Prepares the scheduler as diffusers' pipelines do; returns the timesteps that are left."""
    scheduler.set_timesteps()
    if skipped is None:
        return scheduler.timesteps
    calls = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(calls)
    return scheduler.timesteps[calls:]


class Driven(NamedTuple):
    """What came of a run: `made` is what the scheduler made of each call, `samples`, one more, what the calls had, and
    what is left; `drawn` the index of each call's noise draw or None; `kept` what is blended in after each."""

    timesteps: list[float]
    inputs: list[Any]
    outputs: list[Any]
    samples: list[Any]
    made: list[Any]
    drawn: list[int | None]
    kept: list[Any]


def _drive(
    scheduler: Any,
    skipped: int | None,
    mask: str | None,
    noise: Any,
    image: Any,
    outputs: Callable[[int], Any],
    noises: Callable[[int], Any],
    following: Callable[[int, Any, Any], Any],
) -> Driven:
    """Runs the scheduler as diffusers' pipelines do, with prepared outputs and noise.

    `outputs(call)` and `noises(draw)` give tensors shaped as `noise`, and so does `following(call, made, kept)`: the
    sample after a call, where KEPT is blended in.
    """
    timesteps = _set_timesteps(scheduler, skipped)
    if skipped is None or (mask and not skipped):
        start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    elif hasattr(scheduler, "add_noise"):
        start = scheduler.add_noise(image, noise, timesteps[:1])
    else:
        start = scheduler.scale_noise(image, timesteps[:1], noise)
    scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    draws: list[int] = []

    def draw(*_: Any, **__: Any) -> Any:
        draws.append(len(draws))
        return noises(draws[-1])

    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
    samples, inputs, given, made, drawn, kept = [start], [], [], [], [], []
    with _noise_from(draw, scheduler):
        for call, timestep in enumerate(timesteps):
            inputs.append(scaled(samples[-1], timestep))
            given.append(outputs(call))
            before = len(draws)
            made.append(scheduler.step(given[-1], timestep, samples[-1], **extra, return_dict=False)[0])
            if mask == KEPT:
                later = timesteps[call + 1 : call + 2]
                kept.append(scheduler.add_noise(image, noise, later) if len(later) else image)
            samples.append(following(call, made[-1], kept[-1]) if kept else made[-1])
            if len(draws) > before + 1:
                raise ValueError("it draws noise more than once in a step")
            drawn.append(before if len(draws) > before else None)
    return Driven([float(t) for t in timesteps], inputs, given, samples, made, drawn, kept)


@contextmanager
def _noise_from(draw: Callable[..., Any], scheduler: Any) -> Iterator[None]:
    """Makes the scheduler's own source of noise, the `randn_tensor` of its module, call `draw`."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield
        return
    module.randn_tensor = draw
    try:
        yield
    finally:
        module.randn_tensor = original


class _Run:
    """The rows of one run over the basis: the initial noise, the picture, then outputs, noise draws, and what samples
    became by blending."""

    def __init__(self, scheduler: Any, skipped: int | None, mask: str | None) -> None:
        import torch

        calls = len(_set_timesteps(scheduler, skipped))
        width = 2 + 3 * calls

        def axis(index: int) -> Any:
            vector = torch.zeros(1, width, 1, 1)
            vector[0, index] = 1
            return vector

        driven = _drive(
            scheduler,
            skipped,
            mask,
            axis(0),
            axis(1),
            outputs=lambda call: axis(2 + call),
            noises=lambda draw: axis(2 + calls + draw),
            following=lambda call, made, kept: axis(2 + 2 * calls + call),
        )
        self.timesteps, self.drawn = driven.timesteps, driven.drawn
        self.inputs, self.outputs, self.samples, self.made, kept = (
            np.array([tensor.reshape(-1).double().numpy() for tensor in tensors]).reshape(-1, width)
            for tensors in (driven.inputs, driven.outputs, driven.samples, driven.made, driven.kept)
        )
        self.blends = mask == KEPT
        self.kept = kept if self.blends else np.zeros((calls, width))
        self.noises = [None if d is None else axis(2 + calls + d).reshape(-1).double().numpy() for d in self.drawn]

    def solve(self) -> Table:
        calls = len(self.timesteps)
        if not (np.isfinite(self.samples).all() and np.isfinite(self.made).all() and np.isfinite(self.kept).all()):
            raise ValueError("its coefficients are not finite")
        scale = np.einsum("ij,ij->i", self.inputs, self.samples[:-1]) / np.einsum("ij,ij->i", *[self.samples[:-1]] * 2)
        strays = np.linalg.norm(self.inputs - scale[:, None] * self.samples[:-1], axis=1)
        if (strays > CLOSE_ENOUGH * np.linalg.norm(self.inputs, axis=1)).any():
            raise ValueError("it does more than scale the network's input")
        weights = np.zeros((calls, SAMPLE_WINDOW + OUTPUT_WINDOW + 1))
        # Samples that nothing is blended into hold what the oldest output had.
        longest = OUTPUT_WINDOW if self.blends else OUTPUTS_KEPT
        for call in range(calls):
            weights[call] = self._solve_step(call, longest)
        sample, output, noise = np.split(weights, [SAMPLE_WINDOW, SAMPLE_WINDOW + OUTPUT_WINDOW], axis=1)
        return Table(
            initial_scale=float(self.samples[0, 0]),
            image_scale=float(self.samples[0, 1]),
            timesteps=np.array(self.timesteps, np.float32),
            input_scale=scale.astype(np.float32),
            sample_weights=sample.astype(np.float32),
            output_weights=output.astype(np.float32),
            noise_weights=noise[:, 0].astype(np.float32),
            noise_drawn=np.array([noise is not None for noise in self.noises]),
            keep_image=self.kept[:, 1].astype(np.float32),
            keep_noise=self.kept[:, 0].astype(np.float32),
        )

    def _solve_step(self, call: int, longest: int) -> np.ndarray:
        """The weights of the shortest window that reproduces the row of what was made of a call.

        Shortest first: in longer windows earlier samples are nearly combinations of later ones, and solving for
        all of them at once would give large weights that cancel.
        """
        target = self.made[call]
        best, best_residual = None, np.inf
        windows = sorted(
            ((s, o) for s in range(1, SAMPLE_WINDOW + 1) for o in range(1, longest + 1)),
            key=lambda w: (sum(w), w),
        )
        for samples, outputs in windows:
            columns: list[tuple[int, np.ndarray]] = []
            columns += [(k, self.samples[call - k]) for k in range(samples) if call - k >= 0]
            columns += [(SAMPLE_WINDOW + k, self.outputs[call - k]) for k in range(outputs) if call - k >= 0]
            noise = self.noises[call]
            if noise is not None:
                columns.append((SAMPLE_WINDOW + OUTPUT_WINDOW, noise))
            matrix = np.stack([column for _, column in columns], axis=1)
            norms = np.linalg.norm(matrix, axis=0)
            solution = np.linalg.lstsq(matrix / norms, target, rcond=1e-12)[0]
            residual = np.linalg.norm(matrix / norms @ solution - target) / max(np.linalg.norm(target), 1e-30)
            if residual < best_residual:
                best_residual = residual
                best = np.zeros(SAMPLE_WINDOW + OUTPUT_WINDOW + 1)
                best[[index for index, _ in columns]] = solution / norms
            if residual <= CLOSE_ENOUGH:
                break
        if best is None or best_residual > TOLERANCE:
            raise LongHistory(f"call {call} depends on more history than a table holds (residual {best_residual:.1e})")
        return best


def _agrees_off_basis(scheduler: Any, skipped: int | None, mask: str | None, table: Table) -> bool:
    """Whether table and scheduler agree on large random vectors, where clipping of any kind would show."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*_: Any) -> Any:
        return 3 * torch.randn(1, 64, 1, 1, generator=generator)

    start, image, noises = random(), random(), []

    def noise(_: int) -> Any:
        noises.append(random())
        return noises[-1]

    blend = torch.rand(1, 1, 1, 1, generator=generator)
    driven = _drive(
        scheduler,
        skipped,
        mask,
        start,
        image,
        outputs=random,
        noises=noise,
        following=lambda _, made, kept: (1 - blend) * kept + blend * made,
    )
    picture = None if skipped is None else image.numpy()
    trajectory = Trajectory(table, start.numpy(), picture, blend.numpy() if mask == KEPT else None)
    for call, output in enumerate(driven.outputs):
        draw = driven.drawn[call]
        trajectory.advance(call, output.numpy(), None if draw is None else noises[draw].numpy())
        expected = driven.samples[call + 1].numpy()
        if np.abs(trajectory.sample - expected).max() > 1e-3 * max(np.abs(expected).max(), 1e-6):
            return False
    return True
