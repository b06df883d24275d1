"""The benchmark from the plan to the CSV: no row is lost if a method fails or is missing."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.bench.importing import ROOT, TINY, rows_of_a_case

from bench import __main__ as command
from bench.cases import Case
from bench.measure import runner
from bench.measure.timing import Timing
from bench.methods import registry
from bench.report import results
from bench.report.results import Row


def test_a_tiny_plan_runs_end_to_end(tmp_path, monkeypatch):

    def broken(case: Case, device: str) -> registry.LossFunction:
        def loss(*inputs: object) -> torch.Tensor:
            raise ValueError("broken\non purpose")

        return loss

    monkeypatch.setitem(
        registry.METHODS, "checkpoint", replace(registry.METHODS["checkpoint"], make=broken)
    )
    case = replace(TINY, methods=("dense", "checkpoint", "fastclip torch", "siglip_kernel"))
    options = runner.Options(tmp_path / "test.csv", seconds=0.05, memory=False)
    runner.run([case], options)
    rows = {row.method: row for row in results.read(options.path)}
    assert list(rows) == ["dense", "checkpoint", "fastclip torch", "siglip_kernel"]
    for method in ("dense", "fastclip torch"):
        row = rows[method]
        assert 0 < row.low_ms <= row.ms <= row.high_ms and row.rounds >= 3
        assert row.gflops == pytest.approx(row.passes * 2 * 32 * 32 * 16 / row.ms / 1e6, rel=1e-3)
        assert row.fraction == pytest.approx(row.gflops / row.limit, rel=1e-3)
        assert row.over_dense == pytest.approx(rows["dense"].ms / row.ms, rel=1e-3)
        assert max(row.err_loss, row.err_dx, row.err_dy, row.err_dscale) < 1e-5
        assert row.err_dx > 0 and row.note == ""
    assert rows["checkpoint"].note == "ValueError: broken" and rows["checkpoint"].ms is None
    assert rows["siglip_kernel"].mode == "skipped" and rows["siglip_kernel"].note

    runner.run([replace(case, methods=("dense",))], options)
    assert len(results.read(options.path)) == 4


def test_figures_follow_from_times(tmp_path, monkeypatch):
    """Three passes of 2 x 32 x 32 x 16 FLOPs in 1.6384 us are 60 GFLOP/s, 0.6 of the limit. At the
    rate of the four passes that two sweeps take without kept products it would be 0.8."""
    times = {"fastclip": Timing(1.6384e-6, 1.5e-6, 2e-6, 5), "dense": Timing(3.2768e-6, 0, 0, 5)}
    monkeypatch.setattr(runner, "interleaved", lambda *arguments: times)
    limit = SimpleNamespace(sample=None, take=lambda: 100.0, source="invented")
    shared = runner.Run(runner.Options(tmp_path / "a.csv"), Row(), limits={False: limit})
    rows = {name: Row(passes=3.0) for name in times}
    runner._set_times(TINY, dict.fromkeys(times), rows, shared)
    row = rows["fastclip"]
    found = (row.ms, row.low_ms, row.high_ms, row.gflops, row.fraction, row.fraction_of_4)
    assert found == pytest.approx((1.6384e-3, 1.5e-3, 2e-3, 60.0, 0.6, 0.8), rel=1e-12)
    assert row.over_dense == pytest.approx(2.0) and row.over_open_clip is None
    assert (row.rounds, row.limit, row.limit_of) == (5, 100.0, "invented")


def test_the_rest_is_beyond_gradients_and_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.memory, "measure", lambda *case: (3 << 20, ""))
    monkeypatch.setattr(runner, "kept_bytes", lambda *case: 1 << 20)
    monkeypatch.setattr(runner, "gradient_bytes", lambda case: 1 << 19)
    shared, row = runner.Run(runner.Options(tmp_path / "a.csv"), Row()), Row()
    runner._set_memory(TINY, "fastclip", row, shared)
    assert (row.peak_mib, row.gradients_mib, row.budget_mib, row.rest_mib) == (3, 0.5, 1, 1.5)


def test_the_command_line_measures(tmp_path):
    path = tmp_path / "test.csv"
    wanted = ("--quick", "--only", "clip 32x32*", "--methods", "dense", "fastclip torch")
    line = [sys.executable, "-m", "bench", *wanted, "--csv", str(path), "--seconds", "0.05"]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}  # `-m` finds it in the working directory
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "## CLIP, N = 32, D = 512, float32: forward and backward" in done.stdout
    assert {row.method for row in results.read(path)} == {"dense", "fastclip torch"}


def test_the_command_line_lists_and_tells_what_is_wrong(tmp_path, capsys):
    assert command.main(["--list", "--full"]) == 0
    listed = capsys.readouterr().out
    assert "clip 65536x65536x512 float32 random 14.3 both" in listed
    assert "fastclip torch" in listed and "runs here" in listed
    with pytest.raises(SystemExit, match="no case matches"):
        command.main(["--only", "no such case"])
    with pytest.raises(SystemExit, match="'dens' is none of open_clip, dense"):
        command.main(["--methods", "dens"])
    path = tmp_path / "test.csv"
    results.write(path, rows_of_a_case())
    assert command.main(["table", "--csv", str(path)]) == 0
    assert capsys.readouterr().out.startswith("# test-machine")
