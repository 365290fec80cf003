"""Parsers from the declared flags: those of the scripts that make pictures, and what tools have of them."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from darkroom.checkpoint.catalog import Script
from darkroom.cli.parser import TOKEN, TOKEN_FLAG, Parser, named
from darkroom.engines import RUNTIMES
from darkroom.errors import InvalidRequest
from darkroom.flags import FLAGS, GROUPS, OF_ROW, PATHS, SLOTS, Flag, option

WORKERS = "; with --prompts: a process for each, cpu (several share the cores) or the number of a GPU"
WORDS = {
    "engines": ", ".join(RUNTIMES),
    "fields": ", ".join(name for name in OF_ROW if name != "prompt"),
    "size": "the model's own",
    "seed": "drawn and printed",
    "of_prompts": "",
    "workers": "",
    "warmup_runs": "0",
}
"""The words in the help of flags that depend on the script, unless it has its own."""


def parsed(script: Script, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a script. All that stands behind `--` is a prompt, though it may begin with a dash."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser_of(script).parse_intermixed_args(arguments[:end])
    flags.prompt += arguments[end + 1 :]
    if given(flags, "bf16") and flags.precision not in (None, "bf16"):
        raise InvalidRequest(f"--bf16 is --precision bf16, not {flags.precision}: leave one of them out.")
    if any(TOKEN.search(prompt) for prompt in flags.prompt):
        raise InvalidRequest(f"a prompt, which is kept, holds what looks like a token: that goes behind {TOKEN_FLAG}.")
    return flags


def parser_of(script: Script) -> Parser:
    """Every flag of a script that makes pictures. One that is left out is None, or False where it takes no value."""
    versions = list(script.versions)
    words = {"versions": ", ".join(versions), "version": versions[0], "strength": f"{script.strength:g}"}
    if script.refiner:
        words |= {"version": f"{versions[0]}, with --enable-refiner {script.real}", "refiner": script.refiner.source}
    if script.few_steps:
        words["version"] = f"{versions[0]}, with --lcm-lora {script.of_many_steps}"
    if script.from_image:
        words["size"] = "the input image's own"
    else:
        words |= {"of_prompts": f", with --prompts {SLOTS}", "workers": WORKERS}
    parser = Parser(
        prog=script.program,
        allow_abbrev=False,
        description="Makes pictures from prompts, through engines compiled for this machine.",
    )
    add_flags(parser, *script.kinds, **words)
    return parser


def add_flags(parser: argparse.ArgumentParser, *kinds: str, **words: str) -> None:
    """Adds the declared flags of a script of these kinds, or of a command, group by group. `words` are those of its own
    in their help."""
    for title, flags in GROUPS.items():
        own = [flag for flag in flags if not set(kinds).isdisjoint((*flag.scripts, *flag.also, *flag.lists))]
        if not own:
            continue
        group = parser.add_argument_group(title)
        exclusive = any(flag.exclusive and set(kinds).isdisjoint(flag.lists) for flag in own)
        rivals = group.add_mutually_exclusive_group() if exclusive else group
        for flag in own:
            _add(rivals if flag.exclusive else group, flag, not set(kinds).isdisjoint(flag.lists), WORDS | words)


def _add(group: Any, flag: Flag, listed: bool, words: dict[str, str]) -> None:
    for choice, text in zip(flag.choices, flag.switches, strict=False):
        action = "append_const" if listed else "store_const"
        group.add_argument(f"{option(flag.name)}-{choice}", dest=flag.name, action=action, const=choice, help=text)
    if flag.switches:
        return
    text = flag.help.format(**words)
    if flag.kind is bool:
        group.add_argument(option(flag.name), action="store_true", help=text)
        return
    facts: dict[str, Any] = {"metavar": flag.metavar, "help": text}
    facts["type"] = named if flag.metavar in PATHS else flag.kind
    if flag.name == "prompt":
        group.add_argument("prompt", nargs="*", metavar=flag.metavar, help=text)
        return
    if isinstance(flag.metavar, tuple):
        facts["nargs"] = len(flag.metavar)
    elif flag.together or listed:
        facts |= {"nargs": "+", "action": "extend"} if flag.together else {"nargs": "+"}
    group.add_argument(option(flag.name), **facts)


def given(flags: argparse.Namespace, name: str) -> bool:
    """Whether a flag was passed."""
    value = getattr(flags, name, None)
    return value is not None and value is not False  # 0 was


def refuse_without(flags: argparse.Namespace, needed: str) -> None:
    """Raises `InvalidRequest` for flags that have no effect without one that was not passed."""
    for flag in FLAGS:
        if flag.needs == needed and given(flags, flag.name):
            raise InvalidRequest(f"{option(flag.name)} has no effect without {option(needed)}.")


def refuse_wrong(flags: argparse.Namespace, *names: str) -> None:
    """Raises `InvalidRequest` for flags whose values, or any in their lists, are none that they take."""
    for flag in FLAGS:
        values = getattr(flags, flag.name, None) if flag.name in names else None
        for value in values if isinstance(values, list) else [values]:
            if value is not None and (wrong := flag.wrong(value)):
                raise InvalidRequest(f"{option(flag.name)} {wrong}")


def refuse_below(flags: argparse.Namespace, **least: float) -> None:
    """Raises `InvalidRequest` for flags with values, or lists of them, that are less than what is given for each."""
    for name, bound in least.items():
        values = getattr(flags, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value >= bound:
                raise InvalidRequest(f"{option(name)} must be {bound} or more, not {value}.")
