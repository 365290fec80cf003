"""The two ways a run can end badly for reasons its user can understand."""


class DarkroomError(Exception):
    """A failure with a one-line message for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class AskedWrongly(DarkroomError):
    """What was asked cannot be done: the message says what is wrong, the value seen, and what to do."""

    exit_code = 2


class Failed(DarkroomError):
    """What was asked is fine, but it could not be done here and now."""

    exit_code = 1


def near_matches(word: str, choices: list[str]) -> str:
    """` Did you mean 'Euler' or 'EulerA'?`, or nothing when no choice is near."""
    import difflib

    folded = {choice.lower(): choice for choice in choices}
    near = [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
