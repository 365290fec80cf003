"""The light half of the JAX engine: a stage's program, compiled for the devices at hand and kept; and run.

A UNet's program is a network call with the schedule's step behind it. Samples and outputs stay on the devices from the
first call to the last: the host only launches, a little ahead of them. A loop inside the program would save the
launches, but there XLA's convolutions on a CPU took about five times as long.

Over several devices the batch is divided, and each of them runs the same program on its share.
"""

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from jax import export
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from darkroom.contract import Job, Stage
from darkroom.engines.parity import TOLERANCES
from darkroom.engines.runtime import Engine
from darkroom.errors import Failed
from darkroom.networks.graph import relative_error
from darkroom.schedule.table import (
    INPUT_SCALE,
    OUTPUTS,
    ROW,
    TIMESTEP,
    State,
    Table,
    advance,
    network_input,
    state_of,
)

PROGRAM, EXPECTED = "network.stablehlo", "expected.safetensors"
"""What the heavy half leaves: the network for one device's share of a batch, and what torch makes of an image. They go
when the program is compiled."""

GIVEN, MADE = "given.", "made."
"""What begins the names of the network's inputs and outputs there."""

EXECUTABLE, WEIGHTS = "engine.xla", "weights.safetensors"

IMAGES = "images"
"""The axis of devices that a batch is divided over."""

SAME, DIVIDED = PartitionSpec(), PartitionSpec(IMAGES)
"""How arrays lie on the devices: all of it on each, or a share of the first axis, the images'."""

AHEAD = 2
"""Launches that the host may be ahead of the devices: enough for them never to wait for it."""

Arrays = dict[str, Any]


Network = Callable[[Arrays, Arrays], Arrays]
"""(weights, inputs by name) -> outputs by name."""


def step_of(network: Network) -> Callable[[Arrays, State, Any, Any, Arrays], tuple[State, Any]]:
    """The program around a UNet: (weights, state, rows (B, ROW), noise (B, C, h, w), conditions) -> the next state, and
    its sample."""

    def step(weights: Arrays, state: State, rows: Any, noise: Any, conditions: Arrays) -> tuple[State, Any]:
        inputs = {"latents": network_input(rows, state), "timestep": rows[:, TIMESTEP]} | conditions
        following = advance(rows, state, network(weights, inputs)["output"], noise)
        return following, following.samples[0]

    return step


def rows_of_the_network(timestep: np.ndarray) -> np.ndarray:
    """The rows (B, ROW) that make the network's output the next sample, at a timestep (B,) for each image."""
    rows = np.zeros((len(timestep), ROW), np.float32)
    rows[:, TIMESTEP] = timestep
    rows[:, [INPUT_SCALE, OUTPUTS]] = 1
    return rows


def finish_engine(job: Job, folder: Path) -> dict[str, Any]:
    """Compiles what `jax_build` left in `folder` and keeps that in its place, once it is held against torch.

    Raises `Failed` when they disagree. Returns facts for the manifest: the error, and the seconds that XLA took.
    """
    start = time.perf_counter()
    compiled, devices = _compiled(job, folder)
    seconds = time.perf_counter() - start
    kept = (devices, *serialize_executable.serialize(compiled))
    (folder / EXECUTABLE).write_bytes(pickle.dumps(kept))
    error = _error_against_torch(load_engine(job, folder), job, folder)
    if not error <= TOLERANCES[job.precision]:
        raise Failed(
            f"the {job.stage.name} engine for JAX differs from torch by {error:.1e} (allowed: "
            f"{TOLERANCES[job.precision]:.0e}): it was not kept. Try --precision fp32, or another --engine."
        )
    for name in (PROGRAM, EXPECTED):
        (folder / name).unlink()
    return {"error_against_torch": error, "compile_seconds": round(seconds, 3)}


def _compiled(job: Job, folder: Path) -> tuple[jax.stages.Compiled, int]:
    """The program in `folder` for the devices that make a batch, and how many those are."""
    network = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    (weights, inputs), _ = jax.tree.unflatten(network.in_tree, network.in_avals)
    mesh = _mesh(job.profile.batch // next(iter(inputs.values())).shape[0])
    given: dict[str, np.ndarray] = {
        tensor.name: np.empty(job.profile.shape(tensor), tensor.dtype) for tensor in job.stage.inputs
    }
    run, takes, donated = network.call, (given,), ()
    if job.stage.denoises:
        latents = given.pop("latents")
        rows = rows_of_the_network(given.pop("timestep"))
        run, takes, donated = step_of(network.call), (state_of(latents), rows, latents, given), (1,)

    def like(lies: PartitionSpec) -> Callable[[Any], jax.ShapeDtypeStruct]:
        return lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, lies))

    # Each device on its own: left to itself, XLA would exchange images between them for guidance's doubled batch.
    shared = jax.shard_map(run, mesh=mesh, in_specs=(SAME, *[DIVIDED] * len(takes)), out_specs=DIVIDED, check_vma=False)
    arguments = (jax.tree.map(like(SAME), weights), *jax.tree.map(like(DIVIDED), takes))
    return jax.jit(shared, donate_argnums=donated).lower(*arguments).compile(), mesh.size


def _error_against_torch(engine: "JaxEngine", job: Job, folder: Path) -> float:
    """Over a batch of the same image: see `relative_error`."""
    known = load_file(folder / EXPECTED)
    inputs = {name.removeprefix(GIVEN): value for name, value in known.items() if name.startswith(GIVEN)}
    made = engine({name: np.repeat(value, job.profile.batch, axis=0) for name, value in inputs.items()})
    batch = job.profile.batch
    return relative_error((np.repeat(known[MADE + name], batch, axis=0), value) for name, value in made.items())


def load_engine(job: Job, folder: Path) -> "JaxEngine":
    """The engine in `folder`, its weights on the devices. Raises `Failed` where there are too few of those."""
    count, *executable = pickle.loads((folder / EXECUTABLE).read_bytes())
    if count > jax.device_count():
        raise Failed(f"the engine in {folder} is for {count} devices, and here are {jax.device_count()}.")
    mesh = _mesh(count)
    compiled = serialize_executable.deserialize_and_load(*executable, execution_devices=list(mesh.devices.flat))
    on_each = NamedSharding(mesh, SAME)
    with safetensors.safe_open(folder / WEIGHTS, "numpy") as file:
        # One by one: a large network is never there twice.
        weights = {name: jax.device_put(file.get_tensor(name), on_each) for name in file.keys()}
    kind = JaxUnet if job.stage.denoises else JaxEngine
    return kind(job.stage, compiled, weights, NamedSharding(mesh, DIVIDED))


def _mesh(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), (IMAGES,))


class JaxEngine(Engine):
    """A stage that is called with arrays."""

    def __init__(self, stage: Stage, program: jax.stages.Compiled, weights: Arrays, divided: NamedSharding) -> None:
        self._stage = stage
        self._program = program
        self._weights = weights
        self._divided = divided

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = self._program(self._weights, self._placed({each.name: inputs[each.name] for each in self._stage.inputs}))
        return {name: np.asarray(value) for name, value in made.items()}

    def _placed(self, arrays: Any) -> Any:
        """Arrays on the devices, each device with its share of the images."""
        return jax.device_put(arrays, self._divided)


class JaxUnet(JaxEngine):
    """The UNet with the schedule's step, which denoise without coming back to the host."""

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        state, silence, conditions = self._begun(inputs["latents"], inputs)
        _, sample = self._launch(state, rows_of_the_network(inputs["timestep"]), silence, conditions)
        return {"output": np.asarray(sample)}

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """See `Denoiser`."""
        state, silence, told = self._begun(sample, conditions)
        drawn = iter(noises)
        launched: deque[jax.Array] = deque()
        for call, row in enumerate(table.rows()):
            noise = self._placed(next(drawn)) if table.noise_drawn[call] else silence
            state, made = self._launch(state, np.tile(row, (len(sample), 1)), noise, told)
            launched.append(made)
            if len(launched) > AHEAD:
                launched.popleft().block_until_ready()
            if call < len(table) - 1:
                yield None
        yield np.asarray(launched[-1])

    def _launch(self, state: State, rows: np.ndarray, noise: jax.Array, conditions: Arrays) -> tuple[State, jax.Array]:
        return self._program(self._weights, state, self._placed(rows), noise, conditions)

    def _begun(self, sample: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[State, jax.Array, Arrays]:
        """On the devices: the first state, what stands for noise where none is drawn, and the conditions."""
        conditions = {name: inputs[name] for name in self._stage.steady}
        return self._placed((state_of(sample), np.zeros(sample.shape, np.float32), conditions))
