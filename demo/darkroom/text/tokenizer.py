"""Prompts -> token ids, by a `tokenizer.json` that transformers wrote and the `tokenizers` library alone."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from darkroom.errors import InvalidRequest

FILE = "tokenizer.json"
"""What `tokenizers` calls its own format, which holds all that an encoder does: padding and truncation, too."""

SOURCES = (("vocab.json", "merges.txt"), (FILE,), ("spiece.model",))
"""What a tokenizer can be made of: each of these is enough."""

MORE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What else is read of a model's tokenizer, where it is there."""

SHOWN_OF_CUT = 500
"""Characters of what was cut off that a warning shows: all of it, unless a whole book was given."""


@dataclass(frozen=True)
class Encoded:
    """`ids`: (N, context) int32; `mask`: the same, 1 for what is no padding. `cut[i]`: the text of prompt i that did
    not fit, or an empty string."""

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[str, ...]


class Tokenizer:
    """What a compiled `tokenizer.json` says, with all that `compile_tokenizer` set in it. `context`: ids a prompt."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._encoder = tokenizers.Tokenizer.from_buffer(content)
        self.context: int = self._encoder.padding["length"]
        added = {token.content for token in self._encoder.get_added_tokens_decoder().values()}
        self._vectors = {word: _vectors(word, added) for word in added if f"{word}_1" in added}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The one in an artefact's folder."""
        return cls((folder / FILE).read_bytes())

    def encode(self, prompts: list[str]) -> Encoded:
        """Each prompt's ids, cut off and padded to `context`."""
        ids, masks, cut = [], [], []
        for text in map(self._of_many_vectors, prompts):
            encoding = self._encoder.encode(text)
            ids.append(encoding.ids)
            masks.append(encoding.attention_mask)
            rest = encoding.overflowing[0].offsets if encoding.overflowing else []
            # What stands for no text, as the token that ends a prompt, begins and ends at 0.
            cut.append(text[min(begin for begin, end in rest if end) :].strip() if rest else "")
        shape = (len(prompts), self.context)
        return Encoded(np.array(ids, np.int32).reshape(shape), np.array(masks, np.int32).reshape(shape), tuple(cut))

    def words(self, text: str) -> list[tuple[int, ...]]:
        """The ids of a text, however many, without those that begin and end a prompt: one by one, but for a textual
        inversion of many vectors."""
        encoding = self._endless.encode(self._of_many_vectors(text), add_special_tokens=False)
        ids, tokens, words, place = encoding.ids, encoding.tokens, [], 0
        while place < len(ids):
            end = place + len(self._vectors.get(tokens[place], [""]))
            words.append(tuple(ids[place:end]))
            place = end
        return words

    @cached_property
    def comma(self) -> tuple[int, ...]:
        """The word that a comma is."""
        return self.words(",")[0]

    @cached_property
    def frame(self) -> tuple[int, int, int]:
        """The ids that begin a prompt, end it, and fill up what is left."""
        begin, end, padding = self._encoder.encode("").ids[:3]
        return begin, end, padding

    @cached_property
    def _endless(self) -> tokenizers.Tokenizer:
        """The same without cutting and padding."""
        encoder = tokenizers.Tokenizer.from_buffer(self._content)
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def _of_many_vectors(self, prompt: str) -> str:
        """The prompt with `<cat>`, where `<cat>_1` and so on were added too, as `<cat> <cat>_1 ...`: diffusers'
        pipelines write it so for a textual inversion of many vectors."""
        if self._vectors:
            for word in sorted(self._vectors.keys() & set(self._endless.encode(prompt).tokens)):
                tokens = " ".join(self._vectors[word])
                prompt = re.sub(re.escape(word), lambda _, tokens=tokens: tokens, prompt, flags=re.IGNORECASE)
        return prompt


def told_of_cut(cut: str, context: int) -> str:
    """The warning for a prompt that did not fit, with what was cut off of it."""
    shown, more = cut[:SHOWN_OF_CUT], len(cut) - SHOWN_OF_CUT
    rest = f" and {more:,} more characters" if more > 0 else ""
    return f"a prompt is longer than the {context} tokens that the text encoder reads; cut off: {shown!r}{rest}"


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the files that define a model's tokenizer. Raises `InvalidRequest` where they are not all there."""
    there = [names for names in SOURCES if all((folder / name).is_file() for name in names)]
    if not there:
        raise InvalidRequest(f"{' or '.join(str(folder / name) for name in SOURCES[0])} is missing.")
    return [*(name for names in there for name in names), *(name for name in MORE if (folder / name).is_file())]


def _vectors(word: str, added: set[str]) -> list[str]:
    vectors = [word]
    while (following := f"{word}_{len(vectors)}") in added:
        vectors.append(following)
    return vectors
