"""Prompts as they are sent to a server: with their fields, checked before anything is sent."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest
from darkroom.flags import INT32_MOST, NUM_IMAGES, OF_ROW, option
from darkroom.prompts.rows import BYTE_ORDER_MARK, read, said_in
from darkroom.request import Request
from darkroom.serving.service import asked_by_flags, in_fields
from darkroom.triton.config import INPUTS

DATATYPES = {name: kind.removeprefix("TYPE_").replace("STRING", "BYTES") for name, kind in INPUTS.items()}
"""The inputs of the server's models, each of shape (B, 1), and their types as KServe names them."""

ANY = Request(model=None, prompts=("a picture",), height=512, width=512, denoising_steps=20, guidance_scale=7.5)
"""Stands for what a server's model does by default, where prompts are checked that leave it unsaid."""


@dataclass(frozen=True)
class Prompt:
    """One row of a request: the inputs that are sent, by name. `place` is its file and line, "" for flags."""

    fields: dict[str, Any]
    place: str = ""

    @property
    def images(self) -> int:
        """How many images it makes: by default a server makes one."""
        return self.fields.get(NUM_IMAGES, 1)

    def seeded(self, seed: int) -> "Prompt":
        """The same with this seed, unless it has one of its own."""
        return replace(self, fields={"seed": seed} | self.fields)


def make_prompt(values: dict[str, Any], place: str = "") -> Prompt:
    """Raises `InvalidRequest` for what no model takes, naming the flag, or `place` and the field."""
    fields = {name: value for name, value in values.items() if value is not None}
    images = fields.get(NUM_IMAGES, 1)
    try:
        if wrong := OF_ROW[NUM_IMAGES].wrong(images):
            raise InvalidRequest(f"--num-images {wrong}")
        first = asked_by_flags({name: value for name, value in fields.items() if name != NUM_IMAGES}, ANY)
        replace(first, batch_count=images)  # whose seeds are checked
        for name, value in fields.items():
            if DATATYPES[name] == "INT32" and value > INT32_MOST:
                raise InvalidRequest(f"{option(OF_ROW[name].name)} must be at most {INT32_MOST}, not {value}.")
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}: {in_fields(str(error))}" if place else str(error)) from None
    return Prompt(fields, place)


def read_prompts(path: Path, common: dict[str, Any]) -> tuple[Prompt, ...]:
    """Those of a file, whose own fields go before what is `common` to all: see `darkroom.prompts.rows`.

    Raises `InvalidRequest`, with the file and line, for what cannot be sent.
    """
    lines = read(path, "--prompts-file").removeprefix(BYTE_ORDER_MARK).split(b"\n")
    prompts = tuple(make_prompt(common | fields, f"{path}:{number}") for number, fields in said_in(path, lines))
    if not prompts:
        raise InvalidRequest(f"--prompts-file {path} holds no prompt.")
    return prompts
