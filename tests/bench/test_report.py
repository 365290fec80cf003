"""Reports compare what can be compared, say what they compare with, and lose nothing that was measured."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from darkroom.bench import charts
from darkroom.bench.report import best_under, comma_separated, markdown, report, text
from darkroom.bench.results import Row, read
from darkroom.bench.sections import Section, less, number, processor_name, sections, size, times
from darkroom.errors import Failed, InvalidRequest
from tests.bench.lines import MACHINE, failed, line, write
from tests.support import ROOT


@pytest.fixture
def read_lines(tmp_path: Path):
    """Rows as they come out of a file with these lines."""
    return lambda *lines: read([write(tmp_path / "lines.jsonl", *lines)])


DIFFUSERS = line("diffusers eager", 1000.0, peak_host_bytes=1_000_000_000)
TORCH = line("torch fp32", 625.0, peak_host_bytes=1_100_000_000)
OPENVINO = line("openvino fp32", 400.0, peak_host_bytes=250_000_000)


def speedups(section: Section) -> dict[tuple[str, str], float | None]:
    return {(entry.name, entry.group.label): entry.speedup for entry in section.entries}


def test_speedups_and_savings_are_over_the_baseline(read_lines) -> None:
    (section,) = sections(read_lines(OPENVINO, DIFFUSERS, TORCH))
    # 1000 ms against 400 and 625 ms for one image.
    assert speedups(section) == {("diffusers eager", ""): 1.0, ("openvino fp32", ""): 2.5, ("torch fp32", ""): 1.6}
    assert [entry.saved for entry in section.entries] == [0, 750_000_000, -100_000_000]
    assert [entry.saved_share for entry in section.entries] == [0.0, 0.75, -0.1]


def test_speedup_is_over_what_the_baseline_did_in_the_same_turns(read_lines) -> None:
    beside = {"contender": "diffusers eager", "settings": DIFFUSERS["settings"], "images_per_second": 0.5}
    (section,) = sections(read_lines(DIFFUSERS, line("openvino fp32", 500.0, beside=beside)))
    assert speedups(section)["openvino fp32", ""] == 4.0


def test_speedup_is_over_no_other_cell_of_the_baselines_label(read_lines) -> None:
    other = {"contender": "torch fp32", "settings": line("torch fp32", 1.0, threads=1)["settings"]}
    beside = other | {"images_per_second": 0.5}
    (section,) = sections(read_lines(TORCH, line("openvino fp32", 312.5, beside=beside)))
    assert speedups(section)["openvino fp32", ""] == 2.0


def test_baseline_is_diffusers_then_torch_then_the_first(read_lines) -> None:
    onnxruntime = line("onnxruntime fp32", 500.0)
    for lines, baseline in (
        ((OPENVINO, TORCH, DIFFUSERS), "diffusers eager"),
        ((line("diffusers eager (as it comes)", 600.0), DIFFUSERS), "diffusers eager"),
        ((OPENVINO, onnxruntime, TORCH), "torch fp32"),
        ((OPENVINO, onnxruntime), "openvino fp32"),
        ((failed("diffusers eager", "no memory"), OPENVINO, TORCH), "torch fp32"),
    ):
        assert sections(read_lines(*lines))[0].baseline == baseline


def test_baseline_goes_by_a_part_that_only_one_has(read_lines) -> None:
    rows = read_lines(DIFFUSERS, TORCH, OPENVINO, line("torch-compile fp32", 600.0))
    for part, baseline in (("torch fp32", "torch fp32"), ("Compile", "torch-compile fp32"), ("vino", "openvino fp32")):
        assert sections(rows, part)[0].baseline == baseline
    with pytest.raises(InvalidRequest, match="could be 'torch fp32' or 'torch-compile fp32'"):
        sections(rows, "torch")


def test_unknown_baseline_is_refused_with_what_is_near_and_what_is_known(read_lines) -> None:
    for asked in ("openvimo fp32", "  "):
        with pytest.raises(InvalidRequest, match="Known: diffusers eager, openvino fp32") as caught:
            sections(read_lines(DIFFUSERS, OPENVINO), asked)
        assert ("Did you mean 'openvino fp32'?" in str(caught.value)) == ("vimo" in asked)


def test_only_the_same_work_is_compared(read_lines) -> None:
    (section,) = sections(
        read_lines(
            DIFFUSERS,
            line("diffusers eager", 3000.0, batch_size=4),
            line("openvino fp32", 1500.0, batch_size=4),
            line("openvino fp32", 100.0, batch_size=4, denoising_steps=1),
        )
    )
    assert speedups(section) == {
        ("diffusers eager", "batch 1, 20 steps"): 1.0,
        ("diffusers eager", "batch 4, 20 steps"): 1.0,
        ("openvino fp32", "batch 4, 20 steps"): 2.0,
        ("openvino fp32", "batch 4, 1 step"): None,
    }


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"batch_size": 4}, ["batch 1", "batch 4"]),
        ({"denoising_steps": 1}, ["1 step", "20 steps"]),
        ({"height": 256}, ["128×128", "128×256"]),
        ({"scheduler": "DDIM"}, ["the model's scheduler", "DDIM"]),
        ({"guidance_scale": 7.5}, ["guidance 4", "guidance 7.5"]),
        ({"seed": 5}, ["seed 0", "seed 5"]),
        ({"machine": MACHINE | {"processor": "Apple M2"}}, ["AMD EPYC 9B14 (0123abcd)", "Apple M2"]),
        (
            {"machine": MACHINE | {"packages": {"torch": "2.13.0", "openvino": "2"}}},
            ["openvino 2026.4.1", "openvino 2"],
        ),
    ],
)
def test_groups_are_named_for_what_varies_and_nothing_else(read_lines, changes: dict, labels: list[str]) -> None:
    (section,) = sections(read_lines(OPENVINO, line("openvino fp32", 500.0, **changes)))
    assert [group.label for group in section.groups] == labels


def test_version_that_was_not_recorded_is_no_other(read_lines) -> None:
    known = MACHINE | {"packages": MACHINE["packages"] | {"jax": "0.10.2"}}
    rows = read_lines(DIFFUSERS, OPENVINO, line("openvino fp32", 300.0, batch_size=4, machine=known))
    (section,) = sections(rows)
    assert {entry.group.label for entry in section.entries} == {"batch 1", "batch 4"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"streams": 2}, "2 streams"),
        ({"threads": 2}, "2 threads"),
        ({"use_cuda_graph": True}, "CUDA graph"),
        ({"async": True}, "async"),
        ({"devices": 4}, "4 devices"),
    ],
)
def test_way_to_run_is_in_the_name_where_it_varies(read_lines, changes: dict, said: str) -> None:
    other = line("openvino fp32", 500.0, images_per_second=4.0, **changes)
    (section,) = sections(read_lines(DIFFUSERS, OPENVINO, other))
    assert speedups(section)[f"openvino fp32 {said}", ""] == 4.0 and speedups(section)["openvino fp32", ""] == 2.5
    (alone,) = sections(read_lines(other))
    assert alone.names == ["openvino fp32"] and said in alone.shared.label


def test_builds_of_one_label_have_names_of_their_own(read_lines) -> None:
    (section,) = sections(read_lines(OPENVINO, line("openvino fp32", 500.0, build="dynamic-batch")))
    assert section.names == ["openvino fp32 static-batch", "openvino fp32 dynamic-batch"]


def test_best_is_the_most_images_of_those_whose_p90_is_within_the_bound(read_lines) -> None:
    rows = read_lines(
        line("openvino fp32", 400.0),  # p90 402
        line("openvino fp32", 1000.0, batch_size=4),  # 4 images/s, p90 1002
        line("torch fp32", 800.0),
        line("torch fp32", 300.0, version="other"),
        failed("tensorrt fp16", "no GPU"),
    )
    best = "emoji: most images with a p90 within 402 ms: openvino fp32 (batch 1), 2.50 images/s (p90 402 ms)."
    assert best_under(sections(rows), 402.0)[0] == best
    nearest = "emoji: no cell has a p90 within 401.9 ms; the nearest is openvino fp32 (batch 1) with 402 ms."
    assert best_under(sections(rows), 401.9)[0] == nearest
    batched, other = best_under(sections(rows), 5000.0)
    assert "openvino fp32 (batch 4), 4.00 images/s" in batched and other.startswith("other: most images")
    assert best_under(sections(read_lines(failed("a", "b"))), 10.0) == [
        "emoji: no cell has a p90 within 10 ms, for none was measured."
    ]
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="--max-latency"):
            best_under(sections(rows), bound)


def test_csv_has_every_setting_and_every_number(read_lines) -> None:
    rows = read_lines(DIFFUSERS, OPENVINO | {"images_per_second": 2.123456789}, failed("tensorrt fp16", 'no, "none"'))
    records = list(csv.DictReader(comma_separated(sections(rows)).splitlines()))
    openvino, broken = records[1:]
    expected = {
        "format": "1",
        "contender": "openvino fp32",
        "settings_version": "emoji",
        "settings_batch_size": "1",
        "settings_scheduler": "",
        "settings_async": "false",
        "settings_prompt": "a red apple",
        "machine_processor": "AMD EPYC 9B14 96-Core Processor (0123abcd)",
        "machine_packages_openvino": "2026.4.1",
        "finished": "2026-11-21T17:00:00+00:00",
        "stages_UNet_median": "200.0",
        "stages_Pipeline_p90": "402.0",
        "images_per_second": "2.123456789",
        "cold_start_count": "5",
        "peak_host_bytes": "250000000",
        "host_bytes_saved": "750000000",
        "baseline": "diffusers eager",
        "speedup": "2.123456789",
        "error": "",
    }
    assert {name: openvino[name] for name in expected} == expected
    assert {f"settings_{name}" for name in OPENVINO["settings"]} <= openvino.keys()
    assert (broken["error"], broken["images_per_second"], broken["speedup"]) == ('no, "none"', "", "")


def test_markdown_shows_cells_beside_their_baseline(read_lines) -> None:
    rows = read_lines(DIFFUSERS, OPENVINO | {"images_per_unit": 6300.0}, failed("tensorrt fp16", "needs a | GPU"))
    page = markdown(sections(rows), {"emoji": ["emoji-speed.png"]}, ["The best."])
    assert (
        "| contender | images/s (speed-up) | Pipeline, ms (p90, spread) | CLIP, ms | UNet, ms | VAE-Dec, ms "
        "| cold start, s | load, s | build, s | host memory | engines | images per unit of money |"
    ) in page
    assert (
        "| openvino fp32 | 2.50 (2.5x) | 400 (402, 4.00) | 40.0 | 200 (20 calls) | 80.0 "
        "| 4.00 | 0.500 | 12.5 | 250 MB (75% less) | 92.0 MB | 6300 |"
    ) in page
    assert (
        "AMD EPYC 9B14, 2 cores; 2026-11-21; batch 1, 20 steps, 128×128, guidance 4; baseline: diffusers eager." in page
    )
    assert r"- tensorrt fp16: needs a \| GPU" in page
    assert "![emoji-speed](emoji-speed.png)" in page
    assert "The best." in page


def many(read_lines) -> list[Row]:
    names = ("diffusers eager", "torch fp32", "openvino fp32", "a contender with quite a long name and fp16")
    cells = [
        line(name, 100.0 * (place + 1) * batch, batch_size=batch, denoising_steps=steps, scheduler=scheduler)
        for place, name in enumerate(names)
        for batch in (1, 2)
        for steps in (1, 20)
        for scheduler in (None, "DPM++Karras")
    ]
    return read_lines(*cells, failed("tensorrt fp16", "a reason that is told at length, " * 5))


def test_terminal_of_80_columns_has_room_for_it(read_lines) -> None:
    shown = text(many(read_lines), None)
    assert max(map(len, shown.splitlines())) <= 80
    assert "batch 2, 20 steps, DPM++Karras" in shown
    assert "failed: tensorrt fp16" in shown


def test_bars_of_the_terminal_are_relative_to_the_fastest(read_lines) -> None:
    shown = text(read_lines(DIFFUSERS, OPENVINO), None).splitlines()
    bars = {row.split("  ")[0]: row.count("█") + row.count("▌") / 2 for row in shown if "█" in row}
    # The whole column is 12 characters, and 400 of 1000 ms are 4.8 of it.
    assert bars == {"openvino fp32": 12, "diffusers eager": 5}
    assert "0.400" not in shown
    assert any("2.50" in row and "2.5x" in row and "400 (402)" in row and "250 MB" in row for row in shown)


@pytest.fixture
def figure_texts():
    """Everything that is written within the axes of a figure."""
    import matplotlib

    def drawn(draw, section: Section) -> list[str]:
        with matplotlib.rc_context(charts.STYLE):
            return [each.get_text() for axis in draw(section).axes for each in axis.texts]

    return drawn


def test_speedups_are_written_beside_the_bars(read_lines, figure_texts) -> None:
    lines = [DIFFUSERS, TORCH, OPENVINO, line("openvino fp32", 8000.0, batch_size=4, denoising_steps=1)]
    written = figure_texts(charts.speed, sections(read_lines(*lines))[0])
    # 1, 1.6, 2.5 and 0.5 images/s; what has no counterpart has no speed-up.
    groups = [" batch 1, 20 steps", " batch 4, 1 step"]
    assert sorted(written) == [*groups, "0.500", "1.00, 1.0x", "1.60, 1.6x", "2.50, 2.5x"]


def test_shares_of_the_stages_and_the_rest_are_those_of_the_pipeline(read_lines, figure_texts) -> None:
    # The UNet takes 50%, the VAE 20%, CLIP 10%, which leaves 20%.
    written = figure_texts(charts.stages, sections(read_lines(OPENVINO))[0])
    assert written == ["10%", "50%", "20%", "20%", "400 ms"]


def test_all_charts_are_pictures_and_none_is_made_without_data(tmp_path: Path, read_lines) -> None:
    cells = [
        line(
            contender, milliseconds * batch**0.5, batch_size=batch, build=build, peak_device_bytes=10**9, prompt="$5 $6"
        )
        for contender, milliseconds, build in (
            ("diffusers eager", 900.0, "static-batch"),
            ("tensorrt fp16", 300.0, "static-batch"),
            ("tensorrt fp16", 330.0, "dynamic-batch"),
        )
        for batch in (1, 4)
    ]
    file = write(tmp_path / "sweep.jsonl", *cells, line("torch fp32", 5.0, version="org/model", peak_host_bytes=None))
    folder = tmp_path / "new" / "report"
    paths = report([file], folder, "diffusers", 1000.0)
    names = [f"emoji-{chart}.png" for chart in ("speed", "stages", "memory", "batches")]
    names += ["org_model-speed.png", "org_model-stages.png"]
    assert [path.name for path in paths] == ["results.csv", "results.md", *names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    for path in paths[2:]:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    assert "org/model: most images with a p90 within 1000 ms" in (folder / "results.md").read_text(encoding="utf-8")


def test_folder_that_cannot_be_written_fails_in_one_line(tmp_path: Path, read_lines) -> None:
    read_lines(OPENVINO)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failed, match="could not be written") as caught:
        report([tmp_path / "lines.jsonl"], tmp_path / "file" / "folder", None, None)
    assert "\n" not in str(caught.value)


def test_missing_matplotlib_is_named_before_anything_is_written(tmp_path: Path, read_lines, monkeypatch) -> None:
    read_lines(OPENVINO)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="pip install matplotlib"):
        report([tmp_path / "lines.jsonl"], tmp_path / "report", None, None)
    assert not (tmp_path / "report").exists()


def test_results_in_which_everything_failed_are_told_without_charts(tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.jsonl", failed("tensorrt fp16", "needs an NVIDIA GPU"))
    paths = report([file], tmp_path / "report", None, None)
    assert [path.name for path in paths] == ["results.csv", "results.md"]
    assert "- tensorrt fp16: needs an NVIDIA GPU" in paths[1].read_text(encoding="utf-8")
    assert "failed: tensorrt fp16: needs an NVIDIA GPU" in text(read([file]), None)


def test_reading_and_terminal_need_no_matplotlib() -> None:
    code = "import sys, darkroom.bench.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "demo", check=False).returncode == 0


def test_numbers_are_short_and_say_their_unit() -> None:
    assert [number(value) for value in (0.0004, 0.8119, 2.1, 9.999, 48.46, 1190.4)] == (
        ["0.000", "0.812", "2.10", "10.0", "48.5", "1190"]
    )
    assert [size(count) for count in (5_000, 412_000_000, 1_240_000_000)] == ["5 kB", "412 MB", "1.24 GB"]
    assert [times(ratio) for ratio in (2.5, 1.0, 0.996, 0.93, 12.34)] == ["2.5x", "1.0x", "1.0x", "0.93x", "12.3x"]
    assert [less(share) for share in (0.63, -0.12, 0.001)] == ["63% less", "12% more", "as much"]


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("AMD EPYC 9B14 96-Core Processor (0123abcd)", "AMD EPYC 9B14"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "Intel Xeon Platinum 8481C"),
        ("13th Gen Intel(R) Core(TM) i7-1365U", "Intel Core i7-1365U"),
        ("AMD Ryzen 7 PRO 7840U w/ Radeon 780M Graphics", "AMD Ryzen 7 PRO 7840U"),
        ("Apple M2 Pro", "Apple M2 Pro"),
        ("AMD EPYC", "AMD EPYC"),
    ],
)
def test_processors_are_called_what_people_call_them(long: str, short: str) -> None:
    assert processor_name(long) == short


def test_devices_are_compared_by_what_each_makes_and_costs(read_lines) -> None:
    four = line("jax bf16", 8000.0, batch_size=16, devices=4, price_per_hour=4.8, images_per_unit=1500.0)
    four |= {"compile_seconds": 31.5, "first_run_ms": 9000.0}
    rows = read_lines(OPENVINO, four, line("jax bf16", 2000.0, batch_size=1, devices=1))
    page = markdown(sections(rows), {}, [])
    # 16 images in 8 s on 4 devices: 4 images each, 0.5 images/s each.
    assert "| jax bf16 4 devices | batch 16 | 4 | 4 | 8.00 | 0.500 | 1500 |" in page
    assert "| jax bf16 | batch 1 | 1 | 1 | 2.00 | 0.500 |  |" in page
    assert "| openvino fp32 | batch 1 | 1 | 1 | 0.400 | 2.50 |  |" in page
    assert "| 31.5 | 9000 |" in page
    assert "By device" not in markdown(sections(read_lines(OPENVINO, TORCH)), {}, [])
    shown = text(rows, None)
    assert "jax bf16 4" in shown and "batch 16" in shown and max(map(len, shown.splitlines())) <= 80
