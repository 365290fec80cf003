"""Token ids are those of transformers' tokenizers."""

import json
import random
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import AddedToken, CLIPTokenizer, T5Tokenizer

from darkroom.checkpoint.catalog import EMBEDDED
from darkroom.errors import InvalidRequest
from darkroom.text.compile import compile_tokenizer
from darkroom.text.tokenizer import Tokenizer, told_of_cut
from tests.support import BEGIN, END, WORDS, changed_copy, edit_json, write_tokenizer

TEXTS = [
    "",
    " ",
    "a red apple, noto style, blue background",
    "A RED Apple",
    "   spaces   before,\tbetween\nand after   ",
    "don't you're I'll we've he'd it's I'm 'tis",
    "punctuation!!! ...what?! (brackets) [square] {curly} <angle> #hash @at & % $5.00 ~ ` ^ * _under_ a/b\\c|d",
    "semi;colon:colon-hyphen—dash–dash…ellipsis “quotes” ‘single’",
    "123 4567 3.14 1e10 ½ ² Ⅷ ٣",
    "café naïve Zürich ÅNGSTRÖM",
    "cafe\u0301 decomposed",
    "ﬁ ligature ＦＵＬＬ width",
    "İstanbul ǅ ß ẞ ς Σ",
    "日本語のりんご 红苹果 사과",
    "яблоко تفاحة תפוח सेब",
    "🍎🐈‍⬛ 👩🏽‍🚀 🇮🇸 ❤️",
    "zero\u200bwidth \u00a0no-break\u3000ideographic\u2028line",
    "tab\x0bvertical\x0cfeed \x1c \x85 control\x07bell",
    f"{BEGIN} typed {END}",
    f"before{END}after",
    "<|STARTOFTEXT|> <|endoftext |>",
    "!" * 100,
    "apple " * 100,
    "supercalifragilisticexpialidocious " * 5,
    "red green blue apple cat dog house on the style",
]


def compiled(folder: Path, kind: str = "CLIPTokenizer", context: int = 77) -> Tokenizer:
    return Tokenizer(compile_tokenizer(folder, kind, context, 10**6)[1])


def refusal(folder: Path, kind: str = "CLIPTokenizer") -> str:
    with pytest.raises(InvalidRequest) as refused:
        compiled(folder, kind)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def odd_prompts(count: int) -> list[str]:
    """Random pieces of texts, of special tokens and of all that Unicode has."""
    draw, prompts = random.Random(7), []
    for _ in range(count):
        parts = [draw.choice(TEXTS)[:: draw.choice((1, 1, -1))][: draw.randrange(40)] for _ in range(draw.randrange(4))]
        odd = (draw.choice((BEGIN, END, "</s>", "<unk>", "<extra_id_0>")), chr(draw.randrange(0xD800)), "\U0001f3fd")
        prompts.append(draw.choice((" ", "", "\t")).join([*parts, *draw.choices(odd, k=draw.randrange(4))]))
    return prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same vocabulary as vocab.json with merges.txt, as tokenizer.json alone, and as both."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(root / "vocabulary")
    CLIPTokenizer.from_pretrained(root / "vocabulary").save_pretrained(root / "both")
    shutil.copy(root / "vocabulary" / "vocab.json", root / "both")
    shutil.copy(root / "vocabulary" / "merges.txt", root / "both")
    shutil.copytree(root / "both", root / "json", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("kind", ["vocabulary", "json", "both"])
def test_ids_equal_those_of_transformers(kind: str, text: str, folders: dict[str, Path]) -> None:
    # What transformers makes of vocab.json and merges.txt is the reference for all: a folder means one tokenizer.
    reference = CLIPTokenizer.from_pretrained(folders["vocabulary"])
    expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
    found = compiled(folders[kind]).encode([text])
    assert found.ids.shape == (1, 77)
    assert found.ids.dtype == np.int32
    assert found.ids[0].tolist() == expected


def test_prompts_are_encoded_each_for_itself(folders: dict[str, Path]) -> None:
    tokenizer = compiled(folders["vocabulary"])
    together = tokenizer.encode(["red apple", "", "blue cat " * 60])
    for row, text in zip(together.ids, ["red apple", "", "blue cat " * 60], strict=True):
        np.testing.assert_array_equal(row, tokenizer.encode([text]).ids[0])


@pytest.mark.parametrize("kind", ["vocabulary", "json"])
def test_text_that_does_not_fit_is_reported(kind: str, folders: dict[str, Path]) -> None:
    words = [("red", "cat", "dog")[index % 3] for index in range(80)]  # one token each
    encoded = compiled(folders[kind]).encode([" ".join(words), " ".join(words[:75]), "red"])
    assert encoded.cut == (" ".join(words[75:]), "", "")


def test_cut_text_keeps_its_own_letters(folders: dict[str, Path]) -> None:
    (cut,) = compiled(folders["vocabulary"]).encode(["red " * 75 + "größe 🍎 日本"]).cut
    assert cut == "größe 🍎 日本"


def test_what_was_cut_off_is_told_but_for_books() -> None:
    assert told_of_cut("x" * 500, 77).endswith(f"cut off: '{'x' * 500}'")
    assert told_of_cut("x" * 500 + "y" * 3000, 77).endswith("x' and 3,000 more characters")


def test_pad_token_is_the_one_the_folder_names(folders: dict[str, Path], tmp_path: Path) -> None:
    """Stable Diffusion 2 pads with `!`, not with the end token."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(folders["vocabulary"], folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        edit_json(folder / name, pad_token="!")
    expected = CLIPTokenizer.from_pretrained(folder)("a cat", padding="max_length", max_length=77).input_ids
    assert compiled(folder).encode(["a cat"]).ids[0].tolist() == expected
    assert expected[-1] == json.loads((folder / "vocab.json").read_text())["!"]


def test_special_tokens_written_as_objects_are_understood(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(folders["vocabulary"], folder)
    written = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    specials = {role: written | {"content": END} for role in ("eos_token", "unk_token")}
    edit_json(folder / "special_tokens_map.json", bos_token=written | {"content": BEGIN}, **specials)
    expected = compiled(folders["vocabulary"]).encode(["a cat"]).ids
    np.testing.assert_array_equal(compiled(folder).encode(["a cat"]).ids, expected)


PLAIN = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}


def _listed(folder: Path) -> None:
    """As transformers before its version 4.34 saved them."""
    words = ("<cat-toy>", "Style", "redapple", "<Moon>", "big dog")
    first = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({word: first + place for place, word in enumerate(words)}))


def _configured(folder: Path) -> None:
    """As its versions from 4.34 to 4.57 saved them."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = {
        vocabulary[BEGIN]: PLAIN | {"content": BEGIN, "special": True, "normalized": True},
        vocabulary[END]: PLAIN | {"content": END, "special": True, "normalized": False},
        len(vocabulary): PLAIN | {"content": "<cat-toy>"},
        len(vocabulary) + 1: PLAIN | {"content": "Style", "normalized": False, "lstrip": True},
        len(vocabulary) + 2: PLAIN | {"content": "<Moon>", "single_word": True, "rstrip": True},
    }
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
    # Which is then not read.
    edit_json(folder / "special_tokens_map.json", pad_token="!")


def _saved(folder: Path) -> None:
    """As its version 5 saves them, and without what it read."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<cat-toy>", "Style", AddedToken("<Moon>", special=True, rstrip=True)])
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)


def _listed_and_saved(folder: Path) -> None:
    """Two that differ: a tokenizer.json holds over vocab.json and merges.txt."""
    pair = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    edit_json(folder / "vocab.json", **{"red</w>": 9999})
    _saved(folder)
    for name, content in pair.items():
        (folder / name).write_bytes(content)


def _special_without_a_role(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", additional_special_tokens=["<Moon>", "<cat-toy>"], mask_token="Style")


def _special_as_objects(folder: Path) -> None:
    """As Stable Diffusion 1.5 has them: matched in lower case, too."""
    written = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    edit_json(
        folder / "special_tokens_map.json", bos_token=written | {"content": BEGIN}, eos_token=written | {"content": END}
    )
    typed = {"__type": "AddedToken"} | written
    edit_json(
        folder / "tokenizer_config.json", bos_token=typed | {"content": BEGIN}, eos_token=typed | {"content": END}
    )


def _special_elsewhere(folder: Path) -> None:
    """special_tokens_map.json holds over tokenizer_config.json."""
    edit_json(folder / "tokenizer_config.json", pad_token="a")
    edit_json(folder / "special_tokens_map.json", pad_token="!")


def _special_unknown(folder: Path) -> None:
    edit_json(folder / "special_tokens_map.json", pad_token="<pad>")


WAYS = [
    _listed,
    _configured,
    _saved,
    _listed_and_saved,
    _special_without_a_role,
    _special_as_objects,
    _special_elsewhere,
    _special_unknown,
]
ADDED = [
    "a <cat-toy> in the house",
    "<cat-toy>, <cat-toy>!a<cat-toy>b <CAT-TOY> <cat- toy>",
    "Style style STYLE Stylehouse a Style of style",
    "redapple red apple REDAPPLE redapples",
    "<Moon> <moon> a<Moon>b <Moon>  house",
    "big dog, Big Dog, big  dog",
    f"{BEGIN} typed {END} <|STARTOFTEXT|> <|EndOfText|>",
    "red",
]


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__.strip("_"))
def test_tokens_that_were_added_are_those_of_transformers(
    change: Callable[[Path], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed_copy(folders["vocabulary"], tmp_path / "tokenizer", change)
    reference, ours = CLIPTokenizer.from_pretrained(folder), compiled(folder)
    for text in [*ADDED, *TEXTS]:
        expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text]).ids[0].tolist() == expected, text


def test_word_of_many_vectors_is_written_as_diffusers_writes_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vocabulary"], tmp_path / "tokenizer")
    words = ["<toy>", "<toy>_1", "<toy>_2", "<sky>", "<sky>_2"]
    first = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({word: first + place for place, word in enumerate(words)}))
    reference, ours = CLIPTokenizer.from_pretrained(folder), compiled(folder)
    for text in ("a <toy> on the house", "<toy><toy>red", "<sky>, no <to>", "<sky> over <toy>"):
        written = TextualInversionLoaderMixin().maybe_convert_prompt(text, reference)
        expected = reference(written, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text]).ids[0].tolist() == expected, text
    assert first + 2 in ours.encode(["a <toy>"]).ids


@pytest.mark.parametrize(
    "broken",
    [{"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"5": "red"}}],
    ids=str,
)
def test_added_tokens_that_cannot_be_read_are_refused(
    broken: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["vocabulary"], tmp_path / "tokenizer")
    edit_json(folder / "tokenizer_config.json", **broken)
    assert str(folder) in refusal(folder)


class TestBroken:
    @pytest.fixture
    def folder(self, folders: dict[str, Path], tmp_path: Path) -> Path:
        return shutil.copytree(folders["vocabulary"], tmp_path / "tokenizer")

    @pytest.fixture
    def whole(self, folders: dict[str, Path], tmp_path: Path) -> Path:
        """One file alone."""
        return shutil.copytree(folders["json"], tmp_path / "tokenizer")

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
    def test_unreadable_file_is_named(self, name: str, folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] if name != "merges.txt" else b"three parts here\n")
        assert str(folder / name) in refusal(folder)

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"{}", b"\xff\xfe\x00", b'{"a":' * 100_000 + b"1" + b"}" * 100_000]
    )
    @pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
    def test_file_without_a_vocabulary_is_named(self, content: bytes, name: str, folder: Path) -> None:
        (folder / name).write_bytes(content)
        assert str(folder / name) in refusal(folder)

    @pytest.mark.parametrize("model", [{}, None, {"type": "BPE", "vocab": {}, "merges": []}], ids=str)
    def test_whole_file_without_a_model_is_named(self, model: Any, whole: Path) -> None:
        edit_json(whole / "tokenizer.json", model=model)
        assert str(whole / "tokenizer.json") in refusal(whole)

    @pytest.mark.parametrize("lines", [0, 1, 7, -1])
    def test_truncated_merges_are_named(self, lines: int, folder: Path) -> None:
        """Any beginning of them is a list of merges, and reads prompts otherwise."""
        merges = folder / "merges.txt"
        merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:lines]))
        said = refusal(folder)
        assert str(merges) in said and "cut off" in said

    def test_truncated_merges_of_a_whole_file_are_named(self, whole: Path) -> None:
        read = json.loads((whole / "tokenizer.json").read_text())
        del read["model"]["merges"][-3:]
        (whole / "tokenizer.json").write_text(json.dumps(read))
        assert str(whole / "tokenizer.json") in refusal(whole)

    @pytest.mark.parametrize("merge", ["x y", "red</w> x", "red on</w>", "a", "a b c"])
    def test_merge_of_or_into_no_token_is_named(self, merge: str, folder: Path) -> None:
        merges = folder / "merges.txt"
        merges.write_text(f"{merges.read_text()}{merge}\n")
        assert str(merges) in refusal(folder)

    def test_words_that_were_added_take_no_merge(self, folder: Path) -> None:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        edit_json(folder / "vocab.json", **{"<toy>": len(vocabulary)})
        assert "'<toy>'" in refusal(folder)
        (folder / "added_tokens.json").write_text(json.dumps({"<toy>": len(vocabulary)}))
        assert len(vocabulary) in compiled(folder).encode(["a <toy>"]).ids

    def test_ids_that_the_text_encoder_does_not_know_are_refused(self, folder: Path) -> None:
        count = len(json.loads((folder / "vocab.json").read_text()))
        compile_tokenizer(folder, "CLIPTokenizer", 77, count)
        with pytest.raises(InvalidRequest, match=f"{folder} has token ids up to {count - 1}.*of {count - 1}"):
            compile_tokenizer(folder, "CLIPTokenizer", 77, count - 1)

    @pytest.mark.parametrize("kind", ["CLIPTextModel", "ByT5Tokenizer", "Nothing"])
    def test_class_that_is_no_such_tokenizer_is_named(self, kind: str, folder: Path) -> None:
        assert kind in refusal(folder, kind)


def test_vocabulary_written_by_hand_may_have_tokens_that_no_merge_makes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As those of transformers' and diffusers' own tiny models."""
    folder = shutil.copytree(folders["vocabulary"], tmp_path / "tokenizer")
    words = ["l", "o", "w", "e", "r", "s", "t", "i", "d", "n", "lo", "l</w>", "w</w>", "r</w>", "t</w>", "low</w>"]
    words += ["er</w>", "lowest</w>", "newer</w>", "wider", "<unk>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\ne r</w>\n")
    edit_json(folder / "tokenizer_config.json", unk_token="<unk>")
    reference, ours = CLIPTokenizer.from_pretrained(folder), compiled(folder)
    for text in ("lower newer", "a cat", "wider low", ""):
        expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text]).ids[0].tolist() == expected, text


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as sentencepiece makes them, in `tokenizer.json`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -6.0) for letter in string.printable if letter.strip()]
    folder = tmp_path_factory.mktemp("t5")
    T5Tokenizer(vocab=pieces, model_max_length=40).save_pretrained(folder)
    return folder


class TestT5:
    def test_ids_and_mask_equal_those_of_transformers(self, t5: Path) -> None:
        reference, ours = T5Tokenizer.from_pretrained(t5), compiled(t5, "T5TokenizerFast", 40)
        for text in [*TEXTS, *odd_prompts(500)]:
            expected, found = reference(text, padding="max_length", max_length=40, truncation=True), ours.encode([text])
            assert found.ids[0].tolist() == expected.input_ids, text
            assert found.mask[0].tolist() == expected.attention_mask, text

    def test_text_that_does_not_fit_is_reported(self, t5: Path) -> None:
        encoded = compiled(t5, "T5Tokenizer", 40).encode(["red " * 39 + " Größe, cat", "red " * 39])
        assert encoded.cut == ("Größe, cat", "")

    def test_package_that_reading_sentencepiece_takes_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "spiece.model").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        said = refusal(tmp_path, "T5Tokenizer")
        assert str(tmp_path / "spiece.model") in said and "sentencepiece" in said

    def test_sentencepiece_is_read_as_transformers_reads_it(self, tmp_path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        lines = [" ".join(random.Random(line).choices(WORDS, k=8)) for line in range(200)]
        special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(tmp_path / "spiece"),
            vocab_size=60,
            hard_vocab_limit=False,
            **special,
        )
        reference, ours = T5Tokenizer.from_pretrained(tmp_path), compiled(tmp_path, "T5Tokenizer", 40)
        for text in [*TEXTS, *odd_prompts(500)]:
            expected = reference(text, padding="max_length", max_length=40, truncation=True).input_ids
            assert ours.encode([text]).ids[0].tolist() == expected, text


EMBEDDED_TOKENIZERS = sorted(EMBEDDED.glob("*/tokenizer*"))


@pytest.mark.parametrize("folder", EMBEDDED_TOKENIZERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_tokenizers_of_the_embedded_models_equal_transformers(folder: Path) -> None:
    reference, ours = CLIPTokenizer.from_pretrained(folder), compiled(folder)
    for text in [*TEXTS, *odd_prompts(2000)]:
        expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text]).ids[0].tolist() == expected, text
