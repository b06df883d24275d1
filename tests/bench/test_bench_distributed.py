"""The benchmark across processes: bytes and errors are right, rows survive the CSV, and tables show
only what rows hold."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from support.bench.importing import ROOT, rows_of_a_case
from support.ranks import bench

from bench import __main__ as command
from bench.distributed import check, table
from bench.distributed.cases import Case
from bench.distributed.rank import GATHER, HOP, SCATTER, SINGLE, SMALL
from bench.distributed.row import Row
from bench.losses import LOSSES
from bench.measure.timing import Timing
from bench.report import results
from bench.scale import model


def test_what_a_rank_sends_is_counted_once(two):
    """Two ranks exchange 240 bytes, by every function of torch.distributed and in a backward."""
    first, second = two.run(bench.counted)
    assert first.pop("broadcast") == {} and second.pop("broadcast") == {"broadcast": 240}
    # gloo has no reduce-scatter for torch.distributed.nn, which scatters each rank's instead.
    both_ways = {"all_gather": 240, "scatter": 240}
    assert first == second == {
        "all_gather": {"all_gather": 240},
        "into one tensor": {"all_gather": 240},
        "reduce_scatter": {"reduce_scatter": 120},
        "reduce_scatter of a list": {"reduce_scatter": 120},
        "all_reduce": {"all_reduce": 240},
        "all_to_all": {"all_to_all": 120},
        "hop": {"send": 240},
        "differentiable": both_ways,
    }  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_case_is_measured_and_right(two, loss):
    case = Case(loss, 2, 24, 64)
    first, second = two.run(bench.measured, case, "fastclip", "fastclip ring")
    for method in ("fastclip", "fastclip ring"):
        assert max(first.errors[method]) < 2e-6 and method not in second.errors
        # Both ranks have the slower one's times, and the rounds on which the first one decided.
        assert first.times[method] == second.times[method]
        assert first.times[method].rounds >= 3
        job = model.Job(2, case.b, case.d, case.itemsize)
        # With 1 byte a second and no work to do, seconds are bytes.
        bytes_alone = model.Loopback(float("inf"), 1, 1, 1, 0)
        predict = model.ring_seconds if "ring" in method else model.gathered_seconds
        stated = predict(job, bytes_alone)
        assert stated <= first.sent[method] <= stated + 64 * case.b + 512


def test_a_gradient_that_one_rank_makes_wrong_shows(two):
    """The gradient of the second of two ranks is a tenth too small."""
    (found, _) = two.run(bench.with_a_wrong_rank, Case("clip", 2, 24, 64))
    assert found["fastclip"][0] == pytest.approx(0.1 / 2**0.5, rel=0.3)
    assert found["fastclip"][1] < 2e-6


def test_the_command_line_measures_in_processes_of_its_own(tmp_path):
    path = tmp_path / "test.csv"
    wanted = ("--quick", "--only", "clip 2 ranks 256*memory", "--methods", "fastclip ring")
    line = [sys.executable, "-m", "bench", "distributed", *wanted, "--csv", str(path)]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (row,) = results.read(path, Row)
    assert (row.method, row.ranks, row.b, row.ms) == ("fastclip ring", 2, 256, None)
    # Texts are sent twice, gradients once. Each has 0.5 MiB, and a rank holds a few of them.
    assert 1.5 <= row.sent_mib < 1.6 and row.note in (
        "",
        "memory: cannot be measured on this machine",
    )
    assert row.peak_mib is None or 1 < row.peak_mib < 16


def test_the_command_line_lists(capsys):
    assert command.main(["distributed", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "clip 2 ranks 2048x512 float32: open_clip, fastclip, fastclip ring" in listed
    assert "siglip 8 ranks 1024x512 float32 memory: open_clip, open_clip gather" in listed
    assert "fastclip ring, fastclip ring budget=0" in listed
    with pytest.raises(SystemExit, match="no case matches"):
        command.main(["distributed", "--only", "no such case"])


# ---- tables


def rows(**changes: object) -> list[Row]:
    """Rows with invented figures."""
    base = Row(
        machine="test-machine", cpu="Test CPU", threads=1, capability="AVX512", torch="2.13.0",
        python="3.11.7", compiler="g++ 12", when="2026-01-02 03:04", loss="clip", ranks=2, b=2048,
        d=512, dtype="float32", method="open_clip", ms=700.0, low_ms=690.0, high_ms=720.0, rounds=5,
        over_open_clip=1.0, sent_mib=16.0, peak_mib=179.0, err_dx=2e-7, err_dscale=1e-8,
    )  # fmt: skip
    fast = replace(
        base, method="fastclip", ms=200.0, low_ms=190.0, high_ms=210.0, over_open_clip=3.5,
        sent_mib=8.0, peak_mib=77.0, err_dx=1e-7, predicted_ms=150.0,
    )  # fmt: skip
    small = replace(fast, b=1024, ms=None, over_open_clip=None, predicted_ms=None)
    more = [replace(small, ranks=ranks, peak_mib=10.0 * ranks) for ranks in (1, 8)]
    return [replace(row, **changes) for row in (base, fast, replace(fast, ranks=4), *more)]


def test_rows_survive_the_csv_and_are_told_from_those_of_one_process(tmp_path):
    path, other = tmp_path / "distributed.csv", tmp_path / "one.csv"
    results.write(path, rows(), Row)
    assert results.read(path, Row) == rows()
    results.write(other, rows_of_a_case())
    assert results.holds(path, Row) and not results.holds(other, Row)
    with pytest.raises(ValueError, match="expected the columns"):
        results.read(path)
    again = replace(rows()[1], ms=1.0)
    merged = results.merge(rows(), [again, replace(again, dtype="bfloat16")])
    assert [row.ms for row in merged] == [700.0, 1.0, 200.0, None, None, 1.0]


def test_the_report_and_the_page_show_times_bytes_memory_and_predictions(tmp_path, capsys):
    path, page = tmp_path / "test.csv", tmp_path / "docs" / "benchmarks-distributed.md"
    results.write(path, rows(), Row)
    assert command.main(["table", "--csv", str(path)]) == 0
    report = capsys.readouterr().out
    line = next(line for line in report.splitlines() if "| fastclip " in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:7] == ["2", "1", "2048", "512", "fastclip", "200 ms", "5 %"]
    assert "3.50x" in cells and "150 ms" in cells and "77" in cells and "1.0e-07" in cells

    page.parent.mkdir()
    page.write_text(f"before\n{table.BEGIN}\nold figures\n{table.END}\nafter\n")
    arguments = ["readme", "--csv", str(path), "--pages", str(tmp_path)]
    assert command.main(arguments) == 0
    once = page.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old figures" not in once
    assert "threads of each rank with 1 rank: 1" in once and "Test CPU, AVX512" in once
    lines = {
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in once.splitlines()
        if line.startswith("| ")
    }
    fast = ("200 ms (3.50x)", "200 ms (3.50x)", "8.0", "8.0", "77", "77", "1.0e-07")
    assert ("CLIP, float32", "2048", "fastclip", *fast) in lines
    assert ("fastclip", "10", "80") in lines and ("method", "1 rank", "8 ranks") in lines
    assert any(line[3:6] == ("200 ms", "150 ms", "75 %") for line in lines)
    assert command.main(arguments) == 0
    assert page.read_text() == once


# ---- predictions


def test_a_prediction_is_the_work_and_the_exchanges_one_after_the_other():
    case = Case("clip", 4, 2048, dtype="bfloat16")
    seconds = {SINGLE: 0.06, GATHER: 0.03, SCATTER: 0.05, HOP: 0.01, SMALL: 0.002}
    times = {name: Timing(value, value, value, 3) for name, value in seconds.items()}
    assert check.predicted_ms(case, "open_clip", times) is None
    # All products fit in the budget, in one process and across ranks: 3 passes in both.
    gathered = 4 * 60 + 30 + 50 + 6 * 2
    assert check.predicted_ms(case, "fastclip", times) == pytest.approx(gathered)
    # Three hops of half-precision texts, forward and backward, and of fp32 gradients.
    ring = 4 * 60 + 3 * (10 + 10 + 20) + 6 * 2
    assert check.predicted_ms(case, "fastclip ring", times) == pytest.approx(ring)
    # SigLIP's gathered gradients are made in the forward, and no states are exchanged.
    siglip = replace(case, loss="siglip", dtype="float32")
    gathered = 4 * 60 + 30 + 50 + 2
    assert check.predicted_ms(siglip, "fastclip", times) == pytest.approx(gathered)
    ring = 4 * 60 + 3 * (10 + 10 + 10) + 2 * 2
    assert check.predicted_ms(siglip, "fastclip ring", times) == pytest.approx(ring)
    # The budget keeps a quarter of 1 GiB of products.
    larger = replace(case, b=8192)
    assert check.passes(larger, "fastclip ring") == check.passes(larger, "fastclip") == 3.75
    assert check.passes(case, "fastclip") == 3
    larger = replace(larger, loss="siglip", dtype="float32")
    assert check.passes(larger, "fastclip ring") == 3.75 and check.passes(larger, "fastclip") == 3
