"""The benchmark from the plan to the CSV: no row is lost if a method fails or is missing."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.bench.importing import ROOT, TINY, rows_of_a_case

from bench import __main__ as command
from bench.cases import Case
from bench.measure import runner
from bench.methods import registry
from bench.report import results


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
