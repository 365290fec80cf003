"""Lines of results are read as they were written; what is damaged is named, and nothing is guessed."""

import json
import math
from pathlib import Path

import pytest

from darkroom.bench.results import append, last_lines, read
from darkroom.errors import InvalidRequest
from tests.bench.lines import MACHINE, failed, line, write
from tests.support import ROOT


def test_every_member_of_a_line_arrives(tmp_path: Path) -> None:
    written = line("openvino fp32", 500.0, scheduler="DDIM", seed=7, psnr=52.1, peak_device_bytes=3, **{"async": True})
    (row,) = read([write(tmp_path / "a.jsonl", written)])
    assert row.line == written | {"settings": row.settings}
    assert row.settings == written["settings"] | {"weights": None}


def test_lines_of_earlier_releases_are_read() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    assert len(files) > 5 and len(read(files)) > 50


def test_line_that_is_cut_off_at_the_end_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line("torch fp32", 500.0), line("openvino fp32", 250.0))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 100, len(whole) - 2):
        path.write_bytes(whole[:end])
        assert [row["contender"] for row in read([path])] == ["torch fp32"]


def test_last_line_counts_that_lacks_no_more_than_its_line_feed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line("torch fp32", 500.0), line("openvino fp32", 250.0))
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert len(read([path])) == 2


@pytest.mark.parametrize("damage", [b'{"format": 1, "contender"', b"\xff\xfe", b"[1]", b"nothing"])
def test_damaged_line_before_the_end_is_named(tmp_path: Path, damage: bytes) -> None:
    path = write(tmp_path / "a.jsonl", line("torch fp32", 500.0))
    path.write_bytes(path.read_bytes() + damage + b"\n" + path.read_bytes())
    with pytest.raises(InvalidRequest, match=r"a\.jsonl, line 2 is damaged") as caught:
        read([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "its format is 2"),
        ({"images_per_second": None}, "images_per_second is None"),
        ({"images_per_second": "2"}, "images_per_second is '2'"),
        ({"images_per_second": math.nan}, "images_per_second is nan"),
        ({"stages": {}}, "stages have no Pipeline"),
        ({"stages": {"Pipeline": {"median": 1.0}}}, "Pipeline has not all of median, p90"),
        ({"finished": "yesterday"}, "finished is no ISO 8601 time: 'yesterday'"),
        ({"machine": None}, "machine is not an object"),
        ({"settings": line("a", 1.0)["settings"] | {"batch_size": True}}, "batch_size is True"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, changes: dict, said: str) -> None:
    path = write(tmp_path / "a.jsonl", line("torch fp32", 500.0), line("openvino fp32", 500.0) | changes)
    with pytest.raises(InvalidRequest, match="line 2 is damaged") as caught:
        read([path])
    assert said in str(caught.value)


def test_file_without_results_is_refused_in_one_line(tmp_path: Path) -> None:
    empty, cut = tmp_path / "empty.jsonl", tmp_path / "cut.jsonl"
    empty.write_bytes(b"\n\n")
    cut.write_bytes(b'{"format": 1, "cont')
    for path, said in (
        (empty, "holds no results"),
        (cut, "holds no results"),
        (tmp_path / "missing.jsonl", "No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            read([path])
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_later_line_of_a_cell_wins_within_and_across_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", failed("torch fp32", "no memory"), line("torch fp32", 500.0))
    second = write(tmp_path / "b.jsonl", line("torch fp32", 250.0))
    assert [row["images_per_second"] for row in read([first])] == [2.0]
    assert [row["images_per_second"] for row in read([first, second])] == [4.0]
    assert [row["images_per_second"] for row in read([second, first])] == [2.0]


def test_how_often_it_was_started_cold_makes_no_other_cell(tmp_path: Path) -> None:
    cold, warm = line("torch fp32", 500.0), line("torch fp32", 250.0, cold_starts=0, cold_start=None)
    (row,) = read([write(tmp_path / "a.jsonl", cold, warm)])
    assert row["images_per_second"] == 4.0 and row["cold_start"]["median"] == 4.0


@pytest.mark.parametrize(
    "other",
    [
        line("openvino fp32", 500.0),
        line("torch fp32", 500.0, threads=1),
        line("torch fp32", 500.0, machine=MACHINE | {"cores": 4}),
        line("torch fp32", 500.0, machine=MACHINE | {"packages": {"torch": "2.14.0"}}),
    ],
)
def test_cells_differ_by_contender_settings_and_machine(tmp_path: Path, other: dict) -> None:
    assert len(read([write(tmp_path / "a.jsonl", line("torch fp32", 500.0), other)])) == 2


def test_line_feeds_alone_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prompt = "one\u2028two\x85three"
    path.write_text(json.dumps(line("torch fp32", 500.0, prompt=prompt), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read([path])[0].settings["prompt"] == prompt


def test_failed_cell_has_its_line_and_no_numbers(tmp_path: Path) -> None:
    (row,) = read([write(tmp_path / "a.jsonl", failed("tensorrt fp16", "needs an NVIDIA GPU"))])
    assert row["error"] == "needs an NVIDIA GPU"
    assert row["stages"] == {}
    assert row["images_per_second"] is None


def test_equal_pictures_may_be_infinitely_alike(tmp_path: Path) -> None:
    assert read([write(tmp_path / "a.jsonl", line("torch fp32", 500.0, psnr=math.inf))])[0]["psnr"] == math.inf


ROW = {"contender": "a", "settings": {}, "machine": {}, "error": None}


class TestAppending:
    def test_half_a_line_goes_when_the_next_is_added(self, tmp_path: Path) -> None:
        file = tmp_path / "new" / "results.jsonl"
        append(file, ROW)
        with file.open("a") as out:
            out.write('{"contender": "b", "sett')
        append(file, ROW | {"contender": "c"})
        assert [json.loads(line)["contender"] for line in file.read_text().splitlines()] == ["a", "c"]
        assert [each["contender"] for each in last_lines(file).values()] == ["a", "c"]

    def test_a_whole_line_without_its_end_stays(self, tmp_path: Path) -> None:
        file = tmp_path / "results.jsonl"
        file.write_text(json.dumps(ROW))
        append(file, ROW | {"contender": "b"})
        assert [json.loads(line)["contender"] for line in file.read_text().splitlines()] == ["a", "b"]
