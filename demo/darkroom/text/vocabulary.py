"""A tokenizer's files: its tokens, the merges that make them, and the tokens that stand beside both.

Which file says what, and which holds where two do, is as transformers' CLIPTokenizer has it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from darkroom.errors import InvalidRequest
from darkroom.files import read_json

END_OF_WORD = "</w>"

SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "sep_token": None,
    "pad_token": "<|endoftext|>",
    "cls_token": None,
    "mask_token": None,
}
"""The special tokens by their role, in the order in which they are added; CLIP's own where a folder says nothing."""

WHOLE, TOKENS, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
MORE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Token = str | AddedToken
Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's files say. `tokens`: with their ids. `special`: by role. `added`: all that no merge makes, in
    the order in which they are added."""

    tokens: dict[str, int]
    merges: Merges
    special: dict[str, Token]
    added: list[AddedToken]


def tokenizer_files(folder: Path) -> list[str]:
    """The files that define the tokenizer: vocab.json and merges.txt, or tokenizer.json, or both ways."""
    pair = all((folder / name).is_file() for name in (TOKENS, MERGES))
    if not pair and not (folder / WHOLE).is_file():
        raise InvalidRequest(f"{folder / TOKENS} or {folder / MERGES} is missing.")
    names = [*((TOKENS, MERGES) if pair else ()), WHOLE, *MORE]
    return [name for name in names if (folder / name).is_file()]


def read_vocabulary(folder: Path) -> Vocabulary:
    """Tokens and merges are those of tokenizer.json where it is there. Raises `InvalidRequest` naming the file."""
    names = tokenizer_files(folder)
    whole, *more = (read_json(folder / name) if name in names else {} for name in (WHOLE, *MORE))
    tokens, merges = _whole(folder, whole) if WHOLE in names else _pair(folder)
    try:
        return Vocabulary(tokens, merges, *_beside(whole, *more))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InvalidRequest(f"the special or added tokens in {folder} cannot be read: {error}.") from None


def check_vocabulary(folder: Path) -> None:
    """Raises `InvalidRequest` for files that are cut off or of two tokenizers: merges whose parts or products are no
    tokens, and tokens that no merge makes.

    A vocabulary without a token for each byte was written by hand, as those of the libraries' own tests, and may have
    tokens that no merge makes.
    """
    names, read = tokenizer_files(folder), read_vocabulary(folder)
    beside = {str(token) for token in read.added}
    if WHOLE in names:
        _check(folder / WHOLE, folder / WHOLE, read.tokens, read.merges, beside)
    if MERGES in names:
        _check(folder / TOKENS, folder / MERGES, *_pair(folder), beside)


def _check(tokens_file: Path, merges_file: Path, tokens: dict[str, int], merges: Merges, beside: set[str]) -> None:
    made = {first + second for first, second in merges}
    unknown = made.union(chain.from_iterable(merges)) - tokens.keys()
    if unknown:
        raise InvalidRequest(
            f"{merges_file} does not belong to {tokens_file}, which has no {min(unknown)!r}: fetch both again."
        )
    if not tokens.keys() >= set(ByteLevel.alphabet()):
        return
    for token in tokens:
        if len(token.removesuffix(END_OF_WORD)) > 1 and token not in made and token not in beside:
            raise InvalidRequest(
                f"{merges_file} is cut off or of another tokenizer: none of its {len(merges)} merges makes {token!r}, "
                f"which {tokens_file.name} has; fetch both again."
            )


def _pair(folder: Path) -> tuple[dict[str, int], Merges]:
    file = folder / MERGES
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}.") from None
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return _tokens(folder / TOKENS, read_json(folder / TOKENS)), _merges(file, merges)


def _whole(folder: Path, content: dict[str, Any]) -> tuple[dict[str, int], Merges]:
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(merges := model.get("merges"), list):
        raise InvalidRequest(f"{folder / WHOLE} holds no byte-pair encoding.")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return _tokens(folder / WHOLE, model.get("vocab")), _merges(folder / WHOLE, merges)


def _tokens(file: Path, tokens: Any) -> dict[str, int]:
    whole = isinstance(tokens, dict) and bool(tokens) and set(map(type, tokens.values())) == {int}
    if not whole or min(tokens.values()) < 0:
        raise InvalidRequest(f"{file} holds no vocabulary: tokens with their ids from 0 up.")
    return tokens


def _merges(file: Path, merges: list[Any]) -> Merges:
    try:
        pairs = [(first, second) for first, second in merges]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) < len(merges) or set(map(type, chain.from_iterable(pairs))) - {str}:
        raise InvalidRequest(f"{file} is damaged: a merge is of two tokens, and not all in it are.")
    return pairs


def _beside(whole: dict, config: dict, special_map: dict, legacy: dict) -> tuple[dict, list]:
    """The special and the added tokens, by what tokenizer.json and those in MORE say together."""
    said = dict(config)
    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        by_id |= {int(index): AddedToken(**token) for index, token in config["added_tokens_decoder"].items()}
    else:
        said |= {name: _special(token) if isinstance(token, dict) else token for name, token in special_map.items()}
        known = {_content(said[role]) for role in SPECIAL if said.get(role)} | {_content(t) for t in _extra(said)}
        for content, index in legacy.items():
            special = content in known
            by_id[index] = AddedToken(content, normalized=not special, special=special)
        for token in whole.get("added_tokens", ()):
            by_id[token["id"]] = AddedToken(**{name: value for name, value in token.items() if name != "id"})
    contents = {str(token): token for token in by_id.values()}
    named = {role: said.get(role) or usual for role, usual in SPECIAL.items()}
    special = {role: contents.get(_content(token), _token(token)) for role, token in named.items() if token}
    added: list[Token] = [token for _, token in sorted(by_id.items())]
    for token in (*special.values(), *map(_token, _extra(said))):
        if str(token) not in contents and token not in added:
            added.append(token)
    roles = {str(token) for token in special.values()}
    return special, [_as_special(token) if isinstance(token, str) or str(token) in roles else token for token in added]


def _extra(said: dict[str, Any]) -> Iterable[Any]:
    """Special tokens that have no role."""
    extra = said.get("extra_special_tokens") or said.get("additional_special_tokens") or ()
    return extra.values() if isinstance(extra, dict) else extra


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _token(token: Any) -> Token:
    """A token as a configuration file writes it: a text, or an object."""
    if not isinstance(token, dict):
        return token
    return AddedToken(**{name: value for name, value in token.items() if name != "__type"})


def _special(token: dict[str, Any]) -> AddedToken:
    return AddedToken(**{name: value for name, value in token.items() if name != "__type"} | {"special": True})


def _as_special(token: Token) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = True
    return token
