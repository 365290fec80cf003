"""Train the byte-pair tokenizer on captions and write it in every form that transformers and tokenizers read.

    python -m training.tokenizer [--work FOLDER] [--scenes]

The vocabulary is laid out as OpenAI's CLIP lays out its own: 256 bytes, 256 bytes at the end of a word, the
merges in order, then `<|startoftext|>` and `<|endoftext|>`; so every text has ids, and none is unknown.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from training import captions, concepts, vocabulary
from training.colours import NAMES
from training.drawings import Drawings
from training.networks import TOKENS
from training.scenes import caption, sample
from training.workspace import add_scenes_argument, add_work_argument

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 1534
"""512 + 1534 + 2 = 2048 ids."""
SCENE_MERGES = 3582
"""For twice as many."""


def corpus(seed: int = 0, repeats: int = 20) -> list[str]:
    """Captions of every concept, and every word for it."""
    rng = random.Random(seed)
    lines = []
    for concept in concepts.load():
        lines += concept.words
        for style in captions.STYLE_WORDS:
            lines += [captions.caption(concept, style, rng.choice(NAMES), rng).text for _ in range(repeats // 4)]
    return lines


def scene_corpus(work: Path, seed: int = 0, scenes: int = 20_000) -> list[str]:
    """Captions of scenes, and every word for everything."""
    things, drawings, rng = vocabulary.load(work), Drawings.load(work), random.Random(seed)
    lines = [word for thing in things for word in thing.words for _ in range(4)]
    return lines + [caption(sample(things, drawings, rng), rng).text for _ in range(scenes)]


def learn_merges(lines: list[str], count: int) -> list[tuple[str, str]]:
    """The most useful byte-pair merges, CLIP's word splitting assumed."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    return merges[:count]


def write(merges: list[tuple[str, str]], folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer.json, tokenizer_config.json, special_tokens_map.json."""
    from transformers import CLIPTokenizer

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), BEGIN, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")


class Encoder:
    """Captions -> padded ids, through tokenizer.json alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.begin, self.end = (self.tokenizer.token_to_id(token) for token in (BEGIN, END))
        self.tokenizer.enable_padding(pad_id=self.end, pad_token=END, length=TOKENS)
        self.tokenizer.enable_truncation(TOKENS)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """(B, 77) ids; padding repeats the end token, as for Stable Diffusion 1.x."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]


def main() -> None:
    """Train and write WORK/tokenizer."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    args = add_scenes_argument(parser).parse_args()
    lines, count = (scene_corpus(args.work), SCENE_MERGES) if args.scenes else (corpus(), MERGES)
    write(learn_merges(lines, count), args.work / "tokenizer")


if __name__ == "__main__":
    main()
