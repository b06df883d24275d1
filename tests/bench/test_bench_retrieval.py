"""The benchmark of retrieval: its plan, its steps, its rows and its page."""

from pathlib import Path

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.__main__ import main
from bench.report import results
from bench.retrieval import cases, table
from bench.retrieval.row import Row


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cases.standard()
    assert len({case.name for case in plan}) == len(plan)
    assert all({"product", "fastclip"} <= set(case.methods) for case in plan)
    assert main(["retrieval", "--list", "--only", "topk 100*"]) == 0
    assert capsys.readouterr().out.strip() == "topk 100 10000 x 50000 x 512 float32"


@pytest.mark.parametrize("case", cases.quick(), ids=lambda case: case.name)
def test_every_method_runs(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CHUNK", 1 << 12)
    small = cases.Case(case.task, 40, 70 if case.k else 40, 8, k=min(case.k, 3))
    for method in ("product", "chunked", "fastclip"):
        if method == "product" or method in cases.TASKS[case.task]:
            cases.make_step(small, method)()


def test_the_table_of_a_page(tmp_path: Path) -> None:
    path, page = tmp_path / "m.csv", tmp_path / "page.md"
    made = [
        Row(machine="m", when="2026-11-28 10:00", task="topk", k=5, m=1000, n=2000, d=8,
            dtype="float32", method=method,
            ms=ms, low_ms=ms, high_ms=ms, rounds=3, over_product=ms / 10, peak_mib=4.0)
        for method, ms in (("product", 10.0), ("fastclip", 12.0))
    ]  # fmt: skip
    results.write(path, made, Row)
    assert [row.key for row in results.read(path, Row)] == [row.key for row in made]
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.into_page(page, [path])
    text = page.read_text()
    assert text.startswith("before") and "old" not in text
    (line,) = (line for line in text.splitlines() if "fastclip" in line and "topk" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "topk, k = 5", "1,000 x 2,000 x 8, float32", "fastclip", "12.0 ms", "0 %", "1.20", "4.0",
    ]  # fmt: skip
