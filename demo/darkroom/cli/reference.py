"""The flags as a Markdown table, for the README: `python -m darkroom.cli.reference` from demo/."""

import argparse

from darkroom.catalog import TXT2IMG
from darkroom.cli.flags import txt2img_parser

BEGIN = "<!-- flags: written by darkroom.cli.reference -->"
END = "<!-- end of flags -->"


def flags_table() -> str:
    """One row a flag, in the parser's order, under the headings of its groups."""
    parser = txt2img_parser(TXT2IMG.program, list(TXT2IMG.versions))
    lines = ["| flag | what it does |", "| --- | --- |"]
    for group in parser._action_groups:
        for action in group._group_actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(f"| {_name(action)} | {action.help} |")
    return "\n".join(lines)


def _name(action: argparse.Action) -> str:
    name = " ".join(action.option_strings) or action.metavar
    value = f" {action.metavar}" if action.option_strings and action.nargs != 0 else ""
    return f"`{name}{value}`"


if __name__ == "__main__":
    print(flags_table())
