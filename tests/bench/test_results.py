"""The page of results has the numbers of the raw lines."""

import re

from tests.bench.results_page import PAGE, TABLES, table, with_tables
from tests.support import ROOT


def test_every_table_is_made_of_the_raw_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page
    assert set(re.findall(r"<!-- ([\w-]+) -->\n\|", page)) == TABLES.keys()
    outside = re.sub(r"<!-- [\w-]+ -->.*?<!-- end -->", "", page, flags=re.DOTALL)
    assert "| --- |" not in outside


def test_readme_has_the_same_numbers() -> None:
    """Contenders are its columns, in this order, and three columns of the table its rows."""
    rows = {line.split(" | ")[0].strip("| "): line for line in table("emoji").splitlines()[2:]}
    columns = [rows[name] for name in ("Darkroom (openvino fp32)", "OpenVINO GenAI (f32)", "diffusers eager")]
    cells = [[cell.strip("* ") for cell in line.split("|")[2:5]] for line in columns]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (?:cold start|steady state)[^|]*\|(.*)\|$", readme, re.MULTILINE)
    shown = [[re.sub(r" images/s", "", cell).strip() for cell in line.split("|")] for line in found]
    assert shown == [list(row) for row in zip(*cells, strict=True)]
