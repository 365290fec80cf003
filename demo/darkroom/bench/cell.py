"""One cell of a sweep: what is run, on what, and how."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from darkroom.bench.sections import HOW, words
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Options
from darkroom.request import Request

RUNS_AT_LEAST = 5
"""Timed runs that a median is worth something from."""

UNSAID = ("folder", "options", "asynchronous", "batches", "pixels", "onnx_dir", "engine_dir")
"""What a line of results does not have under this name."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model by its name, folder and weights, and everything that is asked of it. Sizes are in pixels.

    `weights` is a hash of them; `batches` and `pixels` bound what engines leave free, as in `Profile`. `scheduler` None
    is the model's own; `streams` are requests at a time; an `asynchronous` one lets the stages of neighbouring batches
    overlap; `warmup_runs` and `repeat` are its untimed and its timed runs. Graphs and engines are in the two folders.
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
    onnx_dir: str
    engine_dir: str

    @property
    def contender(self) -> str:
        said = [*self.options.place().values(), *filter(None, [self.options.quantization])]
        return f"{self.engine}{''.join(f' ({each})' for each in said)} {self.precision}"

    @property
    def name(self) -> str:
        """What no other cell that does the same work is called."""
        settings = self.settings()
        ways = [words(way, settings[way]) for way, usual in HOW.items() if settings[way] != usual]
        return " ".join([self.contender, self.build, *ways])

    def settings(self) -> dict[str, Any]:
        """What a line of results says of it."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in UNSAID}
        options = {name: value for name, value in asdict(self.options).items() if value not in (None, False)}
        said |= {"use_cuda_graph": options.pop("use_cuda_graph", False), "devices": int(options.pop("devices", 1))}
        if find_runtime(self.engine, self.options).bounded:
            options |= {"dynamic_batches": self.batches, "dynamic_sizes": self.pixels}
        more = json.dumps(options, sort_keys=True) if options else None
        return said | {"async": self.asynchronous, "options": more}

    @property
    def work(self) -> tuple[Any, ...]:
        """What must be the same for cells that take turns."""
        what = (self.version, self.weights, self.batch_size, self.denoising_steps, self.height, self.width)
        return (*what, self.scheduler, self.guidance_scale)

    @property
    def title(self) -> str:
        """The same, for people."""
        said = f"{self.version}, batch {self.batch_size}, {self.denoising_steps} steps, {self.height}x{self.width}"
        return f"{said}, {self.scheduler}" if self.scheduler else said

    def request(self) -> Request:
        """The request of one run. Raises `InvalidRequest` for what no model could be run with."""
        shared = {field.name: getattr(self, field.name) for field in fields(Request) if hasattr(self, field.name)}
        return Request(**shared, model=self.version or None, prompts=(self.prompt,))

    @classmethod
    def from_json(cls, **members: Any) -> "Cell":
        """The inverse of `asdict`, after JSON."""
        members["options"] = Options(**{name: _tuple(value) for name, value in members["options"].items()})
        return cls(**{name: _tuple(value) for name, value in members.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
