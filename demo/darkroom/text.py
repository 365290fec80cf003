"""Prompt -> token ids, as transformers' CLIPTokenizer makes them, with the `tokenizers` library alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from darkroom.checkpoint import read_json, tokenizer_files
from darkroom.errors import AskedWrongly

CLIP_CONTEXT = 77
"""Tokens that CLIP's text encoder reads, begin and end included (Radford et al. 2021, section 2.4)."""

# The splitting pattern of CLIP's published tokenizer (openai/CLIP, clip/simple_tokenizer.py).
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Encoded:
    """`ids`: (N, context) int32. `cut[i]`: the text of prompt i that did not fit, or an empty string."""

    ids: np.ndarray
    cut: tuple[str, ...]


class ClipTokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, folder: Path, context: int = CLIP_CONTEXT) -> None:
        self.context = context
        settings = _settings(folder)
        self._bpe = _byte_pair_encoder(folder, settings)
        self.begin = self._id(settings["bos_token"], folder)
        self.end = self._id(settings["eos_token"], folder)
        self.pad = self._id(settings["pad_token"], folder)

    def encode(self, prompts: list[str]) -> Encoded:
        """Begin, the prompt's tokens, end, then padding: `context` ids a prompt."""
        rows, cut = [], []
        room = self.context - 2
        for prompt in prompts:
            tokens = self._bpe.encode(prompt, add_special_tokens=False).ids
            kept, rest = tokens[:room], tokens[room:]
            padding = [self.pad] * (room - len(kept))
            rows.append([self.begin, *kept, self.end, *padding])
            cut.append(self._bpe.decode(rest).replace("</w>", " ").strip() if rest else "")
        return Encoded(np.array(rows, np.int32).reshape(len(prompts), self.context), tuple(cut))

    def _id(self, token: str, folder: Path) -> int:
        found = self._bpe.token_to_id(token)
        if found is None:
            raise AskedWrongly(f"the tokenizer in {folder} does not know its own special token {token!r}.")
        return found


def _settings(folder: Path) -> dict[str, str]:
    """The special tokens by their role; CLIP's own where the folder says nothing."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))

    def content(role: str, default: str) -> str:
        token = settings.get(role) or default
        return str(token.get("content", default) if isinstance(token, dict) else token)

    end = content("eos_token", "<|endoftext|>")
    return {
        "bos_token": content("bos_token", "<|startoftext|>"),
        "eos_token": end,
        "unk_token": content("unk_token", end),
        "pad_token": content("pad_token", end),
    }


def _byte_pair_encoder(folder: Path, settings: dict[str, str]) -> Tokenizer:
    reading = folder / "tokenizer.json"
    try:
        if tokenizer_files(folder)[0] == "tokenizer.json":
            encoder = Tokenizer.from_file(str(reading))
            encoder.no_padding()
            encoder.no_truncation()
            return encoder
        reading = folder / "vocab.json"
        vocabulary = json.loads(reading.read_text(encoding="utf-8"))
        reading = folder / "merges.txt"
        lines = reading.read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return _clip_encoder(vocabulary, merges, settings)
    except AskedWrongly:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for what it cannot read
        raise AskedWrongly(f"{reading} cannot be read: {error}.") from None


def _clip_encoder(vocabulary: dict[str, int], merges: list[tuple[str, ...]], settings: dict[str, str]) -> Tokenizer:
    """The byte-pair encoder that transformers builds for CLIP's two vocabulary files."""
    encoder = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=settings["unk_token"],
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
    specials = dict.fromkeys(settings[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token"))
    encoder.add_special_tokens([token for token in specials if token in vocabulary])
    return encoder
