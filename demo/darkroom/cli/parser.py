"""How words become flags, and how those that do not are refused."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from darkroom.errors import InvalidRequest, near_matches

DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
"""What web pages and word processors make of the hyphens before a flag, and the hyphen."""

TOKEN_FLAG = "--hf-token"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""What tokens of the hub look like."""

PAGE = re.compile(
    r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve)/[^/]+/(?P<file>[^?#]+))?(?:[/?#].*)?$|https?:/+.*|(?:www\.)?civitai\.com/.*"
)
"""The address of a model's page, or of a file on it."""

LONGEST_REPEATED = 24
"""Characters of what is no flag, at most, that a refusal repeats: tokens are longer, and flags are not."""


class Parser(argparse.ArgumentParser):
    """Raises its complaints as `InvalidRequest`, with near matches for a flag that does not exist.

    They repeat no value that may be a token; and what is meant for a flag is taken for no text, which is kept.
    """

    _command: str | None = None
    """Which of its commands was given, if it has any."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_args(self._checked(args), namespace)

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_intermixed_args(self._checked(args), namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split()
            flag = next((word for word in words if word.startswith("-")), None)
            message = self._no_flag(repr(" ".join(words)) if flag is None else flag)
        flag, ignored, _ = message.removeprefix("argument ").partition(": ignored explicit argument")
        if ignored:  # which is not repeated: it may be a token, as in -hf-token=...
            message = f"{flag} takes no value."
        raise InvalidRequest(f"{message}{'' if message[-1] in '.?' else '.'} See --help.")

    def _checked(self, arguments: Sequence[str] | None) -> list[str]:
        """The words, or those of the command line. Refuses what is meant for a flag and would be taken for a text."""
        words = sys.argv[1:] if arguments is None else list(arguments)
        commands = self._commands()
        # Behind a flag that is no flag here, its value would be taken for a command.
        if commands and words and words[0].startswith("-") and words[0] not in self._option_string_actions:
            self.error(f"the command comes before its flags: {', '.join(commands)}")
        self._command = words[0] if words and words[0] in commands else None
        flags = {TOKEN_FLAG, *self._flags()}
        for word in words[: words.index("--") if "--" in words else len(words)]:
            dashes, flag, behind = _taken_apart(word)
            if flag != "--" and dashes.strip("-") and (behind[:1] in ("", "=") or flag in flags):
                near = f" Write {flag}." if flag in flags else near_matches(flag[:LONGEST_REPEATED], sorted(flags))
                self.error(
                    f"a flag begins with hyphens, not with {dashes!r}.{near} A text that begins so goes behind --"
                )
            if dashes and flag in flags and behind[:1].isspace():
                self.error(f"{flag} and its value are two words: leave out the quotes around both")
        return words

    def _no_flag(self, word: str) -> str:
        """The refusal of one that does not exist. What may be glued to it is not repeated."""
        dashes, flag, _ = _taken_apart(word)
        if others := [name for name, other in self._commands().items() if flag in other._flags()]:
            return f"{flag} is a flag of {' and '.join(repr(name) for name in others)}, not of {self._command!r}."
        flags = [each for each in self._flags() if each.startswith("--")]
        shown = word.split("=")[0]
        if glued := [each for each in (*flags, TOKEN_FLAG) if flag.startswith(each) and flag != each]:
            shown = f"{max(glued, key=len)}..."
        elif dashes and flag != TOKEN_FLAG and (len(shown) > LONGEST_REPEATED or "tok" in flag):
            shown = "what is not repeated here, for it may hold a token,"
        return f"{shown} is not a flag of this script.{near_matches(flag[:LONGEST_REPEATED], flags)}"

    def _flags(self) -> Iterator[str]:
        """Its own flags, and those of the command that was given; of each, where none was."""
        for action in self._actions:
            yield from action.option_strings
        for name, command in self._commands().items():
            if self._command in (None, name):
                yield from command._flags()

    def _commands(self) -> dict[str, "Parser"]:
        """The parsers of its commands, by name."""
        return next((each.choices for each in self._actions if isinstance(each, argparse._SubParsersAction)), {})


def _taken_apart(word: str) -> tuple[str, str, str]:
    """The dashes that a word begins with, the name behind them as a flag would be spelled, and what follows that."""
    bare = word.lstrip(DASHES)
    name = re.split(r"[\s=]", bare, maxsplit=1)[0]
    return word[: len(word) - len(bare)], f"--{name.replace('_', '-').lower()}", bare[len(name) :]


def named(text: str) -> str:
    """For argparse: the name of a file, a folder or a model. No file has an empty one: nor does it mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name what is meant, or leave the flag out")
    if found := PAGE.match(text):
        raise argparse.ArgumentTypeError(f"{text} is the address of a page: {_instead(found)}")
    return text


def _instead(page: re.Match[str]) -> str:
    """What to type in the place of a page's address."""
    repository, file = page["repository"], page["file"]
    if repository and file:
        name = file.rpartition("/")[2]
        return f"fetch {name} from there and pass its path, or pass the whole repository {repository}"
    return f"pass {repository}" if repository else "fetch the file from there, and pass its path"
