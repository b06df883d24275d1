"""The bench's part for CUDA devices, as far as it can be judged without one."""

import sys
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_import import TINY, rows_of_a_case

from bench import baselines, cases, goals, gpu, memory, progress, results, runner, tiles, timing


class FakeEvent:
    """A device whose time is that of the runs that were queued before the event."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = None

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


def test_the_devices_clock_gives_seconds_of_one_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    calls = []

    def run() -> None:
        calls.append(None)
        FakeEvent.now += 0.25

    assert timing.cuda_clock(run, 1) == 0.25
    assert timing.cuda_clock(run, 4) == 0.25 and len(calls) == 5
    # A run too short for one measurement is repeated within it, on this clock.
    found = timing.interleaved({"a": run}, seconds=0, clock=timing.cuda_clock)["a"]
    assert (found.median, found.rounds) == (0.25, timing.FEWEST_ROUNDS)


def test_memory_on_a_gpu_is_torchs_own_peak_in_this_process(monkeypatch):
    level, peak = [100], [100]
    monkeypatch.setattr(memory.subprocess, "run", None)  # no process of its own
    monkeypatch.setattr(memory, "make_inputs", lambda case, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: level[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 100))

    def make_step(case: cases.Case, method: str, inputs: None):
        def step() -> None:
            peak[0] = max(peak[0], 100 + (7000 if case.m < TINY.m * 2 else 400))
            if method == "too large":
                raise torch.OutOfMemoryError("33 GiB")

        return step

    monkeypatch.setattr(memory, "make_step", make_step)
    large = cases.Case("clip", 512, 512, 16, "float32", 14.3)
    monkeypatch.setattr(memory, "WARM_UP_PAIRS", 8)  # whose peak does not count
    assert memory.measure(large, "dense", "cuda") == (400, "")
    assert memory.measure(large, "too large", "cuda") == (None, "memory: OutOfMemoryError")


def test_a_gpus_rows_are_told_from_a_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    row = results.machine_row("cuda")
    assert (row.machine, row.cpu) == ("nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3")
    assert row.on_gpu and (row.capability, row.threads) == ("sm_90", 0)
    assert not results.machine_row("cpu").on_gpu


def test_the_cases_are_those_of_the_tables_and_the_large_ones_last():
    plan = cases.gpu()
    assert [case.n for case in plan] == sorted(case.n for case in plan)
    assert len({case.name for case in plan}) == len(plan)
    # Those the README's tables are made of, and the ones that a streaming loss is for.
    widths = {(case.d, case.n > 8192) for case in plan if case.n < 1 << 20}
    assert widths == {(512, False), (768, True)} and plan[-1].n == 1 << 20
    assert {(case.loss, case.dtype, case.scale) for case in plan if case.n == 8192} == {
        (loss, dtype, scale)
        for loss in cases.LOSSES
        for dtype in ("bfloat16", "float32")
        for scale in cases.SCALES
    }
    assert all("fastclip" in case.methods for case in plan)
    dense = [case for case in plan if 2048 <= case.n < 1 << 20 and case.mode == "both"]
    assert all(case.memory and "memeff" in case.methods for case in dense)
    for group in (gpu.CARD_TESTS, gpu.LOSS_TESTS):
        assert all((gpu.ROOT / file).exists() for file in group)


def test_graphs_are_timed_where_a_step_waits_for_launches():
    graphs = [case for case in cases.gpu() if case.mode == "graph"]
    assert {(case.loss, case.n) for case in graphs} == {
        (loss, n) for loss in cases.LOSSES for n in (256, 512, 1024, 2048)
    }
    assert all({"open_clip", "fastclip"} <= set(case.methods) for case in graphs)


def test_a_replayed_step_returns_what_it_captured(monkeypatch):
    """A graph that runs its capture again, in the place of CUDA's."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replays = []
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(), "graph": lambda g: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(None)),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    steps = iter(range(100))
    replay = baselines._captured(lambda: next(steps), "cuda")
    assert (replay(), replay(), len(replays)) == (3, 3, 2), "three runs before the captured one"
    with pytest.raises(baselines.Unavailable, match="need a CUDA device"):
        baselines._captured(lambda: None, "cpu")


def test_the_cards_goals():
    """Ratios on any card, milliseconds on the one that they were set for."""

    def verdicts(rows: list[results.Row]) -> dict[str, str]:
        cells = [line.strip("|").split("|") for line in goals.table_of(rows).splitlines()[2:]]
        return {line[0].strip(): line[-1].strip() for line in cells}

    card = {"threads": 0, "capability": "sm_90", "dtype": "bfloat16"}
    large = rows_of_a_case(**card, m=32768, n=32768, d=768, cpu="NVIDIA H100 80GB HBM3")
    found = verdicts(large)
    assert not any("milliseconds" in goal for goal in found)
    assert found["CLIP bfloat16, 32768 x 768: faster than open_clip"] == "aim"
    assert found["CLIP bfloat16, 32768 x 768: of the GEMM limit"] == "aim"
    assert found["CLIP bfloat16, 65536 x 768: of the GEMM limit"] == "not measured"
    compiled = replace(large[1], method="compiled", peak_mib=2000.0)
    assert verdicts([*large, compiled])["the same: memory over torch.compile's"] == "missed"
    for milliseconds, verdict in ((9.5, "aim"), (11.0, "floor"), (13.0, "missed")):
        rows = [replace(row, cpu="NVIDIA H200", ms=milliseconds) for row in large]
        assert verdicts(rows)["CLIP bfloat16, 32768 x 768: milliseconds"] == verdict
    small = [row for n in (256, 512, 1024) for row in rows_of_a_case(**card, m=n, n=n)]
    text = "CLIP bfloat16, N = 256 .. 2048: faster than open_clip"
    assert verdicts(small)[text] == "not measured"
    small += rows_of_a_case(**card, m=2048, n=2048, over_open_clip=1.2)
    assert verdicts(small)[text] == "floor"
    assert verdicts(small)[text.replace("2048:", "2048 in a CUDA graph:")] == "not measured"


def test_tile_candidates_are_written_with_their_times(tmp_path):
    key = ("cuda:0", torch.bfloat16, False, 768, 8, "sweep")
    config = namedtuple("Config", "bm bn bk")  # as the engine's, which needs Triton
    rows = tiles.rows_of({key: {config(128, 256, 64): 1.25, config(128, 128, 64): float("inf")}})
    tiles.write(tmp_path / "tiles.csv", rows)
    assert (tmp_path / "tiles.csv").read_text().split() == [
        "kernel,n,d,bm,bn,bk,ms",
        "sweep,32768,768,128,256,64,1.2500",
        "sweep,32768,768,128,128,64,inf",
    ]


def test_it_goes_into_out_by_the_same_runner(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "CASE_SECONDS", 0.05)
    case = cases.replace(TINY, methods=("dense", "fastclip torch", "siglip_kernel"))
    rows, path = gpu.bench([case], "cpu")
    assert path.parent == tmp_path and results.read(path)[0].method == "dense"
    assert [row.mode for row in rows] == ["both", "both", "skipped"]
    assert all(row.ms > 0 and row.err_dx < 1e-5 for row in rows[:2])
    report = gpu.report("passed", rows, path)
    assert report.splitlines()[-1].startswith("| clip 32x32 float32 ")
    assert "tests on the device: passed" in report and "not run: needs a CUDA device" in report


def test_cases_that_do_not_fit_in_the_time_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "tqdm", None)
    options = runner.Options(tmp_path / "test.csv", 0.05, memory=False, at_most=-1.0)
    assert runner.run([TINY], options) == []
    assert capsys.readouterr().err == f"left out for time: {TINY.name}\n"


def test_a_line_for_each_case_where_tqdm_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "tqdm", None)
    options = runner.Options(tmp_path / "test.csv", 0.05, memory=False)
    plan = [cases.replace(TINY, methods=("dense",)), cases.replace(TINY, n=64, methods=("dense",))]
    runner.run(plan, options)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{done}/2 rows, now {case.name}" for done, case in enumerate(plan)]


def test_the_tests_end_is_told(monkeypatch):
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    device = "import os, sys; sys.exit(os.environ['FASTCLIP_TEST_DEVICE'] != 'cuda')"
    assert gpu.run_tests(python(device)) == "passed"
    assert gpu.run_tests(python("raise SystemExit(3)")) == "FAILED: pytest ended with 3"
    hangs = python("import time; time.sleep(60)")
    assert gpu.run_tests(hangs, 0.2) == "FAILED: not done in 0.2 s"
    assert gpu.run_tests(hangs, 0.2, to_the_end=False) == "passed for 0.2 s"
    failing = python("raise SystemExit(1)")
    assert gpu.run_tests(failing, 9, to_the_end=False) == "FAILED: pytest ended with 1"
    monkeypatch.setattr(gpu, "TEST_PACKAGES", ("pytest", "no_such_package"))
    assert gpu.run_tests(hangs) == "not run: no_such_package is not installed"


@pytest.mark.parametrize(
    ("tests", "status"), [("passed", 0), ("not run: pytest is not installed", 0), ("FAILED", 1)]
)
def test_what_is_missing_is_no_failure(tests, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda command, *seconds, **end: tests)
    rows = rows_of_a_case()
    rows[-1].note = "open_clip is not installed"
    monkeypatch.setattr(gpu, "bench", lambda plan, device: (rows, tmp_path / "gpu.csv"))
    assert gpu.main([]) == status
    out = capsys.readouterr().out
    assert "not run: open_clip is not installed\n" in out and tests in out
    assert out.splitlines()[-1].startswith("| clip 8192x8192 float32 ")


def test_without_a_device_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--check"]):
        assert gpu.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "finds no CUDA device" in captured.err
        assert captured.out == ""


def test_a_method_of_ours_that_fails_is_named_and_ends_in_failure():
    rows = rows_of_a_case()
    assert gpu.broken(rows) == []
    rows[2] = replace(rows[2], ms=None, note="RuntimeError: an illegal memory access")
    report = gpu.report("passed", rows, Path("test.csv"))
    assert "FAILED: fastclip on clip 8192: RuntimeError: an illegal memory access" in report
    # Of others it is told in the table.
    rows[1] = replace(rows[1], ms=None, note="OutOfMemoryError")
    assert [row.method for row in gpu.broken(rows)] == ["fastclip"]
