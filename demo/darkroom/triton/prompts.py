"""Prompts as they are sent to a server: what is asked with each, checked before anything is sent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest, near_matches
from darkroom.noise import SEED_LIMIT
from darkroom.prompts.rows import BYTE_ORDER_MARK, read, said_in
from darkroom.request import FLOAT32_MOST, PIXEL_MULTIPLE
from darkroom.schedule import SCHEDULERS

DATATYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "seed": "UINT64",
    "steps": "INT32",
    "guidance_scale": "FP32",
    "scheduler": "BYTES",
    "height": "INT32",
    "width": "INT32",
    "num_images": "INT32",
}
"""The inputs of the server's models, each of shape (B, 1), and their types as KServe names them."""

INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Prompt:
    """One row of a request. What is None is not sent: the server's model has a default for it."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    num_images: int | None = None
    place: str = field(default="", compare=False)
    """The file and line it is from, for what is said of it; "" for one from the command line."""

    @property
    def images(self) -> int:
        """How many images it makes: a server that is not told makes one."""
        return self.num_images or 1

    def asked(self) -> dict[str, Any]:
        """What is sent, by the names of the inputs."""
        return {name: value for name in DATATYPES if (value := getattr(self, name)) is not None}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_prompt(values: dict[str, Any], label: Callable[[str], str], place: str = "") -> Prompt:
    """Raises `InvalidRequest` for a value that no model takes; `label` makes a field's name what people know it as."""
    for name, value in values.items():
        if value is not None and (wrong := _wrong(name, value)):
            raise InvalidRequest(f"{label(name)} {wrong}")
    made = Prompt(**values, place=place)
    if made.seed is not None and made.seed + made.images > SEED_LIMIT:
        raise InvalidRequest(
            f"{label('seed')} must leave each of {made.images} images a seed below {SEED_LIMIT}; {made.seed} does not."
        )
    return made


def _wrong(name: str, value: Any) -> str | None:
    """What is wrong with a value; None where nothing is."""
    if DATATYPES[name] == "BYTES":
        if not isinstance(value, str):
            return f"is a text, not {value!r}."
        if any("\ud800" <= character <= "\udfff" for character in value):
            return f"is not valid UTF-8 text: {value.encode('utf-8', 'backslashreplace')!r}."
        if name == "prompt" and not value.strip():
            return "is empty: say what the picture should show."
        if name == "scheduler" and value not in SCHEDULERS:
            near = near_matches(value, list(SCHEDULERS))
            return f"{value!r} is not known here.{near} Known: {', '.join(SCHEDULERS)}."
        return None
    if name == "guidance_scale":
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"is a number, not {value!r}."
        return None if 0 <= value <= FLOAT32_MOST else f"must be from 0 to {FLOAT32_MOST:.2g}, not {value}."
    if not isinstance(value, int) or isinstance(value, bool):
        return f"is a whole number, not {value!r}."
    if name == "seed":
        return None if 0 <= value < SEED_LIMIT else f"must be from 0 to {SEED_LIMIT - 1}, not {value}."
    if name in ("height", "width"):
        fits = 0 < value < INT32_LIMIT and value % PIXEL_MULTIPLE == 0
        return None if fits else f"must be a multiple of {PIXEL_MULTIPLE}, not {value}."
    return None if 0 < value < INT32_LIMIT else f"must be from 1 to {INT32_LIMIT - 1}, not {value}."


def read_prompts(path: Path, defaults: dict[str, Any]) -> tuple[Prompt, ...]:
    """A prompt a line; in a .jsonl file a JSON object a line, whose own fields go before the `defaults`.

    Raises `InvalidRequest` with the file and line for what cannot be sent.
    """
    lines = read(path, "--prompts-file").removeprefix(BYTE_ORDER_MARK).split(b"\n")
    prompts = tuple(_prompts_of(path, lines, defaults))
    if not prompts:
        raise InvalidRequest(f"--prompts-file {path} holds no prompt.")
    return prompts


def _prompts_of(path: Path, lines: list[bytes], defaults: dict[str, Any]) -> Iterator[Prompt]:
    for number, fields in said_in(path, lines):
        place = f"{path}:{number}"
        if "prompt" not in fields:
            raise InvalidRequest(f"{place}: there is no prompt.")
        yield make_prompt(defaults | fields, lambda name, place=place: f"{place}: {name}", place)
