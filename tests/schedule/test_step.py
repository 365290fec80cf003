"""The one formula of a step, in every library that computes it, against its definition in double precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from darkroom.contract import Tensor
from darkroom.errors import Failed
from darkroom.schedule import step_onnx
from darkroom.schedule.step import NEXT, start_of, step_stage
from darkroom.schedule.step_onnx import write_step
from darkroom.schedule.table import OUTPUT_WINDOW, OUTPUTS_KEPT, SAMPLE_WINDOW, State, Table, advance, network_input

SHAPE = (3, 4, 6, 5)
CALLS = 6
LIBRARIES = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}


def table_of(seed: int = 0) -> Table:
    """Every weight is something else, and every second call draws noise."""
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    drawn = np.arange(CALLS) % 2 == 1
    windows = numbers(CALLS, SAMPLE_WINDOW), numbers(CALLS, OUTPUT_WINDOW)
    return Table(1.0, 0.0, 1000 * numbers(CALLS), numbers(CALLS), *windows, numbers(CALLS), drawn)


def arrays(count: int, seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


def by_definition(table: Table, sample: np.ndarray, outputs: list[np.ndarray], noises: list[np.ndarray]) -> np.ndarray:
    """The last sample, as the docstring of `schedule.table` has it."""
    samples, drawn = [sample.astype(np.float64)], iter(noises)
    for i in range(len(table)):
        following = sum(table.sample_weights[i, k] * samples[i - k] for k in range(SAMPLE_WINDOW) if k <= i)
        following += sum(table.output_weights[i, k] * outputs[i - k] for k in range(OUTPUT_WINDOW) if k <= i)
        samples.append(following + (table.noise_weights[i] * next(drawn) if table.noise_drawn[i] else 0))
    return samples[-1]


def close(found: Any, expected: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("library", LIBRARIES)
def test_formula_is_the_same_in_every_library(library: str) -> None:
    to, table = LIBRARIES[library], table_of()
    sample, *given = arrays(1 + 2 * CALLS)
    outputs, noises = given[:CALLS], given[CALLS:]
    state, drawn = State((to(sample),), ()), iter(noises)
    for call, row in enumerate(table.rows()):
        shown = network_input(to(row), state)
        assert close(shown, np.asarray(state.samples[0], np.float64) * table.input_scale[call])
        noise = to(next(drawn)) if table.noise_drawn[call] else None
        state = advance(to(row), state, to(outputs[call]), noise)
    assert close(state.samples[0], by_definition(table, sample, outputs, noises))


@pytest.mark.parametrize("library", LIBRARIES)
def test_images_may_be_at_steps_of_their_own(library: str) -> None:
    to, table = LIBRARIES[library], table_of()
    rows = table.rows()[[4, 1, 2]]
    samples, given = arrays(SAMPLE_WINDOW), arrays(OUTPUTS_KEPT + 2, seed=2)
    outputs, output, noise = given[:OUTPUTS_KEPT], given[-2], given[-1]
    together = advance(to(rows), State([*map(to, samples)], [*map(to, outputs)]), to(output), to(noise))
    for image, row in enumerate(rows):
        state = State([each[image : image + 1] for each in samples], [each[image : image + 1] for each in outputs])
        alone = advance(row, state, output[image : image + 1], noise[image : image + 1])
        assert close(together.samples[0][image : image + 1], alone.samples[0])


@pytest.mark.parametrize("shape", [("B", 4, "h", "w"), ("B", 4, 6, 5), SHAPE], ids=str)
def test_graph_makes_the_samples_of_the_table(shape: tuple[Any, ...], tmp_path: Path) -> None:
    """The schedule's noise is drawn by every second step, and the step moves its own index on."""
    latents = Tensor("latents", shape)
    write_step(latents, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    table = table_of()
    sample, *given = arrays(1 + 2 * CALLS)
    outputs, noises = given[:CALLS], given[CALLS : CALLS + int(table.noise_drawn.sum())]
    inputs, names = start_of(table, sample, noises), [each.name for each in step_stage(latents).outputs]
    for call, output in enumerate(outputs):
        made = dict(zip(names, session.run(names, inputs | {"output": output}), strict=True))
        inputs |= {name: made[NEXT + name] for name in ("step", "samples", "outputs")}
        assert inputs["step"] == [call + 1]
        if call + 1 < CALLS:
            assert np.array_equal(made[NEXT + "timestep"], np.repeat(table.timesteps[call + 1], len(sample)))
            assert close(made[NEXT + "latents"], inputs["samples"][0] * table.input_scale[call + 1])
    assert close(inputs["samples"][0], by_definition(table, sample, outputs, noises))


def test_graph_can_be_read_by_every_runtime(tmp_path: Path) -> None:
    write_step(Tensor("latents", ("B", 4, "h", "w")), tmp_path / "step.onnx")
    model = onnx.load(str(tmp_path / "step.onnx"))
    assert model.ir_version <= 10
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]


def test_graph_that_differs_from_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(step_onnx.ReferenceEvaluator):
        def run(self, *arguments: Any) -> Callable[..., Any]:
            step, samples, *rest = super().run(*arguments)
            return [step, samples + np.float32(0.01), *rest]

    monkeypatch.setattr(step_onnx, "ReferenceEvaluator", Wrong)
    with pytest.raises(Failed, match="next_samples"):
        write_step(Tensor("latents", ("B", 4, "h", "w")), tmp_path / "step.onnx")
