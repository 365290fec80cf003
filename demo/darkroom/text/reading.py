"""A request's prompts -> the chunks of token ids that its text encoders read, and the weight of each token.

A plain prompt is one chunk, cut off where the text encoder ends, as in diffusers. The syntax of AUTOMATIC1111's web
interface has weights and as many chunks as a prompt takes: see `weighted`, and `chunked` for how its embeddings are
put together.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from darkroom.errors import InvalidRequest
from darkroom.flags import SYNTAXES
from darkroom.request import Request
from darkroom.text.tokenizer import Tokenizer, told_of_cut

STRONGER, WEAKER = 1.1, 1 / 1.1
"""What (round) and [square] brackets multiply weights by."""

MOST_WEIGHT = 1000
"""More is a slip of the keyboard, and comes to what is no number."""

BACK_TO_COMMA = 20
"""Where a chunk ends within so many tokens behind a comma, these begin the next one: the web interface's default."""

MARK = re.compile(r"\\[\\()\[\]]|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|]|[^\\()\[\]:]+|:|\\")
BREAK = re.compile(r"\s*\bBREAK\b\s*")

UNSUPPORTED = {
    r"<(?:lora|lyco|hypernet):": "{}...> is not read from prompts: name LoRAs with --lora-path",
    r"\bAND\b": "{} joins pictures of several prompts, which Darkroom does not support: write and",
    r"(?<!\\)\[[^\[\]()]*:\s*\d*\.?\d+\s*\]": "{} changes the prompt between steps, which Darkroom does not support",
    r"(?<!\\)\[[^\[\]()]*\|[^\[\]()]*\]": "{} changes the prompt between steps, which Darkroom does not support",
}
"""What the web interface reads otherwise than as words, and what to say of it."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once: `ids`, and the weight of each, None where all are 1."""

    ids: Ids
    weights: tuple[float, ...] | None = None

    def weigh(self, embeddings: np.ndarray) -> np.ndarray:
        """(T, D) embeddings of these ids, each times its weight, and all so that their mean is what it was."""
        if self.weights is None:
            return embeddings
        weighed = embeddings * np.array(self.weights, np.float32)[:, None]
        mean = weighed.mean()
        return weighed * (embeddings.mean() / mean) if mean else weighed


Text = tuple[tuple[Chunk, ...], ...]
"""The chunks of a prompt for each text encoder, the same number for each."""


@dataclass(frozen=True)
class Reading:
    """How the prompts of a request are read. `second` and `negative_second` are for the second text encoder alone, None
    where it reads what the first one does."""

    weighted: bool = False
    second: str | None = None
    negative: str = ""
    negative_second: str | None = None

    @classmethod
    def of(cls, request: Request) -> "Reading":
        return cls(
            request.prompt_syntax != SYNTAXES[0],
            request.prompt_2,
            request.negative_prompt or "",
            request.negative_prompt_2,
        )

    def prompt(self, tokenizers: Sequence[Tokenizer], prompt: str) -> Text:
        """Raises `InvalidRequest` for what the syntax has and Darkroom does not support."""
        return self._read(tokenizers, prompt, self.second)

    def away(self, tokenizers: Sequence[Tokenizer]) -> Text:
        """What guidance leads away from. Raises as `prompt` does."""
        return self._read(tokenizers, self.negative, self.negative_second)

    def chunks(self, tokenizers: Sequence[Tokenizer], prompts: Sequence[str], guided: bool) -> int:
        """How many chunks the denoiser is given of each of these prompts: what all of them repeated make up.

        Embeddings that stand there twice change nothing in attention over them, so that a prompt of one chunk beside a
        negative one of two, or another's two in the same engine, is what it is alone.
        """
        texts = [*(self.prompt(tokenizers, prompt) for prompt in prompts), *([self.away(tokenizers)] * guided)]
        return math.lcm(*(len(text[0]) for text in texts))

    def _read(self, tokenizers: Sequence[Tokenizer], first: str, second: str | None) -> Text:
        texts = [second if place == 1 and second is not None else first for place in range(len(tokenizers))]
        if not self.weighted:
            return tuple(
                (Chunk(tuple(map(int, tokenizer.encode([text]).ids[0]))),)
                for tokenizer, text in zip(tokenizers, texts, strict=True)
            )
        read = [chunked(tokenizer, text) for tokenizer, text in zip(tokenizers, texts, strict=True)]
        most = max(map(len, read))
        return tuple(
            (*chunks, *(chunked(tokenizer, "") * (most - len(chunks))))
            for tokenizer, chunks in zip(tokenizers, read, strict=True)
        )


def chunks(tokenizers: Sequence[Path], request: Request, guided: bool) -> int:
    """As `Reading.chunks`, of a request and the folders of its model's tokenizers."""
    if request.prompt_syntax == SYNTAXES[0]:
        return 1
    return Reading.of(request).chunks([_loaded(folder) for folder in tokenizers], request.texts, guided)


def cuts(tokenizers: Sequence[Tokenizer], request: Request) -> list[str]:
    """A warning for each of the request's texts that is cut off where its text encoder ends."""
    if request.prompt_syntax != SYNTAXES[0]:
        return []
    negative = request.negative_prompts if request.guided else {}
    texts = ([*request.texts, negative.get("negative_prompt")], [request.prompt_2, negative.get("negative_prompt_2")])
    return [
        told_of_cut(cut, tokenizer.context)
        for tokenizer, own in zip(tokenizers, texts, strict=False)
        for cut in tokenizer.encode(list(dict.fromkeys(filter(None, own)))).cut
        if cut
    ]


_loaded = cache(Tokenizer.load)


def weighted(prompt: str) -> list[tuple[str, float] | None]:
    """The parts of a prompt and their weights, in order; None stands for BREAK.

    As `parse_prompt_attention` of AUTOMATIC1111's web interface: (a) counts 1.1 times as much and [a] 1.1 times less,
    brackets multiply, (a:1.3) counts 1.3 times, and a backslash makes a bracket a letter. Brackets that nothing closes
    go to the end. Neighbours of one weight are one part.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        weights[start:] = [weight * by for weight in weights[start:]]

    for mark in MARK.finditer(prompt):
        text, number = mark[0], mark[1]
        if text in opened:
            opened[text].append(len(texts))
        elif number is not None and opened["("]:
            multiply(opened["("].pop(), float(number))
        elif text == ")" and opened["("]:
            multiply(opened["("].pop(), STRONGER)
        elif text == "]" and opened["["]:
            multiply(opened["["].pop(), WEAKER)
        else:
            parts = [text[1:]] if text[0] == "\\" else BREAK.split(text)
            for place, part in enumerate(parts):
                texts += [None, part] if place else [part]
                weights += [1.0] * (1 + bool(place))
    for bracket, by in (("(", STRONGER), ("[", WEAKER)):
        for start in opened[bracket]:
            multiply(start, by)
    merged: list[tuple[str, float] | None] = []
    for text, weight in zip(texts, weights, strict=True):
        if text is not None and merged and merged[-1] is not None and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append(None if text is None else (text, weight))
    return merged


def chunked(tokenizer: Tokenizer, prompt: str) -> tuple[Chunk, ...]:
    """A prompt in A1111's syntax, in as many chunks as it takes: each begins and ends as a prompt of its own does.

    Where one ends soon behind a comma, what follows the comma moves to the next; BREAK ends one. Raises
    `InvalidRequest` for what the syntax has and Darkroom does not support.
    """
    for pattern, said in UNSUPPORTED.items():
        if found := re.search(pattern, prompt):
            raise InvalidRequest(f"--prompt-syntax a1111: {said.format(found[0])}.")
    room = tokenizer.context - 2
    made: list[list[tuple[int, float]]] = []
    ids: list[tuple[int, float]] = []
    comma: int | None = None  # the place behind the last one in this chunk

    def end(at: int) -> None:
        nonlocal ids, comma
        made.append(ids[:at])
        ids, comma = ids[at:], None

    for part in weighted(prompt):
        if part is None:
            end(len(ids))
            continue
        if abs(part[1]) > MOST_WEIGHT:
            raise InvalidRequest(
                f"--prompt-syntax a1111: {part[0][:40]!r} counts {part[1]:g} times; {MOST_WEIGHT} is the most."
            )
        for word in tokenizer.words(part[0]):
            if len(ids) + len(word) > room:
                back = comma is not None and len(ids) == room and len(ids) - comma < BACK_TO_COMMA
                end(comma if back and word != tokenizer.comma else len(ids))
            ids += [(id, part[1]) for id in word]
            if word == tokenizer.comma:
                comma = len(ids)
    if ids or not made:
        end(len(ids))
    return tuple(_padded(tokenizer, chunk) for chunk in made)


def _padded(tokenizer: Tokenizer, chunk: list[tuple[int, float]]) -> Chunk:
    begin, last, padding = tokenizer.frame
    left = tokenizer.context - 2 - len(chunk)
    ids = (begin, *(id for id, _ in chunk), last, *[padding] * left)
    weights = (1.0, *(weight for _, weight in chunk), *[1.0] * (left + 1))
    return Chunk(ids, None if set(weights) == {1.0} else weights)
