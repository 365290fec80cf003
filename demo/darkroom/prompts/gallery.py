"""The pictures of a long run as web pages beside them: they need nothing but the pictures, and grow while it runs."""

import contextlib
import html
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from darkroom.errors import Failed
from darkroom.prompts.journal import Journal, Record

INDEX, PAGES = "index.html", "index-*.html"
PICTURES_A_PAGE = 1000
SECONDS_BETWEEN_LOOKS = 5
"""How often an open page loads its next version while the run goes on."""

STYLE = """
:root { color-scheme: light dark; --paper: #fafafa; --card: #fff; --ink: #1c1c1e; --faint: #6b6b70; --line: #dcdce0;
        --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141416; --card: #1f1f22; --ink: #ececef; --faint: #9a9aa2; --line: #36363b; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1600px; padding: 1.5rem; background: var(--paper); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p, nav { margin: .25rem 0; color: var(--faint); }
a { color: inherit; }
.bad { color: var(--bad); }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; margin-top: 1.25rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
         content-visibility: auto; contain-intrinsic-size: auto 320px; }
figure.failed { border-style: dashed; }
img { display: block; width: 100%; height: auto; background: var(--line); }
figcaption { padding: .6rem .75rem .75rem; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
               overflow: hidden; white-space: pre-line; }
small { display: block; margin-top: .3rem; color: var(--faint); }
"""


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
            _replace(self._folder / _name(page), self._page(page, failures, running))
        self._changed = set()
        self._growing = self._growing | changed if running else set()

    def _page(self, page: int, failures: Mapping[int, Failure], running: bool) -> Iterator[str]:
        images = range(page * PICTURES_A_PAGE + 1, min(self._images, (page + 1) * PICTURES_A_PAGE) + 1)
        missing = [image for image in images if image not in self._journal and image not in failures]
        title = _text(self._title) + (f", {images[0]}–{images[-1]}" if self._pages > 1 else "")
        yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        if running:
            yield f'<meta http-equiv="refresh" content="{SECONDS_BETWEEN_LOOKS}">\n'
        yield f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        yield f"<p>{_text(self._about)}</p>\n"
        if page == 0:
            yield f"<p>{self._state(len(failures), running)}</p>\n"
        if missing:
            lines = _ranges([self._line_of(image) for image in missing])
            yield f"<p>{'To come' if running else 'Missing'}: {lines}.</p>\n"
        if self._pages > 1:
            links = (f'<a href="{_name(other)}">{other + 1}</a>' for other in range(self._pages))
            yield f"<nav>Pages: {' '.join(links)}</nav>\n"
        yield "<main>\n"
        for image in images:
            if image in failures:
                yield _failed(image, failures[image])
            elif image in self._journal:
                yield _figure(self._journal.record(image))
        yield "</main>\n</body>\n</html>\n"

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
    address, prompt = _text(quote(record.file)), _text(record.prompt)
    facts = [
        f"seed {record.seed}",
        f"{record.steps} steps",
        f"guidance {record.guidance_scale:g}",
        _text(record.scheduler),
        f"{record.width} × {record.height}",
    ]
    if record.own_milliseconds is not None:
        facts.append(f"{record.own_milliseconds / 1000:.2f} s")
    without = f"<small>without: {_text(record.negative_prompt)}</small>" if record.negative_prompt else ""
    return (
        f'<figure id="image-{record.image}"><a href="{address}"><img src="{address}" alt="{prompt}" loading="lazy" '
        f'decoding="async" width="{record.width}" height="{record.height}"></a>'
        f"<figcaption><b>{prompt}</b>{without}<small>{' · '.join(facts)}</small>"
        f"<small>image {record.image}, line {record.line}</small></figcaption></figure>\n"
    )


def _failed(image: int, failure: Failure) -> str:
    return (
        f'<figure class="failed" id="image-{image}"><figcaption><b>{_text(failure.prompt)}</b>'
        f'<small class="bad">{_text(failure.reason)}</small><small>image {image}, line {failure.line}</small>'
        f"</figcaption></figure>\n"
    )


def _name(page: int) -> str:
    return INDEX if page == 0 else f"index-{page + 1}.html"


def _text(text: str) -> str:
    return html.escape(text)


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


def _replace(path: Path, parts: Iterator[str]) -> None:
    """Writes a file aside, and puts it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # What a file system calls a name may be no text.
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(parts)
        temporary.replace(path)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
