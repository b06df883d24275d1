"""The benchmark of hosts: its plan, its rows and its page."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.__main__ import main
from bench.hosts import cases, table
from bench.hosts.row import Row
from bench.report import results


def rows() -> list[Row]:
    """Two methods on one case, and ours on one that the host cannot hold."""
    host = Row(
        machine="m", cpu="CPU", threads=2, capability="AVX512", torch="2.13", python="3.11",
        compiler="g++", when="2026-01-02 03:04", host="sentence-transformers", version="6.2.0",
        loss="MNRL", n=4096, columns=2, d=384, method="host", ms=900.0, low_ms=880.0, high_ms=934.0,
        rounds=9, over_host=1.0, peak_mib=420.0,
    )  # fmt: skip
    ours = replace(
        host, method="fastclip", ms=300.0, low_ms=290.0, high_ms=302.0, over_host=3.0, peak_mib=30.0
    )
    alone = replace(ours, loss="GIST", over_host=None, n=64)
    return [host, ours, alone]


def test_the_table_of_a_page(tmp_path: Path) -> None:
    path, page = tmp_path / "m.csv", tmp_path / "page.md"
    results.write(path, rows(), Row)
    assert [row.key for row in results.read(path, Row)] == [row.key for row in rows()]
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.into_page(page, [path])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.index("N = 4096:") < text.index("N = 64:")
    (line,) = (line for line in text.splitlines() if "MNRL" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "sentence-transformers", "MNRL", "900 ms", "3 %", "300 ms", "2 %", "3.00x", "420", "30",
        "1/14",
    ]  # fmt: skip
    (line,) = (line for line in text.splitlines() if "GIST" in line)
    assert line.count("|") == 6  # no columns of the host


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cases.standard()
    assert len({case.name for case in plan}) == len(plan)
    assert all("fastclip" in case.methods for case in plan)
    assert main(["hosts", "--list", "--only", "*GIST 4096"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [
        "sentence-transformers GIST 4096", "sentence-transformers cached GIST 4096"
    ]  # fmt: skip
