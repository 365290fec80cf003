"""The pictures of a long run as web pages beside them: they need nothing but the pictures, and grow while it runs."""

import contextlib
import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import quote

from darkroom.files import write_whole
from darkroom.prompts.journal import Journal, Record

INDEX, PAGES = "index.html", "index-*.html"
PICTURES_A_PAGE = 1000
SECONDS_BETWEEN_LOOKS = 5
"""How often an open page loads its next version while the run goes on."""

TEMPLATE = Path(__file__).with_name("gallery.html")


@dataclass(frozen=True)
class Failure:
    """An image that was not made, and why."""

    line: int
    prompt: str
    reason: str


class Gallery:
    """Pages in `folder` of `images` pictures, those in `journal`; `line_of` an image is its line in the file.

    Each page is written whole and put in place at once; only those on which something has changed are.
    """

    def __init__(
        self, folder: Path, title: str, about: str, images: int, journal: Journal, line_of: Callable[[int], int]
    ) -> None:
        self._folder = folder
        self._title = title
        self._about = about
        self._images = images
        self._journal = journal
        self._line_of = line_of
        self._template = Template(TEMPLATE.read_text(encoding="utf-8"))
        self._pages = -(-images // PICTURES_A_PAGE)
        for stale in set(folder.glob(PAGES)) - {folder / _name(page) for page in range(self._pages)}:
            with contextlib.suppress(OSError):
                stale.unlink()
        self._changed = set(range(self._pages))
        self._growing: set[int] = set()
        """Those that were last written as parts of a run that goes on."""

    @property
    def index(self) -> Path:
        return self._folder / INDEX

    def change(self, image: int) -> None:
        """Something has become of an image."""
        self._changed |= {0, (image - 1) // PICTURES_A_PAGE}

    def write(self, failures: Mapping[int, Failure], running: bool) -> None:
        """Writes what has changed, with the `failures` by their images. Raises `Failed` where that cannot be."""
        changed = self._changed if running else self._changed | self._growing
        for page in sorted(changed):
            # What a file system calls a name may be no text.
            write_whole(self._folder / _name(page), self._page(page, failures, running).encode(errors="replace"))
        self._changed = set()
        self._growing = self._growing | changed if running else set()

    def _page(self, page: int, failures: Mapping[int, Failure], running: bool) -> str:
        images = range(page * PICTURES_A_PAGE + 1, min(self._images, (page + 1) * PICTURES_A_PAGE) + 1)
        missing = [image for image in images if image not in self._journal and image not in failures]
        paragraphs = [html.escape(self._about)]
        if page == 0:
            paragraphs.append(self._state(len(failures), running))
        if missing:
            lines = _ranges([self._line_of(image) for image in missing])
            paragraphs.append(f"{'To come' if running else 'Missing'}: {lines}.")
        if self._pages > 1:
            links = (f'<a href="{_name(other)}">{other + 1}</a>' for other in range(self._pages))
            paragraphs.append(f"Pages: {' '.join(links)}")
        figures = (
            _failed(image, failures[image]) if image in failures else _figure(self._journal.record(image))
            for image in images
            if image in failures or image in self._journal
        )
        return self._template.substitute(
            refresh=f'<meta http-equiv="refresh" content="{SECONDS_BETWEEN_LOOKS}">\n' if running else "",
            title=html.escape(self._title) + (f", {images[0]}–{images[-1]}" if self._pages > 1 else ""),
            paragraphs="\n".join(f"<p>{each}</p>" for each in paragraphs),
            figures="".join(figures),
        )

    def _state(self, failed: int, running: bool) -> str:
        there = len(self._journal)
        missing = self._images - there - failed
        are = "is" if missing == 1 else "are"
        words = [f"{there} of {self._images} pictures are here"]
        if failed:
            words.append(f'<span class="bad">{failed} could not be made</span>')
        if missing:
            words.append(f"{missing} {are} " + ("to come" if running else "missing: the same command goes on"))
        return "; ".join(words) + "."


def _figure(record: Record) -> str:
    address, prompt = html.escape(quote(record.file)), html.escape(record.prompt)
    facts = [
        f"seed {record.seed}",
        f"{record.steps} steps",
        f"guidance {record.guidance_scale:g}",
        html.escape(record.scheduler),
        f"{record.width} × {record.height}",
    ]
    if record.own_milliseconds is not None:
        facts.append(f"{record.own_milliseconds / 1000:.2f} s")
    without = f"<small>without: {html.escape(record.negative_prompt)}</small>" if record.negative_prompt else ""
    return (
        f'<figure id="image-{record.image}"><a href="{address}"><img src="{address}" alt="{prompt}" loading="lazy" '
        f'decoding="async" width="{record.width}" height="{record.height}"></a>'
        f"<figcaption><b>{prompt}</b>{without}<small>{' · '.join(facts)}</small>"
        f"<small>image {record.image}, line {record.line}</small></figcaption></figure>\n"
    )


def _failed(image: int, failure: Failure) -> str:
    return (
        f'<figure class="failed" id="image-{image}"><figcaption><b>{html.escape(failure.prompt)}</b>'
        f'<small class="bad">{html.escape(failure.reason)}</small><small>image {image}, line {failure.line}</small>'
        f"</figcaption></figure>\n"
    )


def _name(page: int) -> str:
    return INDEX if page == 0 else f"index-{page + 1}.html"


def _ranges(lines: list[int]) -> str:
    """`lines 3, 5–9`."""
    ranges: list[list[int]] = []
    for line in dict.fromkeys(lines):
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    words = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges)
    return f"line{'s' if len(ranges) > 1 or ranges[0][0] < ranges[0][1] else ''} {words}"
