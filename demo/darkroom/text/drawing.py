"""Prompts that an image's seed decides: one of {red|green|blue}, and for __colour__ a line of colour.txt."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from darkroom.errors import InvalidRequest, near_matches
from darkroom.flags import SYNTAXES, option
from darkroom.request import Request

CHOICE = re.compile(r"(?<!\\)\{([^{}]*\|[^{}]*)(?<!\\)\}")
"""One without others in it: these are drawn first."""

WILDCARD = re.compile(r"__([\w./-]*?\w)__")
COUNTED = re.compile(r"\$\$|(?:^|\|)\s*\d*\.?\d+::")

DEEPEST = 50
"""Draws of which one leads to the next: more are a circle."""


@dataclass(frozen=True)
class Drawing:
    """What draws: `folder` has the wildcards' files, None for choices in braces alone."""

    folder: Path | None = None
    _lines: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def asked(cls, syntax: str, folder: str | None) -> "Drawing | None":
        """What draws for a request: choices in A1111's syntax, and choices and wildcards where a folder has these.
        Plain prompts stay what they are. Raises `InvalidRequest` for what is no folder."""
        return None if folder is None and syntax == SYNTAXES[0] else cls(folder and Path(folder))

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidRequest(f"--wildcards {self.folder} is not a folder.")

    def drawn(self, request: Request) -> Request:
        """The request with a prompt for each of its images. Raises `InvalidRequest` as `draw` does, and for something
        to draw in texts that all images have in common."""
        for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
            for pattern in (CHOICE, *((WILDCARD,) if self.folder else ())):
                if found := pattern.search(getattr(request, name) or ""):
                    raise InvalidRequest(f"{option(name)} is the same for all images: {found[0]} is drawn in prompts.")
        drawn = tuple(
            self.draw(prompt, seed)
            for batch in request.batches()
            for prompt, seed in zip(batch.prompts, batch.seeds, strict=True)
        )
        if request.image_count == 1:
            return replace(request, prompts=drawn)
        plain = [prompt for batch in request.batches() for prompt in batch.prompts]
        return request if [*drawn] == plain else replace(request, drawn=drawn)

    def draw(self, prompt: str, seed: int) -> str:
        """The prompt of an image with this seed. Raises `InvalidRequest` for wildcards without a file, and for what is
        not supported in braces."""
        draws = 0

        def one_of(options: list[str]) -> str:
            nonlocal draws
            draws += 1
            # Not by Python's own generator, whose draws are not promised to stay what they are.
            number = int.from_bytes(hashlib.sha256(f"{seed} {draws}".encode()).digest()[:8])
            return options[number % len(options)]

        for _ in range(DEEPEST):
            before = prompt
            prompt = CHOICE.sub(lambda found: one_of(_options(found[1])), prompt)
            if self.folder is not None and prompt == before:
                prompt = WILDCARD.sub(lambda found: one_of(self._of(found[1])), prompt)
            if prompt == before:
                return re.sub(r"\\([{}])", r"\1", prompt)
        raise InvalidRequest(f"--wildcards: the files lead to one another without end: {before[:100]!r}.")

    def _of(self, name: str) -> list[str]:
        """The lines of a wildcard's file, without those that are empty or begin with #."""
        if name not in self._lines:
            file = self.folder / f"{name}.txt"
            try:
                if not file.resolve().is_relative_to(self.folder.resolve()):
                    raise FileNotFoundError
                text = file.read_text(encoding="utf-8-sig")
            except FileNotFoundError:
                known = [str(path.relative_to(self.folder).with_suffix("")) for path in self.folder.rglob("*.txt")]
                raise InvalidRequest(
                    f"__{name}__: {self.folder} has no {name}.txt.{near_matches(name, known)}"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"__{name}__: {file} cannot be read ({error}).") from None
            lines = [line.strip() for line in text.splitlines()]
            self._lines[name] = [line for line in lines if line and not line.startswith("#")]
            if not self._lines[name]:
                raise InvalidRequest(f"__{name}__: {file} holds no line to draw.")
        return self._lines[name]


def _options(inner: str) -> list[str]:
    if found := COUNTED.search(inner):
        raise InvalidRequest(
            f"{{{inner}}}: {found[0].strip('| ')} is not supported: write the choices alone in braces."
        )
    return inner.split("|")
