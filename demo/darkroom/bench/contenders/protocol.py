"""What every contender speaks with the process that started it: lines of JSON on the real stdout.

    python SCRIPT SETTINGS                  answers {"loaded": seconds}, then reads lines from stdin:
        run                                 {"stages": {stage: ms, ..., "Pipeline": ms}, "unet_calls": n}
        save FOLDER                         {"saved": [paths]}: another batch, as image-0.png, image-1.png, ...
        quit, or the end of the input       {"peak_bytes": n}
    python SCRIPT SETTINGS --cold PATH      makes one batch, saves its first picture, ends

SETTINGS is a JSON object, see `Settings`. Whatever goes wrong is {"error": "one line"}, and exit code 1; the trace
goes to stderr, with all that libraries print.
"""

import time

BEGAN = time.perf_counter()  # before anything else is imported: what a peer loads is timed from here

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import TYPE_CHECKING, Any, TextIO  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

PIPELINE = "Pipeline"
COLD = "--cold"


@dataclass(frozen=True)
class Settings:
    """One cell of a comparison. `model` is the folder that the peer loads, converted where it needs that.

    `scheduler` is a diffusers class, None the model's own; `precision` "f32", or None for what the peer takes by
    itself; `threads` None for as many as it likes. `latents` is an .npy with the initial noise, (B, 4, h, w) float32
    of variance 1; without it, image i starts from the noise of seed + i, as the peer draws it.
    """

    model: str
    prompt: str
    height: int
    width: int
    denoising_steps: int
    guidance_scale: float
    negative_prompt: str = ""
    batch_size: int = 1
    scheduler: str | None = None
    seed: int = 0
    precision: str | None = None
    compile: bool = False
    channels_last: bool = True
    threads: int | None = None
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, "f32"):
            raise ValueError(f'precision is "f32" or null, not {self.precision!r}')

    def noise(self) -> "np.ndarray | None":
        """The initial noise that was given, (B, 4, h, w) float32."""
        if self.latents is None:
            return None
        import numpy as np

        return np.load(self.latents)


@dataclass
class Clock:
    """Milliseconds that each stage of a batch took, and how often it was called."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to `stage`, as one call."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, 1000 * (time.perf_counter() - start))

    def add(self, stage: str, milliseconds: float, calls: int = 1) -> None:
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + milliseconds
        self.calls[stage] = self.calls.get(stage, 0) + calls


Make = Callable[[Clock], "np.ndarray"]
"""Makes one batch and tells the clock of its stages: (B, H, W, 3), float32 in [0, 1] or uint8."""


def serve(load: Callable[[Settings], Make]) -> None:
    """The main of a contender: `load` imports the peer, makes its pipeline ready, and returns what makes a batch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answers = _stdout_to_ourselves()
    try:
        settings = Settings(**json.loads(sys.argv[1]))
        make = load(settings)
        if sys.argv[2:3] == [COLD]:
            _save(make(Clock())[:1], [sys.argv[3]])
            return
        _answer(answers, {"loaded": time.perf_counter() - BEGAN})
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command == "quit":
                break
            _answer(answers, _done(command, argument, make))
        _answer(answers, {"peak_bytes": _peak_bytes()})
    except Exception as error:
        import traceback

        traceback.print_exc()
        _answer(answers, {"error": _one_line(error)})
        sys.exit(1)


def _done(command: str, argument: str, make: Make) -> dict[str, Any]:
    match command, argument:
        case "run", "":
            clock = Clock()
            with clock.time(PIPELINE):
                make(clock)
            return {"stages": clock.milliseconds, "unet_calls": clock.calls.get("UNet", 0)}
        case "save", folder if folder:
            os.makedirs(folder, exist_ok=True)
            pictures = make(Clock())
            return {"saved": _save(pictures, [os.path.join(folder, f"image-{i}.png") for i in range(len(pictures))])}
        case _:
            raise ValueError(f"{f'{command} {argument}'.strip()!r} is none of run, save FOLDER, quit")


def _save(pictures: "np.ndarray", paths: list[str]) -> list[str]:
    from PIL import Image

    if pictures.dtype != "uint8":
        pictures = (255 * pictures).round().astype("uint8")  # as diffusers does
    for picture, path in zip(pictures, paths, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def _stdout_to_ourselves() -> TextIO:
    """The real stdout; what anything else prints there goes to stderr from now on, from native code too."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _one_line(error: Exception) -> str:
    """`ValueError: what it says`, with its first line alone."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _peak_bytes() -> int:
    """Bytes that this process held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes
