"""Prompt -> token ids, as transformers' CLIPTokenizer makes them, with the `tokenizers` library alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from darkroom.errors import InvalidRequest
from darkroom.text.vocabulary import END_OF_WORD, Vocabulary, read_vocabulary

CLIP_CONTEXT = 77
"""Tokens that CLIP's text encoder reads, begin and end included (Radford et al. 2021, section 2.4)."""

SHOWN_OF_CUT = 500
"""Characters of what was cut off that a warning shows: all of it, unless a whole book was given."""

# The splitting pattern of CLIP's published tokenizer (openai/CLIP, clip/simple_tokenizer.py).
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Encoded:
    """`ids`: (N, context) int32. `cut[i]`: the text of prompt i that did not fit, or an empty string."""

    ids: np.ndarray
    cut: tuple[str, ...]


def told_of_cut(cut: str, context: int) -> str:
    """What is said of a prompt that did not fit, with what was cut off of it."""
    shown, more = cut[:SHOWN_OF_CUT], len(cut) - SHOWN_OF_CUT
    rest = f" and {more:,} more characters" if more > 0 else ""
    return f"a prompt is longer than the {context} tokens CLIP reads; cut off: {shown!r}{rest}"


class ClipTokenizer:
    """The tokenizer of one model folder. `largest` is the largest of the ids it gives."""

    def __init__(self, folder: Path, context: int = CLIP_CONTEXT) -> None:
        self.context = context
        vocabulary = read_vocabulary(folder)
        try:
            self._bpe = _byte_pair_encoder(vocabulary)
        except Exception as error:  # `tokenizers` raises bare Exception for what it cannot read
            raise InvalidRequest(f"the tokenizer in {folder} cannot be made: {error}.") from None
        self._added = {str(token) for token in vocabulary.added}
        ids = {token: self._bpe.token_to_id(token) for token in self._added}
        self.begin, self.end, self.pad = (
            ids[str(vocabulary.special[role])] for role in ("bos_token", "eos_token", "pad_token")
        )
        self.largest = max(*ids.values(), max(vocabulary.tokens.values()))

    def encode(self, prompts: list[str]) -> Encoded:
        """Begin, the prompt's tokens, end, then padding: `context` ids a prompt."""
        rows, cut = [], []
        room = self.context - 2
        for prompt in prompts:
            tokens = self._bpe.encode(self._of_many_vectors(prompt), add_special_tokens=False).ids
            kept, rest = tokens[:room], tokens[room:]
            padding = [self.pad] * (room - len(kept))
            rows.append([self.begin, *kept, self.end, *padding])
            cut.append(self._bpe.decode(rest).replace(END_OF_WORD, " ").strip() if rest else "")
        return Encoded(np.array(rows, np.int32).reshape(len(prompts), self.context), tuple(cut))

    def _of_many_vectors(self, prompt: str) -> str:
        """The prompt with `<cat>`, where `<cat>_1` and so on were added too, as `<cat> <cat>_1 ...`: diffusers'
        pipelines write it so for a textual inversion of many vectors."""
        if not any(f"{token}_1" in self._added for token in self._added):
            return prompt
        for token in sorted(self._added.intersection(self._bpe.encode(prompt, add_special_tokens=False).tokens)):
            vectors = [token]
            while (following := f"{token}_{len(vectors)}") in self._added:
                vectors.append(following)
            prompt = prompt.replace(token, " ".join(vectors))
        return prompt


def _byte_pair_encoder(vocabulary: Vocabulary) -> Tokenizer:
    """The encoder that transformers builds for CLIP."""
    encoder = Tokenizer(
        models.BPE(
            vocab=vocabulary.tokens,
            merges=vocabulary.merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
            unk_token=str(vocabulary.special["unk_token"]),
        )
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    encoder.add_tokens(vocabulary.added)
    return encoder
