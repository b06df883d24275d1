"""The benchmark's code for CUDA devices, as far as it can be tested without one."""

import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.bench.importing import TINY, rows_of_a_case

from bench.cases import CONTRAST, SCALES, Case, make_inputs
from bench.gpu import cases, fp32
from bench.losses import LOSSES
from bench.measure import memory, timing
from bench.methods import passes, registry
from bench.methods.step import captured, make_step
from bench.report import goals, results
from fastclip.engine import arithmetic


class FakeEvent:
    """A CUDA event on a device whose time is advanced by the runs alone."""

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

    def make_step(case: Case, method: str, inputs: None):
        def step() -> None:
            peak[0] = max(peak[0], 100 + (7000 if case.m < TINY.m * 2 else 400))
            if method == "too large":
                raise torch.OutOfMemoryError("33 GiB")

        return step

    monkeypatch.setattr(memory, "make_step", make_step)
    large = Case("clip", 512, 512, 16, "float32", 14.3)
    monkeypatch.setattr(memory, "WARM_UP_PAIRS", 8)  # the warm-up's peak does not count
    assert memory.measure(large, "dense", "cuda") == (400, "")
    assert memory.measure(large, "too large", "cuda") == (None, "memory: OutOfMemoryError")


def test_a_gpus_rows_are_told_from_a_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    row = results.machine_row("cuda")
    assert (row.machine, row.cpu) == ("nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3")
    assert row.on_gpu and (row.capability, row.threads) == ("sm_90", 0)
    assert not results.machine_row("cpu").on_gpu


def test_the_headline_comes_first_and_our_own_methods_before_rivals():
    plan = cases.headline()
    assert [(case.loss, case.n) for case in plan[:2]] == [("clip", 32768), ("clip", 65536)]
    assert {(case.loss, case.n, case.scale) for case in plan} == {
        (loss, n, scale) for loss in LOSSES for n in cases.LARGE for scale in SCALES
    }
    for case in plan:
        assert case.methods[: len(cases.OWN)] == cases.OWN and case.memory
    compiled = [(case.n, case.scale) for case in plan if "compiled" in case.methods]
    assert compiled == [(32768, 14.3)] * 2, "once for each loss"
    for made in cases.GROUPS.values():
        names = [case.name for case in made()]
        assert len(set(names)) == len(names)
        for case in made():
            assert set(case.methods) <= {*registry.METHODS, cases.WINNERS, cases.SPLIT}


def test_fp32_is_compared_with_the_dense_loss_and_no_method_is_measured_twice():
    plan = cases.engines()
    fp32 = [case for case in plan if case.dtype == "float32"]
    assert {(case.n, case.d) for case in fp32} == {(16384, 768)}
    wanted = {"dense", "fastclip", "fastclip triton", "fastclip triton split", "fastclip cuda"}
    assert all(wanted <= set(case.methods) for case in fp32)
    half = [case for case in plan if case.dtype == "bfloat16"]
    # The library's products are the headline's rows.
    assert {(case.loss, case.n, case.methods) for case in half} == {
        (loss, 32768, ("fastclip cuda fused",)) for loss in LOSSES
    }
    names = [
        (case.name, method)
        for group in ("headline", "engines", "small", "rest")
        for case in cases.GROUPS[group]()
        for method in case.methods
    ]
    assert len(set(names)) == len(names)


def test_small_batches_are_timed_eager_and_in_a_graph():
    found = {(case.loss, case.n, case.mode) for case in cases.small()}
    assert found == {
        (loss, n, mode)
        for loss in LOSSES for n in (256, 512, 1024, 2048) for mode in ("both", "graph")
    }  # fmt: skip
    assert all({"open_clip", "fastclip"} <= set(case.methods) for case in cases.small())
    assert cases.rest()[-1].n == 1 << 20


def test_losses_on_contrast_are_timed_beside_the_librarys_own():
    found = [case for case in cases.rest() if set(CONTRAST) <= set(case.methods)]
    assert {(case.loss, case.n, case.dtype) for case in found} == {
        (loss, 8192, dtype) for loss in LOSSES for dtype in ("bfloat16", "float32")
    }
    assert all("fastclip" in case.methods for case in found)


def test_inputs_are_made_on_the_device(monkeypatch):
    """The device's own generator makes them; on a CPU they must not change, because committed
    results depend on them."""
    asked = []
    generator = torch.Generator

    def on_cpu(device: str) -> torch.Generator:
        asked.append(device)
        return generator()

    monkeypatch.setattr(torch, "Generator", on_cpu)
    inputs = make_inputs(TINY, "cpu")
    assert asked == ["cpu"]
    drawn = torch.randn(32, 16, generator=generator().manual_seed(32 * 31 + 32 * 17 + 16))
    assert torch.equal(inputs.x, torch.nn.functional.normalize(drawn, dim=1))


def test_kept_products_count_as_memory_and_save_a_pass():
    clip = Case("clip", 64, 64, 16, "bfloat16", 14.3)
    counted = {
        name: registry.METHODS[name].passes(clip, "cuda")
        for name in ("fastclip", "fastclip triton kept", "fastclip cuda kept")
    }
    assert counted == {"fastclip": 4.0, "fastclip triton kept": 3.0, "fastclip cuda kept": 3.0}
    assert passes.kept_bytes(clip, "fastclip triton kept", "cuda") == 2 * 64 * 64
    assert passes.kept_bytes(clip, "fastclip cuda kept", "cuda") == 4 * 64 * 64
    # On a card a sigmoid loss's gradients always wait for the backward.
    siglip = replace(clip, loss="siglip")
    assert registry.METHODS["fastclip"].passes(siglip, "cuda") == 3.0
    assert registry.METHODS["fastclip"].passes(replace(siglip, n=8192, m=8192, d=8192), "cpu") == 4
    kept = registry.METHODS["fastclip triton kept"]
    with pytest.raises(registry.Unavailable):
        kept.make(siglip, "cpu")


def test_a_methods_setting_holds_while_it_runs_and_no_longer(monkeypatch):
    monkeypatch.delenv("FASTCLIP_CUDA_TILES", raising=False)
    seen = []

    def loss(x, y, scale, bias):
        seen.append(os.environ.get("FASTCLIP_CUDA_TILES"))
        return (x * y).sum() * scale

    fused = registry.METHODS["fastclip cuda fused"]
    monkeypatch.setitem(registry.METHODS, fused.name, replace(fused, make=lambda *case: loss))
    plain = replace(fused, name="plain", make=lambda *case: loss, within=None)
    monkeypatch.setitem(registry.METHODS, "plain", plain)
    inputs = make_inputs(TINY)
    for name in ("fastclip cuda fused", "plain"):
        make_step(TINY, name, inputs)()
    assert seen[0] == "fused" and seen[1] in (None, "library")


def test_fp32_is_split_within_the_method_alone(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS})
    fp32.add_method()
    method = registry.METHODS["fastclip triton split"]
    for before in (None, "ieee"):
        if before is None:
            monkeypatch.delenv("FASTCLIP_FP32", raising=False)
        else:
            monkeypatch.setenv("FASTCLIP_FP32", before)
        arithmetic.fp32.cache_clear()
        assert arithmetic.arithmetic_of(torch.float32) == "ieee"
        with method.within():
            assert arithmetic.arithmetic_of(torch.float32) == "split"
        assert arithmetic.arithmetic_of(torch.float32) == "ieee"
        assert os.environ.get("FASTCLIP_FP32") == before
    arithmetic.fp32.cache_clear()


def test_a_replayed_step_returns_what_it_captured(monkeypatch):
    """A fake of CUDA's graph runs the captured step again."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replays = []
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(), "graph": lambda g: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(None)),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    steps = iter(range(100))
    replay = captured(lambda: next(steps), "cuda")
    assert (replay(), replay(), len(replays)) == (3, 3, 2), "three runs before the captured one"
    with pytest.raises(registry.Unavailable, match="need a CUDA device"):
        captured(lambda: None, "cpu")


def test_goals_of_a_card():
    """Goals in ratios hold on any card; goals in milliseconds only on the card they are set for."""

    def verdicts(rows: list[results.Row]) -> dict[str, str]:
        cells = [line.strip("|").split("|") for line in goals.table_of(rows).splitlines()[2:]]
        return {line[0].strip(): line[-1].strip() for line in cells}

    card = {"threads": 0, "capability": "sm_90", "dtype": "bfloat16"}
    large = rows_of_a_case(**card, m=32768, n=32768, d=768, cpu="NVIDIA A100")
    found = verdicts(large)
    times = [goal for goal in found if "milliseconds" in goal]
    assert len(times) == 7 and {found[goal] for goal in times} == {"not measured"}
    assert found["CLIP bfloat16, 32768 x 768: faster than open_clip"] == "aim"
    assert found["CLIP bfloat16, 32768 x 768: of the GEMM limit"] == "aim"
    assert found["CLIP bfloat16, 65536 x 768: of the GEMM limit"] == "not measured"
    compiled = replace(large[1], method="compiled", peak_mib=2000.0)
    memory_goal = "CLIP bfloat16, 32768 x 768: memory over torch.compile's"
    assert verdicts([*large, compiled])[memory_goal] == "missed"
    for name, milliseconds, verdict in (
        ("H100", 9.3, "aim"), ("H100", 9.5, "floor"), ("H100", 13.0, "missed"),
        ("H200", 9.5, "aim"), ("H200", 11.0, "floor"), ("H200", 13.0, "missed"),
    ):  # fmt: skip
        rows = [replace(row, cpu=f"NVIDIA {name}", ms=milliseconds) for row in large]
        found = verdicts(rows)
        assert found[f"CLIP bfloat16, 32768 x 768, {name}: milliseconds"] == verdict
        other = {"H100": "H200", "H200": "H100"}[name]
        assert found[f"CLIP bfloat16, 32768 x 768, {other}: milliseconds"] == "not measured"
    for over, card_name, verdict in ((1.2, "H100", "floor"), (1.2, "H200", "aim")):
        rows = [replace(row, cpu=card_name, over_compiled=over) for row in large]
        goal = f"CLIP bfloat16, 32768 x 768, {card_name}: faster than torch.compile"
        assert verdicts(rows)[goal] == verdict
    fp32 = rows_of_a_case(**{**card, "dtype": "float32"}, m=16384, n=16384, d=768, over_dense=2.0)
    assert (
        verdicts(fp32)["CLIP float32 or split, 16384 x 768: faster than the dense loss"] == "floor"
    )
    small = [row for n in (256, 512, 1024) for row in rows_of_a_case(**card, m=n, n=n)]
    text = "CLIP bfloat16, N = 256 .. 2048: faster than open_clip"
    assert verdicts(small)[text] == "not measured"
    small += rows_of_a_case(**card, m=2048, n=2048, over_open_clip=1.2)
    assert verdicts(small)[text] == "floor"
    assert verdicts(small)[text.replace("2048:", "2048 in a CUDA graph:")] == "not measured"
