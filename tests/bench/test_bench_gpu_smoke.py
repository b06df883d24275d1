"""The smoke test of `make gpu` passes right engines and fails wrong ones; a process that crashes or
hangs gets a row."""

import argparse
import itertools
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from support.bench.importing import relative
from support.triton_case import needs_triton

import fastclip
from bench.gpu import figures, smoke, smoke_checks
from bench.losses import LOSSES, loss_of
from fastclip.engine import arithmetic


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, which: int, factor: float):
    """Multiplies one of an engine's results by a factor."""
    step = smoke_checks.Problem.step

    def wrong(self, *arguments):
        results = list(step(self, *arguments))
        results[which] = results[which] * factor
        return tuple(results)

    with monkeypatch.context() as patch:
        patch.setattr(smoke_checks.Problem, "step", wrong)
        yield


@pytest.mark.parametrize("dtype", smoke_checks.DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_smoke_passes_a_right_engine_and_no_wrong_one(loss, dtype, monkeypatch):
    half = dtype != "float32"
    for normalize in (False, True):
        problem = smoke_checks.Problem(
            loss, smoke_checks.DTYPES[dtype], normalize, 65, 24, 100.0, "cpu"
        )
        found = smoke_checks.judge(problem, "torch")
        assert found["status"] == "passed", found
        # Half a percent is within rounding for a gradient in bf16, but not for the other results.
        for which, factor in ((0, 1 + 1e-4), (1, 1.01 if half else 1 + 1e-4), (2, float("nan")),
                              (3, 1.001)):  # fmt: skip
            with broken(monkeypatch, which, factor):
                found = smoke_checks.judge(problem, "torch")
            assert found["status"] == "FAILED", (which, found)
            assert found["of"].startswith(smoke_checks.NAMES[which])


def rounded(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves with features rounded to the nearest tf32 numbers."""
    features = (leaf.detach() for leaf in leaves[:2])
    bits = (((leaf.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for leaf in features)
    return [*(leaf.requires_grad_() for leaf in bits), *leaves[2:]]


@pytest.mark.parametrize("loss", LOSSES)
def test_smoke_holds_an_engine_in_tf32_to_plain_pytorch_in_tf32(loss, monkeypatch):
    """The engine rounds raw features, plain PyTorch normalised ones. Plain PyTorch's error may be
    small by luck, and so is not the only bound."""
    settings, step = torch.backends.cuda.matmul, smoke_checks.Problem.step
    assert settings.fp32_precision != "tf32"
    monkeypatch.setattr(
        smoke_checks.Problem, "step", lambda p, e, leaves, b=0: step(p, e, rounded(leaves), b)
    )
    for normalize, scale in itertools.product((False, True), smoke_checks.SCALES):
        problem = smoke_checks.Problem(
            loss, torch.float32, normalize, *smoke_checks.SMALL, scale, "cpu"
        )
        assert smoke_checks.judge(problem, "torch")["status"] == "FAILED"
        with smoke.engine_of("torch tf32", None) as engine:
            found = smoke_checks.judge(problem, engine)
            assert found["status"] == "passed", found
            with broken(monkeypatch, 3, 1.01):
                found = smoke_checks.judge(problem, engine)
            assert found["status"] == "FAILED" and found["of"].startswith("dscale")
        assert settings.fp32_precision != "tf32"


def test_the_smoke_tests_truth_equals_autograd_in_float64():
    for loss in LOSSES:
        problem = smoke_checks.Problem(loss, torch.float32, True, 33, 12, 14.3, "cpu")
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
def test_smoke_checks_statistics_with_pairs_left_out(loss, lost, monkeypatch):
    problem = smoke_checks.Problem(loss, torch.float32, True, 40, 12, 14.3, "cpu")
    contrast = fastclip.contrast

    def losing(*leaves, **options):
        if lost == "ids":
            options["ids"] = tuple(torch.zeros_like(side) for side in options["ids"])
        elif lost is not None:
            options[lost] = {"key_bias": None, "offset": 0}[lost]
        return contrast(*leaves, **options)

    monkeypatch.setattr(fastclip, "contrast", losing)
    found = smoke_checks.judge_masked(problem, "torch")
    assert found["status"] == ("passed" if lost is None else "FAILED"), found
    asked = [(p.n, p.normalize) for p, check in smoke_checks.checks(loss, "bfloat16", "cpu")
             if check == "masked"]  # fmt: skip
    assert asked == [(n, normalize) for n, _ in smoke_checks.MASKED for normalize in (False, True)]


def test_smoke_compares_bits_and_checks_every_engine_alike(monkeypatch):
    problem = smoke_checks.Problem("clip", torch.float32, False, 33, 12, 14.3, "cpu")
    assert smoke_checks.judge_rerun(problem, "torch") == {"status": "passed", "of": ""}
    bits = iter([1.0, 1 + 2.0**-23])
    step = smoke_checks.Problem.step

    def unsteady(self, *arguments):
        value, dx, *others = step(self, *arguments)
        return (value, dx * next(bits), *others)

    monkeypatch.setattr(smoke_checks.Problem, "step", unsteady)
    assert smoke_checks.judge_rerun(problem, "torch") == {"status": "FAILED", "of": "dx"}

    on_cpu = list(smoke_checks.checks("clip", "bfloat16", "cpu"))
    on_card = list(smoke_checks.checks("clip", "bfloat16", "cuda"))
    assert [check for _, check in on_cpu].count("accuracy") == 24
    assert [check for _, check in on_card].count("graph") == 4
    assert {(p.n, p.d, p.normalize) for p, check in on_card if check == "kept"} == {
        (n, d, normalize) for n, d in smoke_checks.SHAPES for normalize in (False, True)
    }
    # Large blocks, which the headline runs, come first, so that a cut run has checked them.
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
    monkeypatch.setattr(smoke_checks, "SHAPES", ((17, 8),))
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
    """In bf16 a cut is a failure if the large blocks are not checked yet."""
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
def test_without_time_left_no_smoke_process_is_started(dtype, status, tmp_path, monkeypatch):
    """That is no hang, but a run that has not checked bf16's large blocks fails."""
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
        assert arithmetic.arithmetic_of(torch.float32) == "ieee"
    with smoke.engine_of("triton split", None) as engine:
        assert (engine, arithmetic.arithmetic_of(torch.float32)) == ("triton", "split")
