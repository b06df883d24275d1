"""Rows of a run on a GPU are written at once, even if a method hangs, fails or loses the device."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.bench.importing import TINY
from support.bench.rehearsal import Limit

from bench.gpu import process, rows, steps
from bench.measure import memory, progress, runner
from bench.methods import registry
from bench.report import results


def test_cases_that_do_not_fit_in_the_time_are_named(tmp_path, monkeypatch, capsys):
    options = runner.Options(tmp_path / "test.csv", 0.05, memory=False, at_most=-1.0)
    assert runner.run([TINY], options) == []
    assert capsys.readouterr().err == f"left out for time: {TINY.name}\n"


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GemmLimit", Limit)


@pytest.mark.usefixtures("no_limit")
@pytest.mark.parametrize("installed", [False, True])
def test_without_a_terminal_each_case_prints_a_message(installed, tmp_path, monkeypatch, capsys):
    if not installed:
        monkeypatch.setattr(progress, "tqdm", None)
    options = runner.Options(tmp_path / "test.csv", 0.05, memory=False)
    plan = [replace(TINY, methods=("dense",)), replace(TINY, n=64, methods=("dense",))]
    runner.run(plan, options)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{done}/2 rows, now {case.name}" for done, case in enumerate(plan)]


@pytest.mark.usefixtures("no_limit")
def test_a_lost_device_ends_the_run_and_the_rows_name_the_method(tmp_path, monkeypatch):
    """A kernel's failure is raised by the wait for the device, in the turn of its own method."""
    lost = []

    def make(case, device):
        def loss(*inputs):
            lost.append(None)
            return inputs[0].sum() * inputs[2]

        return loss

    def wait_for(device: str) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access")

    dense = registry.METHODS["dense"]
    monkeypatch.setitem(registry.METHODS, "memeff", replace(dense, name="memeff", make=make))
    monkeypatch.setattr(runner, "wait_for", wait_for)
    case = replace(TINY, methods=("dense", "memeff", "fastclip torch"))
    path = tmp_path / "test.csv"
    with pytest.raises(runner.DeviceLost):
        runner.run([case], runner.Options(path, 0.05, memory=False))
    found = {row.method: row for row in results.read(path)}
    assert list(found) == ["dense", "memeff"], "later methods are not blamed"
    assert found["memeff"].note.startswith("device lost: RuntimeError: CUDA error")
    # A new process leaves out the method that failed, and measures cases that have no time yet.
    left = rows.remaining([case], results.read(path), without=[])
    assert [one.methods for one in left] == [("dense", "fastclip torch")]
    other = replace(TINY, m=64, n=64, methods=("memeff", "dense"))
    assert rows.remaining([other], results.read(path), [])[0].methods == ("dense",)
    assert rows.remaining([other], [], ["dense"])[0].methods == ("memeff",)
    lost.clear()
    runner.run(left, runner.Options(path, 0.05, memory=False))
    assert rows.remaining([case], results.read(path), without=[]) == []
    assert rows.failures(results.read(path)) == []


HANGS = """
import dataclasses, sys, time
from bench.methods import registry
from bench.gpu import cases, rows
rows.PATIENCE = 5.0
cases.GROUPS["small"] = lambda: [
    cases.Case("clip", 32, 32, 8, "float32", 14.3, methods=("dense", "memeff"))
]
dense = registry.METHODS["dense"]
hangs = lambda case, device: lambda *inputs: time.sleep(60)
registry.METHODS["memeff"] = dataclasses.replace(dense, name="memeff", make=hangs)
sys.exit(rows.main(["small", "--device", "cpu", "--out", sys.argv[1]]))
"""


def test_a_method_that_hangs_ends_its_process_and_is_not_tried_again(tmp_path):
    environment = {**os.environ, "FASTCLIP_BENCH_BEGAN": "2000-01-01 00:00"}

    def ended() -> tuple[int, dict[str, results.Row]]:
        command = [sys.executable, "-c", HANGS, str(tmp_path)]
        done = subprocess.run(command, cwd=process.ROOT, env=environment, timeout=50)
        (path,) = tmp_path.glob("*.csv")
        return done.returncode, {row.method: row for row in results.read(path)}

    code, found = ended()
    assert code == steps.LOST_STATUS and found["memeff"].note == "device lost: no answer within 5 s"
    code, found = ended()
    assert code == 0 and found["dense"].ms is not None and found["memeff"].ms is None


@pytest.mark.usefixtures("no_limit")
def test_rows_are_written_before_memory_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "test.csv"
    seen = []

    def measure(case, method, device):
        seen.append([(row.method, row.ms is not None) for row in results.read(path)])
        return None, "memory: cut here"

    monkeypatch.setattr(memory, "measure", measure)
    case = replace(TINY, methods=("dense", "fastclip torch"), memory=True)
    runner.run([case], runner.Options(path, 0.05))
    assert seen[0] == [("dense", True), ("fastclip torch", True)]
    assert results.read(path)[0].note == "memory: cut here"


@pytest.mark.usefixtures("no_limit")
def test_a_failure_in_a_round_is_a_note_of_all_that_took_part(tmp_path, monkeypatch):
    def interleaved(*arguments):
        raise torch.OutOfMemoryError("33 GiB")

    monkeypatch.setattr(runner, "interleaved", interleaved)
    case = replace(TINY, methods=("dense", "fastclip torch"))
    found = runner.run([case], runner.Options(tmp_path / "test.csv", 0.05, memory=False))
    assert [row.note for row in found] == ["OutOfMemoryError: 33 GiB"] * 2
    assert [row.method for row in rows.failures(found)] == ["fastclip torch"]
