"""The flags as a Markdown table, for docs/flags.md: `python -m darkroom.cli.reference` from demo/."""

import argparse
from collections.abc import Iterator

from darkroom.checkpoint.catalog import SCRIPTS, TXT2IMG, Script
from darkroom.cli.flags import parser_of

BEGIN = "<!-- flags: written by darkroom.cli.reference -->"
END = "<!-- end of flags -->"


def flags_table() -> str:
    """One row a flag, in the parser's order; then what only some of the other scripts have."""
    lines = ["| flag | what it does |", "| --- | --- |"]
    common = {_name(action): action.help for action in _actions(TXT2IMG)}
    lines += [f"| {name} | {text} |" for name, text in common.items()]
    own: dict[tuple[str, str], list[str]] = {}
    for script in SCRIPTS.values():
        for action in _actions(script):
            if _name(action) not in common:
                own.setdefault((_name(action), str(action.help)), []).append(f"`{script.program}`")
    lines += [f"| {name} | {' and '.join(having)} alone: {text} |" for (name, text), having in own.items()]
    return "\n".join(lines)


def _actions(script: Script) -> Iterator[argparse.Action]:
    for group in parser_of(script)._action_groups:
        yield from (action for action in group._group_actions if not isinstance(action, argparse._HelpAction))


def _name(action: argparse.Action) -> str:
    name = " ".join(action.option_strings) or action.metavar
    metavar = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    value = f" {metavar}" if action.option_strings and action.nargs != 0 else ""
    return f"`{name}{value}`"


if __name__ == "__main__":
    print(flags_table())
