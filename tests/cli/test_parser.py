"""Words that are nearly flags: they are refused, and what they may hold is neither shown nor kept."""

import argparse
from collections.abc import Iterator

import pytest

from darkroom.checkpoint.catalog import SCRIPTS, TXT2IMG
from darkroom.cli import benchmark, client, prebuild, serve, triton_repository
from darkroom.cli.flags import parsed, parser_of
from darkroom.errors import InvalidRequest

SECRET = "hf_VerySecretToken0123456789"
DASHES = ["—", "–", "−−", "-–", "――"]  # em, en, minus, mixed, horizontal bar


def refusal(*words: str) -> str:
    with pytest.raises(InvalidRequest) as error:
        parsed(TXT2IMG, ["a red apple", *words])
    return str(error.value)


@pytest.mark.parametrize("value", [SECRET, "secret", "SECRET="], ids=["token", "lower", "padded"])
@pytest.mark.parametrize(
    "form",
    ["--hf-token{}", "--hf_token{}", "--hf_token={}", "--hf-toke={}", "--hf-toke{}", "--hftoken{}", "--token{}"]
    + ["--HF-TOKEN{}", "-hf-token{}", "-hf-token={}", "--hf-token {}"]
    + [f"{dashes}{name}" for dashes in DASHES for name in ("hf-token={}", "hf_token {}", "hf-toke={}", "hf-token{}")],
)
def test_token_is_not_shown_however_its_flag_is_written(form: str, value: str) -> None:
    said = refusal(form.format(value))
    assert value.lower() not in said.lower() and "secret" not in said.lower()


@pytest.mark.parametrize("dashes", DASHES)
@pytest.mark.parametrize(
    ("name", "meant"), [("hf-token", "--hf-token"), ("hf_token", "--hf-token"), ("seed", "--seed")]
)
def test_long_dash_before_a_flag_is_refused_with_the_right_spelling(dashes: str, name: str, meant: str) -> None:
    for words in ([f"{dashes}{name}=3"], [f"{dashes}{name}", "3"], ["--lora-path", "x", f"{dashes}{name}", "3"]):
        said = refusal(*words)
        assert f"Write {meant}." in said and repr(dashes) in said


@pytest.mark.parametrize("words", [["—", "hf-token", SECRET], ["--hf-token=", SECRET], ["--hf-token", "=", SECRET]])
def test_token_is_no_prompt(words: list[str]) -> None:
    said = refusal(*words)
    assert "--hf-token" in said and SECRET not in said


@pytest.mark.parametrize("prompt", ["— a red apple", "— seed", "—a tree, in mist", "-sunset over sea", "a — b"])
def test_prompt_may_begin_with_a_dash_that_no_flag_stands_behind(prompt: str) -> None:
    assert parsed(TXT2IMG, [prompt]).prompt == [prompt]


@pytest.mark.parametrize("prompt", ["—seed", "—hf-token=x", "--hf-token x"])
def test_whatever_stands_behind_two_hyphens_is_a_prompt(prompt: str) -> None:
    assert parsed(TXT2IMG, ["--seed=3", "--", prompt]).prompt == [prompt]


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-token", SECRET, "build"],
        [f"--hf-token={SECRET}", "build"],
        ["build", "—hf-token", SECRET],
        ["build", "--engine", f"—hf-token={SECRET}"],
        ["list", f"--hf-token{SECRET}"],
    ],
)
def test_token_is_not_shown_where_commands_are_expected(words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as error:
        prebuild.parser().parse_args(words)
    assert SECRET not in str(error.value)


def test_value_glued_to_a_flag_is_told_from_a_mistyped_flag() -> None:
    assert refusal("--seed3").startswith("--seed... is not a flag of this script. Did you mean '--seed'")
    assert refusal("--sead=3").startswith("--sead is not a flag of this script. Did you mean '--seed'")


def naming(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The flags that name a folder or a model, with the parser that has them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from naming(command)
        elif action.option_strings and action.metavar in ("DIR", "PATH_OR_REPO", "FILE_OR_REPO"):
            yield parser, action.option_strings[0]


def test_empty_name_of_a_folder_or_model_is_refused_by_its_flag() -> None:
    parsers = [parser_of(script) for script in SCRIPTS.values()]
    parsers += [each.parser() for each in (benchmark, client, prebuild, serve, triton_repository)]
    flags = [found for parser in parsers for found in naming(parser)]
    assert {"--output-dir", "--engine-dir", "--onnx-dir", "--framework-model-dir", "--model"} <= {
        name for _, name in flags
    }
    for parser, flag in flags:
        with pytest.raises(InvalidRequest, match=f"{flag}: it is empty"):
            parser.parse_args([flag, ""])


def test_flag_of_another_command_is_said_to_be_that() -> None:
    with pytest.raises(InvalidRequest, match=r"^--batch-size is a flag of 'build', not of 'list'"):
        prebuild.parser().parse_args(["list", "--batch-size", "1"])
    with pytest.raises(InvalidRequest) as error:
        prebuild.parser().parse_args(["list", "--batch-sise", "1"])
    assert "--batch-size" not in str(error.value)
    with pytest.raises(InvalidRequest, match=r"--batch-sise is .* Did you mean '--batch-size'"):
        prebuild.parser().parse_args(["build", "--batch-sise", "1"])
