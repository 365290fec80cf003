"""A model's tokenizer -> the one `tokenizer.json` that runs read, as transformers makes it."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest, gist
from darkroom.files import read_json
from darkroom.text.tokenizer import FILE, MORE, SOURCES, Tokenizer, tokenizer_files

PROMPT = "prompt"
"""What stands for one in a template."""


def compile_tokenizer(
    folder: Path,
    class_name: str,
    context: int,
    known: int,
    chat: bool = False,
    learned: Sequence[tuple[str, int]] = (),
) -> tuple[str, bytes, dict[str, Any]]:
    """The file's name, its content, which cuts and pads to `context` ids, and what is worth knowing of it.

    `class_name` is one of transformers' tokenizers, as a model index names it; `known` is the count of ids that the
    text encoder has embeddings for. With `chat` a prompt stands in the tokenizer's template, as its user's words, and
    none of it is cut off. `learned` are words that the encoder learns beside, and how many ids each has: those that
    follow, as `load_textual_inversion` of diffusers names them. Runs in a child: it imports transformers. Raises
    `InvalidRequest` naming the files of a tokenizer that cannot be read, is not whole, or is another text encoder's.
    """
    import tokenizers
    import transformers

    files = tokenizer_files(folder)
    source = next(names for names in ((FILE,), *SOURCES) if names[0] in files)  # which holds over the others
    for name in {*files}.intersection((*source, *MORE)):
        if name.endswith(".json"):
            read_json(folder / name)
    named = " and ".join(str(folder / name) for name in source)
    kind = getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerFast)):
        raise InvalidRequest(f"{folder} holds a {class_name}, which is no tokenizer that Darkroom supports.")
    try:
        if source == (FILE,):
            tokenizers.Tokenizer.from_file(str(folder / FILE))  # without a model in it transformers would make one up
        elif source == SOURCES[-1]:
            # No requirement of ours: nearly every model has a tokenizer.json beside this file.
            import_module("sentencepiece")
            from transformers.convert_slow_tokenizer import SentencePieceExtractor

            SentencePieceExtractor(str(folder / source[0]))  # transformers hides why it cannot, and tries other ways
        whole = kind.from_pretrained(folder, local_files_only=True)
        if chat:
            whole.backend_tokenizer.post_processor = _said_by_a_user(whole)
        whole("", padding="max_length", truncation=True, max_length=context)  # sets both for what follows
        largest = max(whole.get_vocab().values())
        for word, vectors in learned:
            _learn(whole, word, vectors)
        text = whole.backend_tokenizer.to_str()
        content = text.encode()
        Tokenizer(content)
    except InvalidRequest:
        raise
    except Exception as error:  # two libraries' ways of saying that files are none, or do not belong together
        raise InvalidRequest(f"{named} cannot be read as a {class_name}: {gist(error)}.") from error
    if context <= (around := whole.num_special_tokens_to_add()):
        raise InvalidRequest(
            f"--max-sequence-length {context} leaves no room for a prompt: {folder} puts {around} tokens around one."
        )
    read = json.loads(text)
    if not read["model"]["vocab"]:
        raise InvalidRequest(f"{named}: no vocabulary is there.")
    if read["model"]["type"] == "BPE":
        _check_merges(read, named)
    if largest >= known:
        raise InvalidRequest(
            f"{folder} has token ids up to {largest}, but its text encoder a vocab_size of {known}: the two are of "
            f"different models."
        )
    if learned and largest + 1 != known:
        raise InvalidRequest(
            f"--embedding: {folder} has {largest + 1} token ids, and its text encoder embeddings for {known}: which of "
            f"them new words would have is unknown."
        )
    return FILE, content, {"largest": largest}


def _said_by_a_user(tokenizer: Any) -> Any:
    """Puts around a prompt what the template of a tokenizer puts around what a user says, up to where the answer
    begins."""
    from tokenizers.processors import TemplateProcessing

    messages = [{"role": "user", "content": PROMPT}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    frame = dict(zip(("before", "after"), whole.split(PROMPT), strict=True))
    ids = {place: tokenizer.encode(text, add_special_tokens=False) for place, text in frame.items()}
    parts = [{"id": place, "ids": each, "tokens": tokenizer.convert_ids_to_tokens(each)} for place, each in ids.items()]
    return TemplateProcessing(single=["before", "$A", "after"], special_tokens=parts)


def _learn(tokenizer: Any, word: str, vectors: int) -> None:
    tokens = [word, *(f"{word}_{number}" for number in range(1, vectors))]
    if taken := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise InvalidRequest(f"--embedding: the model knows {taken[0]!r} already: rename the file.")
    if tokenizer.add_tokens(tokens) != vectors:
        raise InvalidRequest(f"--embedding: no prompt can have the word {word!r}: rename the file.")


def _check_merges(read: dict[str, Any], named: str) -> None:
    """Raises `InvalidRequest` for tokens that no merge makes: any beginning of a list of merges is one, and reads
    prompts otherwise.

    A vocabulary without a token for each byte was written by hand, as those of the libraries' own tests, and may have
    such tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model = read["model"]
    if not model["vocab"].keys() >= set(ByteLevel.alphabet()):
        return
    made = {first + second for first, second in model["merges"]} | {token["content"] for token in read["added_tokens"]}
    for token in model["vocab"]:
        if len(token.removesuffix(model["end_of_word_suffix"] or "")) > 1 and token not in made:
            raise InvalidRequest(
                f"{named}: the merges are cut off or of another tokenizer: none of the {len(model['merges'])} makes "
                f"{token!r}, which the vocabulary has; fetch the files again."
            )
