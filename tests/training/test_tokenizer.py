"""The tokenizer's two readers agree, and padding is Stable Diffusion's."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from training import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(tokenizer.learn_merges(["a red apple, noto style", "a pineapple"] * 3, 40), path)
    return path


@pytest.mark.parametrize("text", ["a red apple, noto style", "", "A  RED Apple!", "naïve ☃ 12 it's", "apple " * 90])
def test_tokenizers_and_transformers_give_the_same_ids(folder: Path, text: str) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)(text, padding="max_length", max_length=77, truncation=True)
    encoder = tokenizer.Encoder(folder)
    (ours,) = encoder([text])
    assert ours == theirs.input_ids
    assert len(ours) == 77 and ours[0] == encoder.begin and ours[-1] == encoder.end
