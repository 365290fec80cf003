"""One cell of a sweep: what is run, on what, and how."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from darkroom.engines import find_runtime
from darkroom.engines.runtime import Options
from darkroom.request import Request

RUNS_AT_LEAST = 5
"""Timed runs that a median is worth something from."""


@dataclass(frozen=True)
class Cell:
    """A model by its name, folder and weights, and everything that is asked of it. Sizes are in pixels.

    `weights` is a hash of them; `batches` and `pixels` bound what engines leave free, as in `Profile`.
    `scheduler` None is the model's own; `streams` are requests at a time; an `asynchronous` one lets the stages of
    neighbouring batches overlap; `warmup_runs` and `repeat` are its untimed and its timed runs.
    """

    version: str
    folder: str
    weights: str
    engine: str
    precision: str
    build: str
    batch_size: int
    denoising_steps: int
    height: int
    width: int
    scheduler: str | None
    guidance_scale: float
    streams: int
    threads: int | None
    asynchronous: bool
    warmup_runs: int
    repeat: int
    prompt: str
    seed: int
    onnx_opset: int
    batches: tuple[int, int, int]
    pixels: tuple[int, int, int] | None
    cold_starts: int
    options: Options

    @property
    def contender(self) -> str:
        place = "".join(f" ({place})" for place in self.options.place().values())
        return f"{self.engine}{place} {self.precision}"

    @property
    def name(self) -> str:
        """What no other cell that does the same work is called."""
        more = {
            f"{self.streams} streams": self.streams > 1,
            f"{self.threads} threads": self.threads,
            "async": self.asynchronous,
        }
        return " ".join([self.contender, self.build, *(words for words, said in more.items() if said)])

    def settings(self) -> dict[str, Any]:
        """What a line of results says of it."""
        hidden = ("folder", "options", "asynchronous", "batches", "pixels")
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in hidden}
        options = {name: value for name, value in asdict(self.options).items() if value not in (None, False)}
        cuda_graph, devices = options.pop("use_cuda_graph", False), int(options.pop("devices", 1))
        if find_runtime(self.engine, self.options).bounded:
            options |= {"dynamic_batches": self.batches, "dynamic_sizes": self.pixels}
        more = json.dumps(options, sort_keys=True) if options else None
        said |= {"use_cuda_graph": cuda_graph, "devices": devices}
        return said | {"async": self.asynchronous, "options": more}

    def work(self) -> tuple[Any, ...]:
        """What must be the same for cells that take turns."""
        return (
            self.version,
            self.weights,
            self.batch_size,
            self.denoising_steps,
            self.height,
            self.width,
            self.scheduler,
            self.guidance_scale,
        )

    def request(self) -> Request:
        """The request of one run. Raises `InvalidRequest` for what no model could be run with."""
        return Request(
            model=self.version or None,
            prompts=(self.prompt,),
            negative_prompt=None,
            batch_size=self.batch_size,
            batch_count=1,
            height=self.height,
            width=self.width,
            denoising_steps=self.denoising_steps,
            guidance_scale=self.guidance_scale,
            clip_skip=0,
            scheduler=self.scheduler,
            seed=self.seed,
            engine=self.engine,
            precision=self.precision,
            build=self.build,
            onnx_opset=self.onnx_opset,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, members: dict[str, Any]) -> "Cell":
        """The inverse of `as_json`."""
        options = {name: _tuple(value) for name, value in members["options"].items()}
        return cls(**{name: _tuple(value) for name, value in members.items()} | {"options": Options(**options)})


@dataclass(frozen=True)
class Place:
    """Where graphs and engines are."""

    onnx_dir: str
    engine_dir: str

    def folders(self) -> tuple[Path, Path]:
        return Path(self.onnx_dir), Path(self.engine_dir)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
