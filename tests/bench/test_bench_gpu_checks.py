"""What the steps of `make gpu` find: each finding is right, no wrong engine is overlooked."""

import argparse
import importlib.util
import itertools
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.bench.importing import relative
from support.bench.rehearsal import NCU, Config, Configurations, tile_step

import fastclip
from bench.gpu import counters, figures, kernels, rates, smoke, tiles, winners
from bench.losses import LOSSES, loss_of
from fastclip.engine import preference
from fastclip.engine.block import Block, Side

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton"
)  # fmt: skip


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, which: int, factor: float):
    """One of an engine's results, off by a factor."""
    step = smoke.Problem.step

    def wrong(self, *arguments):
        results = list(step(self, *arguments))
        results[which] = results[which] * factor
        return tuple(results)

    with monkeypatch.context() as patch:
        patch.setattr(smoke.Problem, "step", wrong)
        yield


@pytest.mark.parametrize("dtype", smoke.DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_smoke_passes_a_right_engine_and_no_wrong_one(loss, dtype, monkeypatch):
    half = dtype != "float32"
    for normalize in (False, True):
        problem = smoke.Problem(loss, smoke.DTYPES[dtype], normalize, 65, 24, 100.0, "cpu")
        found = smoke.judge(problem, "torch")
        assert found["status"] == "passed", found
        # Of a gradient in bf16 half a percent is rounding; of the others nothing is.
        for which, factor in ((0, 1 + 1e-4), (1, 1.01 if half else 1 + 1e-4), (2, float("nan")),
                              (3, 1.001)):  # fmt: skip
            with broken(monkeypatch, which, factor):
                found = smoke.judge(problem, "torch")
            assert found["status"] == "FAILED", (which, found)
            assert found["of"].startswith(smoke.NAMES[which])


def rounded(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Features as a product in tf32 takes them, to nearest; the gradient is that of the result."""
    features = (leaf.detach() for leaf in leaves[:2])
    bits = (((leaf.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for leaf in features)
    return [*(leaf.requires_grad_() for leaf in bits), *leaves[2:]]


@pytest.mark.parametrize("loss", LOSSES)
def test_smoke_holds_an_engine_in_tf32_to_plain_pytorch_in_tf32(loss, monkeypatch):
    """The engine rounds features, plain PyTorch what it makes of them: a lucky one is no bound."""
    settings, step = torch.backends.cuda.matmul, smoke.Problem.step
    assert settings.fp32_precision != "tf32"
    monkeypatch.setattr(
        smoke.Problem, "step", lambda p, e, leaves, b=0: step(p, e, rounded(leaves), b)
    )
    for normalize, scale in itertools.product((False, True), smoke.SCALES):
        problem = smoke.Problem(loss, torch.float32, normalize, *smoke.SMALL, scale, "cpu")
        assert smoke.judge(problem, "torch")["status"] == "FAILED"
        with smoke.engine_of("torch tf32", None) as engine:
            found = smoke.judge(problem, engine)
            assert found["status"] == "passed", found
            with broken(monkeypatch, 3, 1.01):
                found = smoke.judge(problem, engine)
            assert found["status"] == "FAILED" and found["of"].startswith("dscale")
        assert settings.fp32_precision != "tf32"


def test_smokes_truth_is_that_of_autograd_in_float64():
    for loss in LOSSES:
        problem = smoke.Problem(loss, torch.float32, True, 33, 12, 14.3, "cpu")
        leaves = problem.leaves()
        lengths = leaves[0].detach().norm(dim=1)
        assert 0.5 <= lengths.min() < 0.8 and 1.3 < lengths.max() <= 2, "features are raw"
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        x, y = (torch.nn.functional.normalize(leaf, dim=1) for leaf in wide[:2])
        value = loss_of(loss).dense(x, y, *wide[2:], *[None] * (4 - len(wide)))
        exact = (value, *torch.autograd.grad(33 * value, wide))
        for got, expected in zip(problem.truth(leaves), exact, strict=True):
            assert relative(got, expected.detach()) < 1e-12


@pytest.mark.parametrize("lost", [None, "ids", "key_bias", "offset"])
@pytest.mark.parametrize("loss", LOSSES)
def test_smoke_asks_for_statistics_with_pairs_left_out(loss, lost, monkeypatch):
    problem = smoke.Problem(loss, torch.float32, True, 40, 12, 14.3, "cpu")
    contrast = fastclip.contrast

    def losing(*leaves, **options):
        if lost == "ids":
            options["ids"] = tuple(torch.zeros_like(side) for side in options["ids"])
        elif lost is not None:
            options[lost] = {"key_bias": None, "offset": 0}[lost]
        return contrast(*leaves, **options)

    monkeypatch.setattr(fastclip, "contrast", losing)
    found = smoke.judge_masked(problem, "torch")
    assert found["status"] == ("passed" if lost is None else "FAILED"), found
    asked = [(p.n, p.normalize) for p, check in smoke.checks(loss, "bfloat16", "cpu")
             if check == "masked"]  # fmt: skip
    assert asked == [(n, normalize) for n, _ in smoke.MASKED for normalize in (False, True)]


def test_smoke_compares_bits_and_asks_of_every_engine_the_same(monkeypatch):
    problem = smoke.Problem("clip", torch.float32, False, 33, 12, 14.3, "cpu")
    assert smoke.judge_rerun(problem, "torch") == {"status": "passed", "of": ""}
    bits = iter([1.0, 1 + 2.0**-23])
    step = smoke.Problem.step

    def unsteady(self, *arguments):
        value, dx, *others = step(self, *arguments)
        return (value, dx * next(bits), *others)

    monkeypatch.setattr(smoke.Problem, "step", unsteady)
    assert smoke.judge_rerun(problem, "torch") == {"status": "FAILED", "of": "dx"}

    on_cpu = list(smoke.checks("clip", "bfloat16", "cpu"))
    on_card = list(smoke.checks("clip", "bfloat16", "cuda"))
    assert [check for _, check in on_cpu].count("accuracy") == 24
    assert [check for _, check in on_card].count("graph") == 4
    assert {(p.n, p.d, p.normalize) for p, check in on_card if check == "kept"} == {
        (n, d, normalize) for n, d in smoke.SHAPES for normalize in (False, True)
    }
    # A cut leaves what the headline runs: large blocks come first.
    first = [(p.n, p.d, p.scale, check) for p, check in on_card[:6]]
    assert first == [
        (4099, 768, scale, check)
        for scale, check in ((14.3, "accuracy"), (100.0, "accuracy"), (14.3, "kept"),
                             (500.0, "kept"), (14.3, "rerun"), (14.3, "graph"))
    ]  # fmt: skip
    assert list(dict.fromkeys(p.n for p, _ in on_card)) == [4099, 1000, 513, 3001]
    assert smoke.jobs(["triton", "cuda fused", "triton winners"])[:2] == [
        ("triton", "clip", "bfloat16"), ("triton", "siglip", "bfloat16"),
    ]  # fmt: skip
    dtypes = {dtype for label, _, dtype in smoke.jobs(["cuda fused"])}
    assert dtypes == {"bfloat16", "float16"}
    monkeypatch.setattr(fastclip, "backends", lambda: {"triton": "available", "cuda": "no"})
    assert smoke.engines("cuda") == ["triton", "triton split", "triton tf32"]
    for label in ("triton tf32", "cuda tf32", "triton split"):
        assert smoke.jobs([label]) == [(label, loss, "float32") for loss in LOSSES]


def test_a_check_that_raises_is_a_row_and_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "SHAPES", ((17, 8),))
    path = tmp_path / "smoke.csv"
    assert smoke.work("no such engine", "clip", "float32", "cpu", path, None) == 0
    rows = figures.read(path)
    assert len(rows) == 10 and {row["status"] for row in rows} == {"FAILED"}
    assert "ValueError" in rows[0]["note"]
    lines = smoke.summary(rows, most=3)
    assert lines[0].startswith("FAILED: no such engine clip float32 False 17 8 14.3 accuracy")
    assert lines[3:] == ["... and 7 more of gpu-smoke.csv", "no such engine 0 passed, 10 failed"]

    def wait_for(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(smoke, "wait_for", wait_for)
    path.unlink()
    assert smoke.work("torch", "clip", "float32", "cpu", path, None) != 0
    assert len(figures.read(path)) == 1


@pytest.mark.parametrize(
    ("code", "seconds", "note"),
    [
        ("import os; os.abort()", 60.0, "ended with -6"),
        ("import time; time.sleep(60)", 0.5, "CUT before 4099 x 768, not done"),
    ],
)
def test_a_smoke_process_that_crashes_or_hangs_is_a_row(code, seconds, note, tmp_path, monkeypatch):
    def popen(command, start=smoke.subprocess.Popen, **more):
        return start([sys.executable, "-c", code], **more)

    monkeypatch.setattr(smoke.subprocess, "Popen", popen)
    monkeypatch.setattr(smoke, "LEAST_SECONDS", 0.0)
    options = argparse.Namespace(device="cpu", out=tmp_path, file="s.csv", winners=None)
    ends = smoke.time.monotonic() + seconds
    smoke.run_job(("triton", "clip", "bfloat16"), options, tmp_path / "s.csv", ends)
    (row,) = figures.read(tmp_path / "s.csv")
    assert row["status"] == "FAILED" and row["note"].startswith(note)
    assert smoke.unusable([row]) == ["triton"]


@pytest.mark.parametrize(("n", "dtype", "status"), [
    ("4099", "bfloat16", "cut"), ("513", "bfloat16", "FAILED"), ("513", "float32", "cut"),
])  # fmt: skip
def test_a_smoke_process_that_is_still_compiling_is_cut_and_its_engine_is_used(
    n, dtype, status, tmp_path, monkeypatch
):
    """In bf16 it is a failure before the large blocks are checked."""
    path = tmp_path / "s.csv"
    code = "import time; time.sleep(60)"

    def popen(command, start=smoke.subprocess.Popen, **more):
        row = {"engine": "triton", "loss": "clip", "dtype": dtype, "n": n, "status": "passed"}
        figures.append(path, row, smoke.COLUMNS)
        return start([sys.executable, "-c", code], **more)

    monkeypatch.setattr(smoke.subprocess, "Popen", popen)
    options = argparse.Namespace(device="cpu", out=tmp_path, file="s.csv", winners=None)
    monkeypatch.setattr(smoke, "LEAST_SECONDS", 0.0)
    smoke.run_job(("triton", "clip", dtype), options, path, smoke.time.monotonic() + 0.5)
    rows = figures.read(path)
    assert rows[-1]["status"] == status and smoke.unusable(rows) == []
    told = smoke.summary(rows)
    if status == "cut":
        assert told == ["triton 1 passed, 0 failed, 1 processes cut"]
    else:
        assert told[0].startswith("FAILED: triton clip bfloat16 large CUT before 4099 x 768")


@pytest.mark.parametrize(("dtype", "status"), [("bfloat16", "FAILED"), ("float16", "cut")])
def test_a_smoke_process_that_there_is_no_time_for_is_not_begun(
    dtype, status, tmp_path, monkeypatch
):
    """It does not hang, but a run without bf16's large blocks has not shown what it should."""
    monkeypatch.setattr(smoke.subprocess, "Popen", None)
    options = argparse.Namespace(device="cpu", out=tmp_path, file="s.csv", winners=None)
    path = tmp_path / "s.csv"
    smoke.run_job(("triton", "clip", dtype), options, path, smoke.time.monotonic() + 1)
    (row,) = figures.read(path)
    assert (row["status"], row["note"]) == (status, "left out for time")
    assert smoke.unusable([row]) == []


@needs_triton
def test_engines_of_a_label(monkeypatch):
    monkeypatch.delenv("FASTCLIP_CUDA_TILES", raising=False)
    with smoke.engine_of("cuda fused", None) as engine:
        assert (engine, os.environ["FASTCLIP_CUDA_TILES"]) == ("cuda", "fused")
    assert os.environ["FASTCLIP_CUDA_TILES"] == "library"
    with smoke.engine_of("triton", None) as engine:
        assert engine == "triton"
        assert preference.products_of(torch.float32) == "fp32"
    with smoke.engine_of("triton split", None) as engine:
        assert (engine, preference.products_of(torch.float32)) == ("triton", "split")


# ---- tiles -------------------------------------------------------------------------------------


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> Configurations:
    made = Configurations("configurations")
    monkeypatch.setitem(sys.modules, "fastclip.triton_kernels.configurations", made)
    monkeypatch.setattr(fastclip.triton_kernels, "configurations", made, raising=False)
    monkeypatch.setattr(tiles, "step", tile_step)
    monkeypatch.setattr(tiles, "compile_all", lambda device, seconds: None)
    return made


def test_candidates_take_turns_and_each_is_a_row(tmp_path, configurations, monkeypatch):
    turns = []
    monkeypatch.setitem(tiles.CLOCKS, "cpu", lambda run, repeats: turns.append(run) or 0.002)
    assert tiles.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert len(turns) == 2 * 2 * tiles.ROUNDS, "two kernels, two candidates that run"
    rows = figures.read(tmp_path / tiles.FILE)
    assert [(row["kernel"], row["default"], row["rounds"]) for row in rows[:3]] == [
        ("sweep", "1", "7"), ("sweep", "0", "0"), ("sweep", "0", "7"),
    ]  # fmt: skip
    assert rows[0]["ms"] == "2" and rows[1]["ms"] == ""
    assert rows[1]["note"] == "RuntimeError: out of resource: shared memory"
    # Whatever fields a configuration has.
    assert rows[2]["descriptors"] == "True" and rows[2]["config"] == "(128, 3, True)"
    assert configurations.choose.__qualname__ == Configurations.choose.__qualname__, "put back"


def test_tiles_written_so_far_survive_a_cut(tmp_path, configurations, monkeypatch):
    def clock(run, repeats):
        rounds = {row["rounds"] for row in figures.read(tmp_path / tiles.FILE)}
        if rounds == {"0", "2"}:
            raise KeyboardInterrupt
        return 0.002

    monkeypatch.setitem(tiles.CLOCKS, "cpu", clock)
    with pytest.raises(KeyboardInterrupt):
        tiles.main(["--device", "cpu", "--out", str(tmp_path)])
    rows = figures.read(tmp_path / tiles.FILE)
    assert [row["ms"] for row in rows] == ["2", "", "2"]


def test_a_candidate_that_takes_its_process_along_is_not_tried_again(
    tmp_path, configurations, monkeypatch
):
    """It is written down before it runs."""

    def step(loss, n, d, device, keeps=False):
        def run(config: Config) -> None:
            if config.descriptors:
                raise SystemExit("a crash")

        configurations.choose(device, "torch.bfloat16", False, d, 8, "sweep", run)

    monkeypatch.setattr(tiles, "step", step)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="a crash"):
        tiles.main(options)
    assert figures.read(tmp_path / tiles.FILE)[2]["note"] == tiles.DID_NOT_RETURN
    monkeypatch.setenv("FASTCLIP_BENCH_RUN", "1")
    assert tiles.main(options) == 0
    rows = figures.read(tmp_path / tiles.FILE)
    assert rows[0]["ms"] and rows[2]["note"].startswith(tiles.DID_NOT_RETURN)
    # A run of its own begins afresh.
    monkeypatch.setenv("FASTCLIP_BENCH_RUN", "0")
    with pytest.raises(SystemExit, match="a crash"):
        tiles.main(options)


def test_shares_of_candidates_are_compiled_apart(configurations, monkeypatch):
    ran = []

    def step(loss, n, d, device, keeps=False):
        name = f"{loss}{' kept' if keeps else ''}"
        configurations.choose(device, "bf16", False, d, 8, name, lambda c: ran.append((name, c)))

    monkeypatch.setattr(tiles, "step", step)
    for index in range(2):
        tiles.compile_share(index, 2, "cpu")
    found = configurations.candidates(Config(128, 3, False), "sweep")
    names = ("clip", "siglip", "clip kept")
    assert sorted(ran) == sorted((name, c) for name in names for c in found)


def test_winners_take_the_tables_place_where_they_were_timed(tmp_path, configurations):
    path = tmp_path / tiles.FILE
    columns = [*tiles.KEY, "default", "ms", "note", "config"]
    for kernel, own, other in (
        ("sweep", "2.0", "1.5"),
        ("weigh", "2.0", "1.99"),
        ("both", "", "3"),
    ):
        key = dict(zip(tiles.KEY, ("torch.bfloat16", "False", "768", "8", kernel), strict=True))
        for default, ms, config in ((1, own, "(128, 3, False)"), (0, other, "(128, 4, True)")):
            figures.append(path, {**key, "default": default, "ms": ms, "config": config}, columns)
    told = {winner.key[-1]: str(winner) for winner in winners.winners(path)}
    assert told["sweep"].endswith("(128, 4, True), 1.500 ms instead of 2.000 (-25 %)")
    assert "stays" in told["weigh"], "half a percent is noise"
    assert "does not run" in told["both"]
    better = winners.better_of(path)
    arguments = ("cuda:0", torch.bfloat16, False, 768, 8)
    with winners.applied(better):
        assert configurations.choose(*arguments, "sweep", None) == Config(128, 4, True)
        assert configurations.choose(*arguments, "weigh") == Config(128, 3, False)
        other = ("cuda:0", torch.float16, False, 768, 8, "sweep")
        assert configurations.choose(*other) == Config(128, 3, False)
    assert configurations.choose(*arguments, "sweep") == Config(128, 3, False)


@needs_triton
def test_the_triton_engine_asks_as_the_hook_expects():
    """`choosing` replaces `configurations.choose`: the engine must ask through the module, with the
    arguments in this order, and a configuration must be a named tuple that starts with tiles."""
    from fastclip.triton_kernels import configurations, logit_block

    assert issubclass(configurations.Config, tuple) and configurations.Config._fields[:2] == (
        "bm", "bn",
    )  # fmt: skip
    x = torch.zeros(32, 16)
    asked = []

    def hook(own, arguments):
        asked.append(arguments)
        return own(*arguments)

    with tiles.choosing(hook):
        made = logit_block.LogitBlock(Block(Side(x), Side(x), torch.ones(())))
        made.config("sweep", print)
    key = tiles.key_of(asked[0])
    assert key[0] == "torch.float32" and key[-1] == "sweep, softmax"
    assert tiles.run_of(asked[0]) is print


# ---- figures -----------------------------------------------------------------------------------


def test_half_a_line_is_dropped_and_columns_are_checked(tmp_path):
    path = tmp_path / "figures.csv"
    figures.append(path, {"step": "rates", "name": "a, b", "value": 1.23456789, "unit": "x\ny"})
    figures.append(path, {"step": "rates"})
    with path.open("a") as file:
        file.write("rates,half")
    assert figures.read(path) == [
        {"step": "rates", "subject": "", "name": "a, b", "value": "1.23457", "unit": "x y"},
        {"step": "rates", "subject": "", "name": "", "value": "", "unit": ""},
    ]
    with pytest.raises(ValueError, match=r"expected columns of .* got \['other'\]"):
        figures.append(path, {"other": 1})
    assert figures.read(tmp_path / "none.csv") == []


def test_an_errors_reason_is_what_began_it():
    try:
        try:
            raise TypeError("cannot convert\nto tensor")
        except TypeError as error:
            raise RuntimeError("at 19:4: a page of source") from error
    except RuntimeError as error:
        assert figures.reason(error) == "TypeError: cannot convert to tensor"


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setitem(rates.CLOCKS, "cpu", lambda run, repeats: 0.5)
    assert rates.rate(100.0, lambda: None, "cpu") == (200.0, 0.5)
    names = [name for name, _, _, run in rates.works("cpu") if run() is not NotImplemented]
    assert names[:3] == ["copy, read and written", "64^3 bf16", "64^3 fp16"]
    assert names[-1] == "w^T x 128x128x32 bf16 to fp32"


def test_a_products_failure_is_told_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError("no such product\nin this torch")

    works = [("one", 1.0, "TFLOP/s", fail), ("two", 1.0, "TFLOP/s", lambda: None)]
    monkeypatch.setattr(rates, "works", lambda device: iter(works))
    assert rates.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "FAILED: one: no such product\n" in capsys.readouterr().out
    rows = {(r["subject"], r["name"]) for r in figures.read(tmp_path / "gpu-figures.csv")}
    assert {("one", "error"), ("two", "rate"), ("two", "time")} <= rows


def test_kernels_are_listed_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", (("clip", 64),))
    monkeypatch.setattr(kernels, "METHODS", ("dense", "siglip_kernel", "fastclip torch"))
    monkeypatch.setattr(kernels, "D", 16)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--without", "fastclip torch"]
    assert kernels.main(arguments) == 0
    rows = figures.read(tmp_path / "gpu-figures.csv")
    assert {row["subject"] for row in rows} == {"clip 64 dense"}, "what cannot run is left out"
    assert rows[0]["name"] == "total"
    values = [float(row["value"]) for row in rows[1:]]
    assert len(values) > 3 and values == sorted(values, reverse=True)
    assert sum(values) <= float(rows[0]["value"]) * 1.001
    assert any("aten::" in row["name"] for row in rows)


# ---- Nsight Compute ----------------------------------------------------------------------------


def test_counters_are_read_from_ncus_raw_page():
    (metrics,) = counters.parse(NCU)
    assert metrics["gpu__time_duration.sum"] == ["2,600.5", "us"]
    assert counters.chosen(metrics) == [
        ("time", 2600.5, "us"), ("registers a thread", 178.0, "register/thread"),
        ("bytes through L2", 1000.0, "byte"),
    ]  # fmt: skip
    stalls = {
        f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": (value, "inst")
        for name, value in (("barrier", "0.5"), ("long_scoreboard", "2.5"), ("wait", "1"),
                            ("math_pipe_throttle", "1.5"), ("sleeping", "n/a"))
    }  # fmt: skip
    stalls["smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"] = ("9", "")
    assert [name for name, _, _ in counters.chosen(stalls)] == [
        "stalled for long_scoreboard", "stalled for math_pipe_throttle", "stalled for wait",
    ]  # fmt: skip
    assert counters.parse("==ERROR== no permission\n") == []


def test_clocks_stay_as_they_are():
    line = counters.command("ncu", "sweep_kernel", Path("file"))
    assert line[line.index("--clock-control") + 1] == "none"
    assert line[line.index("--launch-count") + 1] == "1"
    assert line[-2:] == ["bench.gpu.counters", "--step"]


def test_a_kernel_that_cannot_be_looked_at_is_told(tmp_path, monkeypatch, capsys):
    def run(command, seconds, say, grace):
        pattern = command[command.index("--kernel-name") + 1]
        text = NCU if "sweep" in pattern else "==ERROR== ERR_NVGPUCTRPERM\n"
        Path(command[command.index("--log-file") + 1]).write_text(text)
        return counters.process.Ended(0, True, "")

    monkeypatch.setattr(counters.process, "run", run)
    monkeypatch.setattr(counters, "find", lambda: "ncu")
    assert counters.main(["--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: weigh: ==ERROR== ERR_NVGPUCTRPERM" in out and "1 of 3 kernels" in out
    assert NCU in (tmp_path / "gpu-ncu.csv").read_text()
