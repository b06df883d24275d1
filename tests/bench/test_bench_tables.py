"""The benchmark's rows survive the CSV, and no table says more than they do."""

from dataclasses import replace

import pytest
from support.bench.importing import rows_of_a_case

from bench.cases import CONTRAST
from bench.report import goals, results, table
from bench.report.results import Row


def test_rows_survive_the_csv_and_later_ones_replace_earlier_ones(tmp_path):
    path = tmp_path / "folder" / "test.csv"
    rows = rows_of_a_case()
    results.write(path, rows)
    assert results.read(path) == rows
    again = replace(rows[0], ms=1.0)
    merged = results.merge(rows, [again, replace(again, scale=100.0)])
    assert [row.ms for row in merged] == [1.0, 3000.0, 1250.0, None, 1.0]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected the columns .* got \['a', 'b'\]"):
        results.read(path)


def test_the_report_shows_time_ratio_memory_and_what_did_not_run():
    text = table.report(rows_of_a_case())
    fast = next(line for line in text.splitlines() if "| fastclip " in line)
    cells = [cell.strip() for cell in fast.strip("|").split("|")]
    assert cells[:4] == ["14.3", "fastclip", "1.25 s", "4 %"]
    assert "3.20x" in cells and "90 %" in cells and "290" in cells and "2.0e-07" in cells
    assert "Test CPU, 2 threads, AVX512; torch 2.13.0" in text and "g++ 12" in text
    assert "Not measured here: memeff (no GPU, here)." in text


def test_goals_are_reached_missed_or_not_measured():
    def verdicts(rows: list[Row]) -> dict[str, str]:
        cells = [line.strip("|").split("|") for line in goals.table_of(rows).splitlines()[2:]]
        return {line[0].strip(): line[-1].strip() for line in cells}

    found = verdicts(rows_of_a_case())
    assert found["CLIP float32, N = 8192: faster than open_clip"] == "aim"
    near = "CLIP float32, N = 8191, 8192, 8193: of the GEMM limit"
    assert found[near] == "not measured", "two of its sizes are missing"
    every = [row for n in (8191, 8192, 8193) for row in rows_of_a_case(m=n, n=n)]
    assert verdicts(every)[near] == "floor"
    assert found["CLIP float32: rms of gradient errors over the dense loss's"] == "aim"
    assert found["CLIP float32, N = 65536: seconds"] == "not measured"
    assert list(found) == [goal.text for goal in goals.CPU_GOALS]
    both = rows_of_a_case() + rows_of_a_case(scale=100.0, over_open_clip=1.5, err_dx=1e-6)
    found = verdicts(both)
    assert found["CLIP float32, N = 8192: faster than open_clip"] == "missed"
    found = verdicts(rows_of_a_case(data="separated"))
    assert found.pop("CLIP float32, separated pairs: gradient errors") == "aim"
    assert set(found.values()) == set(verdicts([]).values()) == {"not measured"}
    # They are goals for CPUs.
    assert not set(verdicts(rows_of_a_case(capability="sm_90"))) & {g.text for g in goals.CPU_GOALS}


def test_provenance_names_threads_or_the_card():
    assert ", 2 threads, AVX512" in table.provenance(rows_of_a_case())
    on_gpu = rows_of_a_case(threads=0, capability="sm_90")[:1]
    assert "Test CPU, sm_90; torch" in table.provenance(on_gpu)


def test_a_page_gets_its_tables_between_the_markers(tmp_path):
    path, readme = tmp_path / "test.csv", tmp_path / "README.md"
    results.write(path, rows_of_a_case())
    readme.write_text(f"before\n{table.BEGIN}\nold figures\n{table.END}\nafter\n")
    table.into_page(readme, [path])
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n")
    assert "old figures" not in once and "1.25 s" in once and "Test CPU" in once
    table.into_page(readme, [path])
    assert readme.read_text() == once
    readme.write_text(f"{table.END} {table.BEGIN}")
    with pytest.raises(SystemExit, match="expected the markers"):
        table.into_page(readme, [path])


def test_a_page_shows_methods_that_only_a_card_has(tmp_path):
    rows = [*rows_of_a_case(), replace(rows_of_a_case()[0], method="fastclip triton split", ms=2.0)]
    lines = table.essentials(rows, tmp_path / "test.csv").splitlines()
    found = [line for line in lines if line.startswith("| fastclip triton split")]
    assert len(found) == 1 and "2.00 ms" in found[0]


def test_a_page_says_what_a_loss_on_contrast_costs(tmp_path):
    rows, measured = rows_of_a_case(), {CONTRAST[0]: 1500.0, CONTRAST[2]: 2500.0}
    rows += [replace(rows[2], method=method, ms=ms) for method, ms in measured.items()]
    # At scale 100 no method on `contrast` was measured: the table has no line for it.
    rows += [replace(row, scale=100.0) for row in rows[:3]]
    text = table.essentials(rows, tmp_path / "test.csv")
    found = [line for line in text.splitlines() if "1.50 s" in line or "fastclip contrast" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    assert cells == [
        ["N = 8192, D = 512", "fastclip", *CONTRAST],
        ["CLIP, float32, scale 14.3", "1.25 s", "1.50 s (1.20x)", "", "2.50 s (2.00x)"],
    ]


def test_a_picture_needs_two_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.report import plot

    rows = rows_of_a_case()
    for draw in (plot.draw, plot.draw_summary):
        assert draw(rows, tmp_path / "one.png") is None
        path = draw(rows + rows_of_a_case(m=2048, n=2048), tmp_path / "two.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
