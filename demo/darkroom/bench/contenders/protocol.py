"""What every contender speaks with the process that started it: lines of JSON on the real stdout.

    python SCRIPT SETTINGS                  answers {"loaded": seconds}, then reads lines from stdin:
        run                                 {"streams": [{"stages": {stage: ms, ..., "Pipeline": ms}, "unet_calls": n}],
                                            "wall": ms}: one batch in every stream, and what all took together
        set CHANGES                         {"set": CHANGES}: other batch_size and denoising_steps from now on, in JSON
        save FOLDER                         {"saved": [paths]}: another batch, as image-0.png, image-1.png, ...
        memory                              {"peak_bytes": n, "peak_device_bytes": n or null}
        quit, or the end of the input       ends it
    python SCRIPT SETTINGS --cold PATH      makes one batch, saves its first picture, ends

SETTINGS is a JSON object, see `Settings`. Whatever goes wrong is {"error": "one line"}, and exit code 1; the trace
goes to stderr, with all that libraries print. Nothing here but the standard library: peers have no other in common.
"""

import time

BEGAN = time.perf_counter()  # before anything else is imported: what a peer loads is timed from here

import ctypes  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

PIPELINE = "Pipeline"
COLD = "--cold"
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies. One that is stopped would wait for it for ever."""


@dataclass(frozen=True)
class Settings:
    """One cell of a comparison. `model` is the folder that the peer loads, converted where it needs that.

    `kind` is what of its script a peer is; `precision` "f32", "bf16", or None for what it takes by itself; `compile` a
    mode of torch.compile, if any; `threads` None for as many as it likes. `latents` is an .npy with the initial noise,
    (B, 4, h, w) float32 of variance 1, for those that cannot draw it from the seed.
    """

    model: str
    prompt: str
    height: int
    width: int
    denoising_steps: int
    guidance_scale: float
    batch_size: int = 1
    kind: str = ""
    seed: int = 0
    precision: str | None = None
    compile: str | None = None
    channels_last: bool = True
    threads: int | None = None
    latents: str | None = None


@dataclass
class Clock:
    """Milliseconds that each stage of a batch took, and how often it was called; of each stream, where there are
    several."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    streams: list["Clock"] = field(default_factory=list)

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


Make = Callable[[Clock, Any], "np.ndarray"]
"""Makes one batch and times its stages: (B, H, W, 3), float32 in [0, 1] or uint8. It gets the settings,
which may have other steps and, where `load` leaves that open, another batch size than those that it was loaded for."""


def serve(
    load: Callable[[Any], Make],
    settings_of: Callable[..., Any] = Settings,
    device_memory: Callable[[], int | None] = lambda: None,
) -> None:
    """The main of a contender: `load` imports the peer, makes its pipeline ready, and returns what makes a batch.

    `device_memory` says what is taken of the GPU's memory, where torch does not know.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints there, native code too
    sys.stdout = sys.stderr

    def answer(**members: Any) -> None:
        print(json.dumps(members), file=answers, flush=True)

    try:
        settings = settings_of(**json.loads(sys.argv[1]))
        make = load(settings)
        if sys.argv[2:3] == [COLD]:
            _save(make(Clock(), settings)[:1], [sys.argv[3]])
            return
        answer(loaded=time.perf_counter() - BEGAN)
        for line in sys.stdin:
            match line.strip().split(" ", 1):
                case ["run"]:
                    answer(**_run(make, settings))
                case ["set", changes]:
                    settings = replace(settings, **json.loads(changes))
                    answer(set=json.loads(changes))
                case ["save", folder]:
                    os.makedirs(folder, exist_ok=True)
                    pictures = make(Clock(), settings)
                    paths = [os.path.join(folder, f"image-{image}.png") for image in range(len(pictures))]
                    answer(saved=_save(pictures, paths))
                case ["memory"]:
                    answer(peak_bytes=_peak_bytes(), peak_device_bytes=_peak_of_cuda() or device_memory())
                case ["quit"]:
                    break
                case _:
                    raise ValueError(f"{line.strip()!r} is none of run, set CHANGES, save FOLDER, memory, quit")
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer(error=_one_line(error))
        sys.exit(1)


def _run(make: Make, settings: Any) -> dict[str, Any]:
    clock = Clock()
    with clock.time(PIPELINE):
        make(clock, settings)
    streams = clock.streams or [clock]
    # What a single one says itself is without what only a benchmark does.
    wall = (clock if len(streams) > 1 else streams[0]).milliseconds[PIPELINE]
    return {
        "streams": [{"stages": each.milliseconds, "unet_calls": each.calls.get("UNet", 0)} for each in streams],
        "wall": wall,
    }


def _save(pictures: "np.ndarray", paths: list[str]) -> list[str]:
    from PIL import Image

    if pictures.dtype != "uint8":
        pictures = (255 * pictures).round().astype("uint8")  # as diffusers does
    for picture, path in zip(pictures, paths, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def _one_line(error: Exception) -> str:
    """`ValueError: what it says`, with its first line alone; an error that names an exit code is made to be read."""
    lines = str(error).strip().splitlines()
    return ": ".join([*([] if hasattr(error, "exit_code") else [type(error).__name__]), *lines[:1]])


def _peak_bytes() -> int:
    """Bytes that this process held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _peak_of_cuda() -> int | None:
    """Bytes that torch took on the GPU at most since this was last asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most
