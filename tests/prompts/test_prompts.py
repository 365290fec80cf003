"""What a file of prompts asks for, what is written down of a run, the gallery, and workers that share one queue."""

import html.parser
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.errors import Failed, InvalidRequest
from darkroom.pipeline.pictures import find, save
from darkroom.prompts.gallery import PICTURES_A_PAGE, Failure, Gallery
from darkroom.prompts.journal import ROWS, Journal, Past, Record
from darkroom.prompts.rows import MOST_IMAGES, Prompts
from darkroom.request import Request
from darkroom.serving.batching import Counts
from darkroom.serving.workers import (
    HELD_PER_SLOT,
    Crew,
    Gone,
    Kept,
    NotMade,
    Orders,
    Process,
    Ready,
    Task,
    Tell,
    on_devices,
    on_its_share,
)
from tests.prompts.late_worker import PICTURES, finish_late, report_nonsense
from tests.support import SOON, until

DEFAULT = Request(
    model=None,
    prompts=("a picture",),
    negative_prompt=None,
    batch_size=1,
    batch_count=1,
    height=64,
    width=64,
    denoising_steps=20,
    guidance_scale=7.5,
    clip_skip=0,
    scheduler=None,
    seed=100,
    engine="openvino",
    precision="fp32",
    build="static-batch",
    onnx_opset=17,
)


class TestReading:
    """Lines become requests; what is wrong is refused with its line."""

    def test_a_line_of_text_is_a_prompt_and_blank_ones_are_skipped(self, tmp_path: Path) -> None:
        asked = list(read(tmp_path, "\ufeffa red apple\r\n\n   \n  the blue cat  \n").asked(DEFAULT))
        assert [(each.line, each.request.prompts[0]) for each in asked] == [(1, "a red apple"), (4, "the blue cat")]

    @pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
    def test_lines_end_as_any_system_ends_them(self, ending: str, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text(ending.join(["a red apple", "", "the blue cat", ""]), newline="")
        asked = list(Prompts(tmp_path / "prompts.txt").asked(DEFAULT))
        assert [(each.line, each.request.prompts[0]) for each in asked] == [(1, "a red apple"), (3, "the blue cat")]

    def test_a_row_says_what_the_flags_do_not(self, tmp_path: Path) -> None:
        row = {"prompt": "a", "negative_prompt": "b", "seed": 7, "steps": 3, "guidance_scale": 2, "scheduler": "DDIM"}
        (asked,) = read(tmp_path, row | {"height": 72, "width": 80}).asked(DEFAULT)
        assert asked.request == replace(
            DEFAULT,
            prompts=("a",),
            negative_prompt="b",
            seed=7,
            denoising_steps=3,
            guidance_scale=2.0,
            scheduler="DDIM",
            height=72,
            width=80,
        )
        assert isinstance(asked.request.guidance_scale, float)

    def test_a_row_that_says_nothing_gets_what_the_flags_say(self, tmp_path: Path) -> None:
        default = replace(DEFAULT, negative_prompt="rain", scheduler="Euler")
        for row in ({"prompt": "a", "steps": None, "scheduler": None}, "a"):
            (asked,) = read(tmp_path, row).asked(default)
            assert asked.request == replace(default, prompts=("a",))

    def test_a_default_negative_prompt_goes_where_there_is_guidance(self, tmp_path: Path) -> None:
        rows = read(tmp_path, {"prompt": "a", "guidance_scale": 1}, "b").asked(replace(DEFAULT, negative_prompt="rain"))
        assert [each.request.negative_prompt for each in rows] == [None, "rain"]

    def test_image_k_of_the_file_has_the_seed_s_plus_k_unless_its_row_names_one(self, tmp_path: Path) -> None:
        rows = ["a", {"prompt": "b", "num_images": 2}, {"prompt": "c", "seed": 7, "num_images": 3}, "d"]
        asked = list(read(tmp_path, *rows).asked(DEFAULT))
        assert [each.request.seed for each in asked] == [100, 101, 102, 7, 8, 9, 106]
        assert [each.number for each in asked] == [1, 2, 3, 4, 5, 6, 7]
        assert [each.line for each in asked] == [1, 2, 2, 3, 3, 3, 4]

    def test_line_of_an_image_is_known_without_reading(self, tmp_path: Path) -> None:
        prompts = read(tmp_path, "a", {"prompt": "b", "num_images": 3}, "c")
        assert prompts.images == 5
        assert [prompts.line_of(image) for image in range(1, 6)] == [1, 2, 2, 2, 3]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("{", "no JSON"),
            ("[1]", "no JSON object"),
            ("7", "no JSON object"),
            ("null", "no JSON object"),
            ("[" * 100_000, "no JSON"),
            ("{}", "prompt is empty"),
            ('{"prompt": ""}', "prompt is empty"),
            ('{"prompt": 7}', "prompt must be a text, not 7"),
            ('{"prompt": "a", "promt": "b"}', "'prompt'"),
            ('{"prompt": "a", "prompt": "b"}', "'prompt' is set more than once"),
            ('{"prompt": "a", "steps": "3"}', "steps must be a whole number"),
            ('{"prompt": "a", "steps": 2.5}', "steps must be a whole number"),
            ('{"prompt": "a", "steps": true}', "steps must be a whole number"),
            ('{"prompt": "a", "steps": 0}', "steps must be 1 or more"),
            ('{"prompt": "a", "height": 65}', "height must be a multiple of 8"),
            ('{"prompt": "a", "width": -64}', "width must be a multiple of 8"),
            ('{"prompt": "a", "scheduler": "EulerB"}', "'EulerA'"),
            ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale must be a number"),
            ('{"prompt": "a", "guidance_scale": 1e39}', "guidance_scale must be a number from 0 to 3.4e+38"),
            ('{"prompt": "a", "guidance_scale": 1' + "0" * 400 + "}", "guidance_scale must be a number"),
            ('{"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}', "negative_prompt"),
            ('{"prompt": "a", "seed": -1}', "seed"),
            ('{"prompt": "a", "seed": 18446744073709551615, "num_images": 2}', "seed"),
            ('{"prompt": "a", "num_images": 0}', "num_images must be 1 or more, not 0"),
            ('{"prompt": "a", "num_images": 1.5}', "num_images"),
            ('{"prompt": "a", "num_images": true}', "num_images"),
            (f'{{"prompt": "a", "num_images": {MOST_IMAGES}}}', f"{MOST_IMAGES} are the most"),
            ('{"prompt": "\\ud800"}', "not valid UTF-8"),
            (b'{"prompt": "\xff"}', "not UTF-8 text"),
        ],
        ids=lambda value: repr(value)[:60],
    )
    def test_a_bad_line_is_refused_with_its_number(self, line: str | bytes, said: str, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'"good"\n\n' + (line.encode() if isinstance(line, str) else line) + b"\n")
        with pytest.raises(InvalidRequest) as raised:
            list(Prompts(path).rows(DEFAULT))
        message = str(raised.value)
        assert message.startswith(f"{path}:3: ") and said in message
        assert "--" not in message and "\n" not in message

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("none.txt", None, "No such file"),
            ("empty.txt", b" \n\n", "no prompt"),
            ("rows.json", b'{"prompt": "a"}', ".jsonl"),
            ("latin.txt", b"caf\xe9", "latin.txt:1"),
        ],
    )
    def test_a_file_that_is_none_is_refused(self, name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidRequest) as raised:
            Prompts(tmp_path / name)
        assert said in str(raised.value)


def read(folder: Path, *rows: Any) -> Prompts:
    """The file of these rows, or of one text."""
    if len(rows) == 1 and isinstance(rows[0], str) and "\n" in rows[0]:
        path = folder / "prompts.txt"
        path.write_text(rows[0], newline="")
    else:
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Prompts(path)


def record(image: int, **more: Any) -> Record:
    fields = {"prompt": "a red apple", "negative_prompt": None, "seed": 5, "steps": 3, "guidance_scale": 7.5}
    fields |= {"scheduler": "DDIM", "height": 64, "width": 64, "file": f"{image}.png", "line": image}
    return Record(**{"image": image} | fields | more)


class TestJournal:
    """What is finished is written down, and survives whatever ends the run."""

    def test_what_was_added_is_read_again(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / ROWS, {"seed": 7}, [record(1)])
        journal.add(record(3, milliseconds={"UNet": 1.5, "Pipeline": 2.5}))
        past = Past(tmp_path / ROWS)
        assert past.seed == 7
        assert past.record("3.png") == record(3, milliseconds={"UNet": 1.5, "Pipeline": 2.5})
        assert past.record("2.png") is None
        assert list(journal) == [record(1), past.record("3.png")]
        assert (1 in journal, 2 in journal, len(journal)) == (True, False, 2)

    @pytest.mark.parametrize("left", [1, 20, -1])
    def test_half_a_line_is_dropped(self, left: int, tmp_path: Path) -> None:
        Journal(tmp_path / ROWS, {"seed": 7}, [record(1), record(2)]).close()
        lines = (tmp_path / ROWS).read_bytes().splitlines(keepends=True)
        (tmp_path / ROWS).write_bytes(b"".join(lines[:2]) + lines[2][:left])
        past = Past(tmp_path / ROWS)
        assert past.record("1.png") == record(1)
        assert past.record("2.png") is None

    @pytest.mark.parametrize(
        "content",
        [b"", b"\n", b"{", b"[1]\n", b'{"seed": -1}\n', b'{"seed": "x"}\n{"file": 3}\n7\n', b"[" * 10**5 + b"\n"],
        ids=range(7),
    )
    def test_what_is_no_journal_says_nothing(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / ROWS).write_bytes(content)
        assert Past(tmp_path / ROWS).seed is None

    @pytest.mark.parametrize(
        "times", ["soon", [1], {"Pipeline": "1"}, {"Pipeline": 1.0, "Queue": None}, {"UNet": math.inf}]
    )
    def test_record_whose_times_are_no_numbers_says_nothing(self, times: object, tmp_path: Path) -> None:
        Journal(tmp_path / ROWS, {"seed": 7}, [record(1, milliseconds=times), record(2)]).close()
        past = Past(tmp_path / ROWS)
        assert past.record("1.png") is None and past.record("2.png") == record(2)

    @pytest.mark.skipif(sys.platform == "win32", reason="files cannot be bounded")
    def test_a_disk_that_is_full_leaves_what_was_there(self, tmp_path: Path) -> None:
        import resource

        journal = Journal(tmp_path / ROWS, {"seed": 7}, [record(1)])
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / ROWS).stat().st_size + 20, old[1]))
        try:
            with pytest.raises(Failed, match=r"rows\.jsonl cannot be written"):
                journal.add(record(2))
            assert list(journal) == [record(1)] and 2 not in journal
            journal.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        past = Past(tmp_path / ROWS)
        assert past.record("1.png") == record(1) and past.record("2.png") is None

    def test_a_new_one_takes_the_place_of_the_old_when_it_is_whole(self, tmp_path: Path) -> None:
        Journal(tmp_path / ROWS, {"seed": 7}, [record(1)]).close()
        reading = Past(tmp_path / ROWS)

        def records() -> Iterator[Record]:
            yield record(2)
            assert Past(tmp_path / ROWS).record("1.png") == record(1)

        Journal(tmp_path / ROWS, {"seed": 8}, records()).close()
        assert Past(tmp_path / ROWS).record("1.png") is None
        assert Past(tmp_path / ROWS).seed == 8
        assert reading.record("1.png") == record(1)


class TestFindingPictures:
    """A picture counts when its file is whole and carries the recipe."""

    RECIPE: dict[str, Any] = {  # noqa: RUF012
        "request": DEFAULT.as_json(), "prompt": "a red apple", "image": 1, "seed": 5, "slot": 0, "scheduler": "DDIM",
        "revision": "0", "darkroom": "0",
    }  # fmt: skip
    PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)

    def test_what_was_saved_is_found(self, tmp_path: Path) -> None:
        assert find(tmp_path, "txt2img", self.RECIPE) is None
        path = save(self.PIXELS, tmp_path, "txt2img", self.RECIPE)
        assert find(tmp_path, "txt2img", self.RECIPE) == path
        assert find(tmp_path, "txt2img", self.RECIPE | {"revision": "1"}) is None

    def test_what_has_more_digits_is_found_too(self, tmp_path: Path) -> None:
        first = save(self.PIXELS, tmp_path, "txt2img", self.RECIPE)
        other = self.RECIPE | {"seed": 6}
        second = save(self.PIXELS, tmp_path, "txt2img", other)
        assert len(second.name) == len(first.name) + 1
        assert find(tmp_path, "txt2img", other) == second
        first.write_bytes(b"no picture")
        assert find(tmp_path, "txt2img", other) == second
        first.unlink()  # by whoever wants it made again
        assert find(tmp_path, "txt2img", other) == second

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
    def test_a_damaged_picture_is_not_found(self, damage: str, tmp_path: Path) -> None:
        path = save(self.PIXELS, tmp_path, "txt2img", self.RECIPE)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:-20], "flip": content, "empty": b""}[damage])
        assert find(tmp_path, "txt2img", self.RECIPE) is None


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class TestGallery:
    EVIL = """<script>alert("x")</script> & <img src=x onerror='y'> </style> "quoted" 'single' \u202e"""

    def gallery(self, folder: Path, images: int, *records: Record) -> Gallery:
        journal = Journal(folder / ROWS, {}, records)
        return Gallery(folder, "<b>prompts</b>.txt", "a <i>model</i>", images, journal, lambda image: image)

    def test_whatever_a_prompt_holds_is_text(self, tmp_path: Path) -> None:
        gallery = self.gallery(tmp_path, 2, record(1, prompt=self.EVIL, negative_prompt=self.EVIL))
        gallery.write({2: Failure(2, self.EVIL, f"no: {self.EVIL}")}, running=False)
        page = Page(gallery.index)
        assert page.text.count(self.EVIL) == 4
        assert page.all("img")[0]["alt"] == self.EVIL
        assert len(page.all("img")) == 1
        assert not page.all("script") and not page.all("b")[3:] and not page.all("i")

    def test_pictures_are_in_order_with_what_made_them(self, tmp_path: Path) -> None:
        gallery = self.gallery(
            tmp_path, 3, record(3, seed=9), record(1, milliseconds={"Queue": 50.0, "Pipeline": 2550.0})
        )
        gallery.write({}, running=False)
        page = Page(gallery.index)
        assert [image["src"] for image in page.all("img")] == ["1.png", "3.png"]
        assert "seed 5 · 3 steps · guidance 7.5 · DDIM · 64 × 64 · 2.50 s" in page.text
        assert "2 of 3 pictures are here; 1 is missing" in page.text
        assert "Missing: line 2." in page.text

    def test_page_needs_nothing_but_the_pictures(self, tmp_path: Path) -> None:
        gallery = self.gallery(tmp_path, 2, record(1, file="a b%,'é#.png"), record(2))
        gallery.write({}, running=False)
        page = Page(gallery.index)
        assert page.all("img")[0]["src"] == "a%20b%25%2C%27%C3%A9%23.png"
        addresses = [each.get(name) for _, each in page.tags for name in ("src", "href") if each.get(name)]
        assert all(address.endswith(".png") for address in addresses)
        assert "http" not in gallery.index.read_text()
        assert "prefers-color-scheme: dark" in page.text

    def test_page_grows_while_the_run_does_and_then_rests(self, tmp_path: Path) -> None:
        gallery = self.gallery(tmp_path, 2, record(1))
        gallery.write({}, running=True)
        growing = Page(gallery.index)
        assert any("refresh" == meta.get("http-equiv") for meta in growing.all("meta"))
        assert "To come: line 2." in growing.text
        gallery.write({}, running=False)
        assert not any(meta.get("http-equiv") for meta in Page(gallery.index).all("meta"))

    def test_many_pictures_are_on_many_pages_and_only_what_changed_is_written(self, tmp_path: Path) -> None:
        images = 2 * PICTURES_A_PAGE + 1
        (tmp_path / "index-9.html").write_text("of a longer file")
        gallery = self.gallery(tmp_path, images, record(1), record(images))
        gallery.write({}, running=False)
        assert sorted(path.name for path in tmp_path.glob("*.html")) == ["index-2.html", "index-3.html", "index.html"]
        assert [image["src"] for image in Page(tmp_path / "index-3.html").all("img")] == [f"{images}.png"]
        before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.html")}
        gallery.change(images)
        gallery.write({}, running=False)
        after = {path.name: path.stat().st_ino for path in tmp_path.glob("*.html")}
        assert {name for name in before if before[name] != after[name]} == {"index.html", "index-3.html"}

    def test_missing_lines_are_said_in_ranges(self, tmp_path: Path) -> None:
        gallery = self.gallery(tmp_path, 9, record(2), record(6))
        gallery.write({7: Failure(7, "a", "no")}, running=False)
        assert "Missing: lines 1, 3–5, 8–9." in Page(gallery.index).text


COUNTS = Counts(0, 0, 4, 2, 1, 2)


class Fake:
    """A worker that answers from a thread of its own; `act` is what it does with a task, by default it makes it."""

    def __init__(self, name: str, tell: Tell, act: Callable[[Task, Tell], None] | None = None) -> None:
        self.name = name
        self.tell = tell
        self.act = act or (lambda task, tell: tell(Kept(task.number, f"{task.number}.png", {}, COUNTS)))
        self.given: list[int] = []
        self.held = self.most = 0

    def give(self, task: Task) -> None:
        self.given.append(task.number)
        self.held += 1
        self.most = max(self.most, self.held)
        threading.Timer(0.001, self._answer, [task]).start()

    def _answer(self, task: Task) -> None:
        self.held -= 1
        self.act(task, self.tell)

    def stop(self) -> None: ...


class Team:
    """A crew of fakes, the first of them ready at once, and the tasks that it drew."""

    def __init__(self, *acts: Callable[[Task, Tell], None] | None, slots: int = 2, ready: int = 9) -> None:
        self.fakes: list[Fake] = []
        self.said: list[str] = []
        self.drawn = self.ended = self.most_ahead = 0

        def start(act: Any, place: int, tell: Tell) -> Fake:
            self.fakes.append(Fake(f"worker {place}", tell, act))
            if place <= ready:
                tell(Ready())
            return self.fakes[-1]

        starts = [lambda tell, act=act, place=place: start(act, place, tell) for place, act in enumerate(acts, 1)]
        self.crew = Crew(starts, slots, self.said.append)

    def tasks(self, names: list[str]) -> Iterator[Task]:
        for number, name in enumerate(names, 1):
            self.drawn += 1
            self.most_ahead = max(self.most_ahead, self.drawn - self.ended)
            yield Task(number, DEFAULT, name)

    def run(self, names: list[str]) -> dict[int, Kept | NotMade]:
        made: dict[int, Kept | NotMade] = {}
        for task, news in self.crew.run(self.tasks(names)):
            assert task.number not in made
            made[task.number] = news
            self.ended += 1
        return made


def end(task: Task, tell: Tell) -> None:
    tell(Gone("out of luck"))


def names(count: int) -> list[str]:
    return [f"{number}.png" for number in range(count)]


class TestCrew:
    """One queue, many workers, and none of them to be relied on."""

    def test_all_is_made_by_all_and_nobody_holds_too_much(self) -> None:
        team = Team(None, None, None, slots=2)
        assert sorted(team.run(names(60))) == list(range(1, 61))
        assert all(fake.given for fake in team.fakes)
        assert max(fake.most for fake in team.fakes) <= HELD_PER_SLOT * 2
        assert sum(team.crew.made().values()) == 60

    def test_tasks_are_drawn_as_they_are_needed(self) -> None:
        team = Team(None, slots=2)
        team.run(names(1000))
        assert team.most_ahead <= HELD_PER_SLOT * 2

    def test_what_a_worker_held_when_it_ended_is_made_by_another(self) -> None:
        team = Team(end, None)
        made = team.run(names(40))
        assert all(isinstance(news, Kept) for news in made.values()) and len(made) == 40
        assert set(team.fakes[0].given) <= set(team.fakes[1].given)
        assert len(team.said) == 1 and "worker 1 has ended (out of luck)" in team.said[0]

    def test_an_image_that_ends_two_workers_is_given_up(self) -> None:
        def ends_of_seven(task: Task, tell: Tell) -> None:
            tell(Gone("seven") if task.number == 7 else Kept(task.number, "", {}, COUNTS))

        team = Team(ends_of_seven, ends_of_seven, ends_of_seven, slots=1)
        made = team.run(names(30))
        assert [number for number, news in made.items() if isinstance(news, NotMade)] == [7]
        assert "2 workers have ended while they made it: seven" in made[7].reason
        assert len(made) == 30

    def test_an_image_is_not_given_up_for_its_neighbours_sake(self) -> None:
        """Two workers end of image 1. Both held image 2 as well, had it been given to the second along with it."""

        def ends_of_one(following: int) -> Callable[[Task, Tell], None]:
            def act(task: Task, tell: Tell) -> None:
                if task.number == 1:
                    tell(Gone("one"))
                    team.fakes[following].tell(Ready())

            return act

        team = Team(ends_of_one(1), ends_of_one(2), None, slots=1, ready=1)
        made = team.run(names(2))
        assert isinstance(made[1], NotMade) and isinstance(made[2], Kept)

    def test_the_last_worker_to_end_ends_the_run(self) -> None:
        team = Team(end, end)
        with pytest.raises(Failed, match="no other is left: out of luck"):
            team.run(names(10))

    def test_pictures_that_want_the_same_name_are_not_made_at_once(self) -> None:
        taken: list[str] = []
        clashes: list[str] = []
        lock = threading.Lock()

        def take(task: Task, tell: Tell) -> None:
            with lock:
                clashes.extend(name for name in taken if name == task.name)
                taken.append(task.name)
            threading.Timer(0.005, leave, [task, tell]).start()

        def leave(task: Task, tell: Tell) -> None:
            with lock:
                taken.remove(task.name)
            tell(Kept(task.number, task.name, {}, COUNTS))

        team = Team(take, take, slots=2)
        made = team.run(["same.png", "same.png", "a.png", "same.png", "b.png", "a.png", "c.png"] * 3)
        assert sorted(made) == list(range(1, 22))
        assert clashes == []

    def test_what_was_heard_before_an_interruption_is_told_before_it_ends_the_run(self) -> None:
        def interrupted(task: Task, tell: Tell) -> None:
            if task.number <= 3:
                tell(Kept(task.number, "", {}, COUNTS))
            if task.number == 3:
                team.crew.interrupt()

        team = Team(interrupted, slots=1)
        made: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            for task, _ in team.crew.run(team.tasks(names(30))):
                made.append(task.number)
        assert 3 in made

    def test_occupancy_is_a_mean_over_turns(self) -> None:
        team = Team(None)
        team.run(names(3))
        assert team.crew.occupancy() == 2.0

    def test_what_a_stopped_process_had_finished_is_all_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Any] = []

        def tell(news: Any) -> None:
            time.sleep(0.002)  # slower than they come
            told.append(news)

        monkeypatch.setattr("darkroom.serving.workers._work", finish_late)
        monkeypatch.setattr("darkroom.serving.workers.SECONDS_TO_END", SOON)
        process = Process("worker 1", Orders(None, 1, Path(), ""), {}, tell)
        until(lambda: bool(told))
        process.stop()
        assert sum(isinstance(news, Kept) for news in told) == PICTURES

    def test_process_whose_reports_cannot_be_read_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever is wrong with them: nobody waits for its pictures for ever."""
        told: list[Any] = []
        monkeypatch.setattr("darkroom.serving.workers._work", report_nonsense)
        process = Process("worker 1", Orders(None, 1, Path(), ""), {}, told.append)
        until(lambda: bool(told))
        assert isinstance(told[-1], Gone) and "could not be read" in told[-1].reason
        assert process.process.exitcode is not None

    def test_cpus_share_the_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each in a thread of its own here: what a thread keeps to is its own too."""
        kept: dict[str, list[int]] = {}
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 3, 4, 7, 8}, raising=False)
        monkeypatch.setattr("os.sched_setaffinity", lambda _, cores: kept.update(cores=cores), raising=False)

        def of(devices: list[str], threads: int | None = None) -> list[tuple[int | None, list[int] | None]]:
            shares = []
            for start in on_devices(devices, Orders(None, 1, Path(), "", threads)):
                kept.clear()
                shares.append((on_its_share(start.args[1]).threads, kept.get("cores")))
            return shares

        assert of(["cpu"]) == [(None, None)]
        assert of(["cpu", "cpu"]) == [(2, [2, 3]), (3, [4, 7, 8])]
        assert of(["cpu", "cpu"], threads=2) == [(2, [2, 3]), (2, [4, 7, 8])]
        assert of(["cpu", "cpu"], threads=4) == [(4, None), (4, None)]
        assert of(["cpu"] * 6)[0][0] == 1

    def test_gpus_are_numbered_among_those_that_may_be_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        orders = Orders(None, 1, Path(), "")

        def seen(device: str) -> dict[str, str]:
            (start,) = on_devices([device], orders)
            return start.args[2]

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert seen("3") == {"CUDA_VISIBLE_DEVICES": "3"}
        assert seen("cpu") == {}
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        assert seen("1") == {"CUDA_VISIBLE_DEVICES": "6"}
        with pytest.raises(InvalidRequest, match="has no such GPU"):
            seen("2")
