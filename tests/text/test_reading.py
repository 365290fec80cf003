"""Prompts in A1111's syntax are read as its web interface and diffusers' community pipelines read them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkroom.errors import InvalidRequest
from darkroom.text.compile import compile_tokenizer
from darkroom.text.reading import Chunk, Reading, chunked, weighted
from darkroom.text.tokenizer import Tokenizer
from tests.support import write_tokenizer

WORDS = ("red", "blue", "apple", "cat", "dog", "house", "on", "the")
"""Each is one token here."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("reading") / "tokenizer"
    write_tokenizer(folder, pad="!")  # another than what ends a prompt, as Stable Diffusion 2's
    return Tokenizer(compile_tokenizer(folder, "CLIPTokenizer", 77, 10**6)[1])


PUBLISHED: dict[str, list[Any]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}
"""What `parse_prompt_attention` says of itself: in AUTOMATIC1111's modules/prompt_parser.py, and in diffusers'
examples/community/lpw_stable_diffusion.py."""


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_weights_are_the_published_ones(prompt: str) -> None:
    assert weighted(prompt) == PUBLISHED[prompt]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("[a]", [("a", 1 / 1.1)]),
        ("[[a", [("a", 1 / 1.1 / 1.1)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:-.5)", [("a", -0.5)]),
        (r"a\b \\ \( (c\)", [("ab \\ ( ", 1.0), ("c)", 1.1)]),
        ("a BREAK b", [("a", 1.0), None, ("b", 1.0)]),
        ("(a BREAK b:1.2) BREAKFAST", [("a", 1.2), None, ("b", 1.2), (" BREAKFAST", 1.0)]),
        ("", []),
    ],
)
def test_brackets_escapes_and_breaks(prompt: str, parts: list[Any]) -> None:
    assert weighted(prompt) == parts


@pytest.mark.parametrize(
    "prompt",
    [
        "a [cat:dog:0.5]",
        "[cat:5]",
        "[cat|dog]",
        "a cat AND a dog",
        "a <lora:style:0.8> cat",
        "(cat:-99999)",
        f"{'(' * 99}cat",
    ],
)
def test_what_the_syntax_has_beside_is_refused_by_name(prompt: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="--prompt-syntax a1111: "):
        chunked(tokenizer, prompt)
    assert chunked(tokenizer, "a sand, [cat] (a|b) \\[c|d\\]")


def words_of(chunk: Chunk, tokenizer: Tokenizer) -> list[str]:
    """The words between what begins and what ends a chunk; and that nothing else stands behind them."""
    begin, last, padding = tokenizer.frame
    end = chunk.ids.index(last)
    assert chunk.ids[0] == begin and len(chunk.ids) == 77
    assert set(chunk.ids[end + 1 :]) <= {padding}
    known = {tokenizer.words(word)[0][0]: word for word in (*WORDS, ",")}
    return [known[id] for id in chunk.ids[1:end]]


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 150, 151, 225])
def test_chunks_are_of_75_tokens(count: int, tokenizer: Tokenizer) -> None:
    words = [WORDS[index % len(WORDS)] for index in range(count)]
    chunks = chunked(tokenizer, " ".join(words))
    assert [words_of(chunk, tokenizer) for chunk in chunks] == [
        words[first : first + 75] for first in range(0, max(count, 1), 75)
    ]
    assert all(chunk.weights is None for chunk in chunks)


@pytest.mark.parametrize(("comma", "moves"), [(54, False), (55, True), (73, True), (74, False)])
def test_chunk_ends_at_a_comma_that_is_near(comma: int, moves: bool, tokenizer: Tokenizer) -> None:
    """AUTOMATIC1111's comma_padding_backtrack of 20; at 74 it is the last of its chunk anyway."""
    words = ["red"] * 100
    words[comma] = ","
    first, second = (words_of(chunk, tokenizer) for chunk in chunked(tokenizer, " ".join(words)))
    assert len(first) == (comma + 1 if moves else 75)
    assert first + second == words


def test_break_ends_a_chunk_and_both_encoders_get_as_many(tokenizer: Tokenizer) -> None:
    reading = Reading(weighted=True, second="red BREAK (apple:1.5) BREAK blue", negative="dog BREAK cat")
    first, second = reading.prompt([tokenizer, tokenizer], "house")
    assert [words_of(chunk, tokenizer) for chunk in first] == [["house"], [], []]
    assert [words_of(chunk, tokenizer) for chunk in second] == [["red"], ["apple"], ["blue"]]
    assert second[1].weights == (1.0, 1.5, *[1.0] * 75)
    assert reading.chunks([tokenizer, tokenizer], ["house"], guided=False) == 3
    assert reading.chunks([tokenizer, tokenizer], ["house"], guided=True) == 6  # three, twice, beside two, thrice


def reference(prompt: list[tuple[str, float]], tokenizer: Any, encoder: Any, per_chunk: bool) -> np.ndarray:
    """(T, D) embeddings of a prompt's parts with their weights, by the rules of AUTOMATIC1111 (the mean of each chunk
    is restored) or of diffusers' lpw pipelines (that of all)."""
    ids, weights = [], []
    for text, weight in prompt:
        own = tokenizer(text, add_special_tokens=False).input_ids
        ids += own
        weights += [weight] * len(own)
    rows, factors = [], []
    for first in range(0, max(len(ids), 1), 75):
        inner, own = ids[first : first + 75], weights[first : first + 75]
        filling = 75 - len(inner)
        rows.append([tokenizer.bos_token_id, *inner, *[tokenizer.eos_token_id] * (filling + 1)])
        factors.append([1.0, *own, *[1.0] * (filling + 1)])
    with torch.no_grad():
        plain = encoder(torch.tensor(rows)).last_hidden_state
    made = plain * torch.tensor(factors)[..., None]
    axes = (1, 2) if per_chunk else (0, 1, 2)
    made *= plain.mean(axes, keepdim=True) / made.mean(axes, keepdim=True)
    return made.flatten(0, 1).numpy()


def test_embeddings_are_those_of_the_published_rules(tiny_model: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    from darkroom.pipeline.pipeline import TextEncoder

    folder = tiny_model / "tokenizer"
    theirs = CLIPTokenizer.from_pretrained(folder)
    encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder").eval()
    torch.manual_seed(3)
    encoder.final_layer_norm.bias.data.normal_(0.5)  # as in trained ones the mean is not about zero

    class Engine:
        def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                found = encoder(torch.from_numpy(inputs["input_ids"]).long())
            return {"text_embeddings": found.last_hidden_state.numpy(), "pooled": found.pooler_output.numpy()}

    ours = Tokenizer(compile_tokenizer(folder, "CLIPTokenizer", 77, 10**6)[1])
    reader: Any = TextEncoder(ours, Engine(), Engine())  # type: ignore[arg-type]
    short = [("a ", 1.0), ("red", 1.4), (" apple on ", 1.0), ("the house", 0.55)]
    long = [("the red cat " * 20, 1.0), ("blue dog " * 40, 1.21), ("noto style", 1.0)]
    for parts in (short, long):
        prompt = "".join(text if weight == 1 else f"({text}:{weight})" for text, weight in parts)
        for batch in (1, 3):
            *made, away = reader([chunked(ours, prompt)] * batch, chunked(ours, "dog"))
            for each in made:
                expected = reference(parts, theirs, encoder, per_chunk=True)
                np.testing.assert_allclose(each["text_embeddings"], expected, atol=2e-5)

            expected = reference([("dog", 1.0)], theirs, encoder, per_chunk=True)
            np.testing.assert_allclose(away["text_embeddings"], expected, atol=2e-5)
        ids = torch.tensor([chunked(ours, prompt)[0].ids])
        np.testing.assert_allclose(made[0]["pooled"], encoder(ids).pooler_output[0].detach(), atol=2e-5)
    plain = " ".join(["the red cat"] * 40)
    (found,) = reader([chunked(ours, plain)])
    np.testing.assert_allclose(found["text_embeddings"], reference([(plain, 1.0)], theirs, encoder, False), atol=2e-5)
    (found,) = reader([chunked(ours, "a (red:1.4) apple on (the house:0.55)")])
    np.testing.assert_allclose(found["text_embeddings"], reference(short, theirs, encoder, False), atol=2e-5)


def test_every_word_survives(tokenizer: Tokenizer) -> None:
    prompt = "((red)), " * 70 + "[apple] house"
    read = [word for chunk in chunked(tokenizer, prompt) for word in words_of(chunk, tokenizer)]
    assert read == re.findall(r"\w+|,", prompt)
