"""The benchmark measures what it says: its truth, its clock, its memory, its tables, end to end.

No test here asserts on how long anything took. `bench` is no part of the package, so it is loaded
from its folder, without the repository's root on `sys.path`.
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastclip import reference

ROOT = Path(__file__).resolve().parents[1]


def load_bench() -> None:
    spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)


load_bench()
from bench import __main__ as command  # noqa: E402
from bench import (  # noqa: E402
    baselines,
    cases,
    goals,
    memory,
    rectangular,
    results,
    runner,
    table,
    timing,
    truth,
)
from bench.cases import Case  # noqa: E402
from bench.results import Row  # noqa: E402

TINY = Case("clip", 32, 32, 16, "float32", 14.3)


def features(m: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(m, d), torch.randn(n, d)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return float(((value.double() - true).norm() / true.norm()).detach())


# ---- truth


@pytest.mark.parametrize("loss", cases.LOSSES)
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_truth_is_the_float64_reference_where_that_is_well_conditioned(loss, scale, monkeypatch):
    monkeypatch.setattr(truth, "BLOCK_ROWS", 8)  # several blocks, the last one short
    x, y = (side.double().requires_grad_() for side in features(37, 37, 12))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    value = getattr(reference, f"{loss}_loss")(x, y, s, b)
    expected = (value, *torch.autograd.grad(value, (x, y, s, b)))
    found = truth.truth(loss, x, y, s, b)
    got = (found.loss, found.dx, found.dy, found.dscale, found.dbias)
    for one, other in zip(got, expected, strict=True):
        if one is not None:
            assert relative(one, other) < 1e-12
    assert (found.dbias is None) == (loss == "clip")


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gradients_of_truth_are_the_slopes_of_its_loss(loss):
    x, y = (side.double() for side in features(5, 5, 3))
    s, b = torch.tensor(3.0).double(), torch.tensor(-1.0).double()
    found = truth.truth(loss, x, y, s, b)
    step = 1e-5

    def slope(move: torch.Tensor, **sides: torch.Tensor) -> float:
        losses = []
        for sign in (1, -1):
            at = {"x": x, "y": y, "scale": s, "bias": b}
            at.update({name: side + sign * step * move for name, side in sides.items()})
            losses.append(truth.truth(loss, **at).loss)
        return float(losses[0] - losses[1]) / (2 * step)

    move = torch.randn(5, 3, dtype=torch.float64)
    assert slope(move, x=x) == pytest.approx(float((move * found.dx).sum()), rel=1e-7)
    assert slope(move, y=y) == pytest.approx(float((move * found.dy).sum()), rel=1e-7)
    assert slope(torch.ones(()), scale=s) == pytest.approx(float(found.dscale), rel=1e-7)
    if loss == "siglip":
        assert slope(torch.ones(()), bias=b) == pytest.approx(float(found.dbias), rel=1e-7)


def test_truth_does_not_lose_a_loss_that_the_usual_form_rounds_to_zero():
    n, scale = 6, torch.tensor(100.0)
    x = torch.eye(n, dtype=torch.float64)
    found = truth.truth("clip", x, x, scale, None)
    expected = (n - 1) * math.exp(-100)  # log(1 + 5 exp(-100)), whose square is below 1e-80
    assert float(found.loss) == pytest.approx(expected, rel=1e-12)
    assert float(found.dscale) == pytest.approx(-expected, rel=1e-12)
    assert float(reference.clip_loss(x, x, scale)) == 0.0


def test_a_relative_error_is_seen_in_one_wrong_element():
    true = torch.ones(100, dtype=torch.float64)
    wrong = true.clone()
    wrong[3] += 0.1
    assert truth.relative_error(true.float(), true) == 0.0
    assert truth.relative_error(wrong, true) == pytest.approx(0.01)
    assert math.isnan(truth.relative_error(torch.full((100,), math.nan), true))


# ---- methods


@pytest.mark.parametrize("loss", cases.LOSSES)
@pytest.mark.parametrize(
    "method", ["open_clip", "dense", "reference", "checkpoint", "fastclip", "fastclip torch"]
)
def test_every_method_computes_the_same_loss_and_gradients(loss, method, monkeypatch):
    monkeypatch.setattr(baselines, "CHECKPOINT_ROWS", 16)
    case = replace(TINY, loss=loss, m=37, n=37, methods=(method,))
    inputs = cases.make_inputs(case)
    try:
        step = baselines.make_step(case, method, inputs)
    except baselines.Unavailable as reason:
        pytest.skip(f"{method}: {reason}")
    true = truth.truth(loss, inputs.x, inputs.y, inputs.scale, inputs.bias)
    got = step()
    for value, expected in zip(got, (true.loss, true.dx, true.dy, true.dscale), strict=False):
        assert truth.relative_error(value, expected) < 2e-5
    forward = baselines.make_step(replace(case, mode="forward"), method, inputs)()
    assert len(forward) == 1 and not forward[0].requires_grad
    assert truth.relative_error(forward[0], true.loss) < 2e-5


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_the_rectangular_loss_is_that_of_the_dense_block(engine, scale):
    case = Case("clip", 24, 150, 16, "float32", scale)
    inputs = cases.make_inputs(case)
    true = truth.truth("clip", inputs.x, inputs.y, inputs.scale, None)
    x, y = (side.detach().double().requires_grad_() for side in (inputs.x, inputs.y))
    dense = baselines.dense_clip(x, y, inputs.scale.detach().double(), None)
    assert relative(true.loss, dense) < 1e-12
    for one, other in zip((true.dx, true.dy), torch.autograd.grad(dense, (x, y)), strict=True):
        assert relative(one, other) < 1e-12
    budget = 0 if engine == "torch" else 2**20
    got = rectangular.clip(engine, inputs, budget)
    for value, expected in zip(got, (true.loss, true.dx, true.dy, true.dscale), strict=True):
        assert truth.relative_error(value, expected) < 2e-5


def test_passes_follow_what_the_budget_keeps():
    def passes(method: str, n: int, **changes: object) -> float:
        case = replace(TINY, m=n, n=n, d=512, **changes)
        return baselines.METHODS[method].passes(case, "cpu")

    assert passes("fastclip", 8192) == 3  # 256 MiB hold all of its products
    assert passes("fastclip", 65536) == 4 - 1 / 64
    assert passes("fastclip", 100) == 3
    assert passes("fastclip budget=0", 8192) == passes("fastclip torch", 8192) == 4
    assert passes("fastclip", 8192, mode="forward") == 1
    assert passes("fastclip", 8192, loss="siglip") == 3
    assert passes("fastclip budget=0", 8192, loss="siglip", dtype="bfloat16") == 4
    assert passes("open_clip", 8192) == 6
    assert passes("open_clip", 8192, loss="siglip") == passes("dense", 8192) == 3
    assert passes("checkpoint", 8192) == 8


def test_inputs_are_normalised_seeded_and_of_their_dtype():
    one, same = cases.make_inputs(TINY), cases.make_inputs(TINY)
    assert torch.equal(one.x, same.x) and not torch.equal(one.x, one.y)
    assert torch.allclose(one.y.norm(dim=1), torch.ones(32))
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in one.leaves)
    assert cases.make_inputs(replace(TINY, dtype="bfloat16")).x.dtype == torch.bfloat16
    near = cases.make_inputs(replace(TINY, data="separated"))
    assert (near.x * near.y).sum(dim=1).min() > 0.97


def test_cases_are_chosen_by_name():
    plan = cases.standard()
    chosen = cases.select(plan, ["siglip 8192*float32*both"], ["fastclip", "dense"])
    assert {(case.loss, case.n, case.dtype, case.mode) for case in chosen} == {
        ("siglip", 8192, "float32", "both")
    }
    assert {case.scale for case in chosen} == {14.3, 100.0}
    assert all(case.methods == ("dense", "fastclip") for case in chosen)
    names = [case.name for case in cases.full()]
    assert len(set(names)) == len(names)


# ---- time


class FakeClock:
    """A clock that only the runs move: by the next of the seconds each was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def run(self, name: str, seconds: list[float]):
        left = iter(seconds)

        def step() -> None:
            self.calls.append(name)
            self.now += next(left)

        return step


def test_methods_take_turns_and_the_median_is_of_their_rounds(monkeypatch):
    clock = FakeClock(monkeypatch)
    # The first run of each only tells whether runs must be repeated.
    runs = {
        "a": clock.run("a", [1.0, 1.0, 9.0, 2.0, 3.0, 4.0] * 9),
        "b": clock.run("b", [0.5] * 54),
        "c": clock.run("c", [0.25] * 54),
    }
    between = []
    found = timing.interleaved(runs, seconds=1.0, between=lambda: between.append(len(clock.calls)))
    assert clock.calls[3:12] == list("abc") + list("bca") + list("cab")
    assert len(clock.calls) == 12  # three rounds, though they took longer than asked for
    assert between == [3, 6, 9]
    assert (found["a"].median, found["a"].rounds) == (2.0, 3)
    assert (found["a"].low, found["a"].high) == (1.5, 5.5)
    assert found["b"].median == found["b"].low == 0.5


def test_short_runs_are_repeated_and_long_ones_run_once(monkeypatch):
    clock = FakeClock(monkeypatch)
    short = timing.interleaved({"a": clock.run("a", [1e-4] * 10_000)}, seconds=0.01)["a"]
    assert short.median == pytest.approx(1e-4)
    assert len(clock.calls) == 1 + 20 * short.rounds
    long = timing.interleaved({"b": clock.run("b", [100.0] * 9)}, seconds=1.0)["b"]
    assert (long.rounds, long.median) == (1, pytest.approx(100.0)) and long.low == long.high


@pytest.mark.parametrize("half", [False, True])
def test_the_limit_is_a_rate_and_is_forgotten_once_taken(half):
    limit = timing.GemmLimit(half)
    limit.sample()
    assert limit.source in ("brgemm", "torch.mm")
    assert limit.take() > 0
    assert limit.samples == []


# ---- memory


def test_a_known_allocation_shows_in_the_peak_even_after_it_is_freed():
    def touch(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**18).sum()

    touch(1)
    large, small = memory.peak_bytes(lambda: touch(64)), memory.peak_bytes(lambda: touch(1))
    if large is None:
        pytest.skip("this machine does not tell the peak of a process")
    assert 60 <= large / 2**20 < 96
    assert small / 2**20 < 24


def test_a_case_is_measured_in_a_process_of_its_own():
    case = Case("clip", 2048, 2048, 16, "float32", 14.3)
    peak, note = memory.measure(case, "dense")
    if note == "memory: cannot be told on this machine":
        pytest.skip(note)
    assert note == ""
    assert 2 * 16 <= peak / 2**20 < 20 * 16  # the logits and their gradient, 16 MiB each, at least
    peak, note = memory.measure(case, "no such method")
    assert peak is None and "no such method" in note


# ---- results


def rows_of_a_case(**changes: object) -> list[Row]:
    """A CSV's worth of rows for one large case: figures made up, ratios consistent."""
    base = Row(
        machine="test-machine", cpu="Test CPU", threads=2, capability="AVX512", torch="2.13.0",
        python="3.11.7", compiler="g++ 12", when="2026-01-02 03:04", loss="clip", m=8192, n=8192,
        d=512, dtype="float32", data="random", scale=14.3, mode="both", rounds=5, limit=220.0,
        limit_of="brgemm", passes=3.0, gflops=110.0, fraction=0.5, err_dx=2e-7, err_dy=2e-7,
        err_dscale=2e-7,
    )  # fmt: skip
    slow = replace(base, method="open_clip", ms=4000.0, low_ms=3900.0, high_ms=4100.0,
                   over_open_clip=1.0, peak_mib=1234.5, rest_mib=1200.0)  # fmt: skip
    dense = replace(slow, method="dense", ms=3000.0, err_dx=4e-7, err_dy=4e-7, err_dscale=4e-7)
    fast = replace(base, method="fastclip", ms=1250.0, low_ms=1200.0, high_ms=1300.0,
                   over_open_clip=3.2, fraction=0.9, peak_mib=290.0, rest_mib=2.0)  # fmt: skip
    missing = replace(base, method="memeff", mode="skipped", loss="", m=0, note="no GPU, here")
    return [replace(row, **changes) for row in (slow, dense, fast)] + [missing]


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


def test_goals_are_reached_missed_or_left_out():
    def verdicts(rows: list[Row]) -> dict[str, str]:
        cells = [line.strip("|").split("|") for line in goals.table_of(rows).splitlines()[2:]]
        return {line[0].strip(): line[-1].strip() for line in cells}

    found = verdicts(rows_of_a_case())
    assert found["CLIP float32, N = 8192: faster than open_clip"] == "aim"
    assert found["CLIP float32, N = 8191, 8192, 8193: of the GEMM limit"] == "floor"
    assert found["CLIP float32: gradient errors over the dense loss's"] == "aim"
    assert "CLIP float32, N = 65536: seconds" not in found
    both = rows_of_a_case() + rows_of_a_case(scale=100.0, over_open_clip=1.5, err_dx=1e-6)
    found = verdicts(both)
    assert found["CLIP float32, N = 8192: faster than open_clip"] == "missed"
    assert verdicts(rows_of_a_case(data="separated")) == {
        "CLIP float32, separated pairs: gradient errors": "aim"
    }


def test_the_readme_gets_its_tables_between_the_markers(tmp_path):
    path, readme = tmp_path / "test.csv", tmp_path / "README.md"
    results.write(path, rows_of_a_case())
    readme.write_text(f"before\n{table.BEGIN}\nold figures\n{table.END}\nafter\n")
    table.into_readme(readme, [path])
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n")
    assert "old figures" not in once and "1.25 s" in once and "Test CPU" in once
    table.into_readme(readme, [path])
    assert readme.read_text() == once
    readme.write_text(f"{table.END} {table.BEGIN}")
    with pytest.raises(SystemExit, match="expected the markers"):
        table.into_readme(readme, [path])


def test_a_picture_needs_two_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    rows = rows_of_a_case()
    assert plot.draw(rows, tmp_path / "one.png") is None
    path = plot.draw(rows + rows_of_a_case(m=2048, n=2048), tmp_path / "two.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


# ---- all of it


def test_a_tiny_plan_runs_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("tqdm")

    def broken(case: Case, device: str) -> baselines.Loss:
        def loss(*inputs: object) -> torch.Tensor:
            raise ValueError("broken\non purpose")

        return loss

    monkeypatch.setitem(
        baselines.METHODS, "checkpoint", replace(baselines.METHODS["checkpoint"], make=broken)
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
    pytest.importorskip("tqdm")
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
