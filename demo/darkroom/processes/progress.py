"""What long jobs report of their progress; what shows it is decided elsewhere."""

from collections.abc import Callable


class Line:
    """A line of progress: it advances by one when it is called, and says which phase a job is in. Silent by default."""

    def __init__(
        self, advance: Callable[[], None] = lambda: None, show: Callable[[str], None] = lambda text: None
    ) -> None:
        self._advance = advance
        self._show = show

    def __call__(self) -> None:
        self._advance()

    def phase(self, name: str, done: int, total: int) -> None:
        """What is being done, how many of its steps are, and how many there are; 0 where that is unknown."""
        bar = f" {'━' * (20 * done // total):<20} {100 * done // total} %" if total else ""
        self.show(f"{name.lower()}{bar}")

    def show(self, text: str) -> None:
        """What is being done, in a few words."""
        self._show(text)
