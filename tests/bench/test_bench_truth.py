"""The benchmark's float64 truth is right, and every method computes the same loss."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.bench.importing import TINY, relative

from bench import cases
from bench.cases import CONTRAST, Case
from bench.losses import LOSSES, loss_of
from bench.measure import truth
from bench.methods import dense, rectangular, registry
from bench.methods.step import make_step
from fastclip import reference


def features(m: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(m, d), torch.randn(n, d)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


# ---- truth


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_truth_is_the_float64_reference_where_that_is_well_conditioned(loss, scale, monkeypatch):
    monkeypatch.setattr(truth, "BLOCK_ROWS", 8)  # several blocks, the last one short
    x, y = (side.double().requires_grad_() for side in features(37, 37, 12))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    value = loss_of(loss).of_fastclip("reference")(x, y, s, b)
    expected = (value, *torch.autograd.grad(value, (x, y, s, b)))
    found = loss_of(loss).truth(x, y, s, b)
    got = (found.loss, found.dx, found.dy, found.dscale, found.dbias)
    for one, other in zip(got, expected, strict=True):
        if one is not None:
            assert relative(one, other) < 1e-12
    assert (found.dbias is None) == (loss_of(loss).bias is None)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_truth_are_the_slopes_of_its_loss(loss):
    x, y = (side.double() for side in features(5, 5, 3))
    s, b = torch.tensor(3.0).double(), torch.tensor(-1.0).double()
    found = loss_of(loss).truth(x, y, s, b)
    step = 1e-5

    def slope(move: torch.Tensor, **sides: torch.Tensor) -> float:
        losses = []
        for sign in (1, -1):
            at = {"x": x, "y": y, "scale": s, "bias": b}
            at.update({name: side + sign * step * move for name, side in sides.items()})
            losses.append(loss_of(loss).truth(**at).loss)
        return float(losses[0] - losses[1]) / (2 * step)

    move = torch.randn(5, 3, dtype=torch.float64)
    assert slope(move, x=x) == pytest.approx(float((move * found.dx).sum()), rel=1e-7)
    assert slope(move, y=y) == pytest.approx(float((move * found.dy).sum()), rel=1e-7)
    assert slope(torch.ones(()), scale=s) == pytest.approx(float(found.dscale), rel=1e-7)
    if found.dbias is not None:
        assert slope(torch.ones(()), bias=b) == pytest.approx(float(found.dbias), rel=1e-7)


def test_truth_does_not_lose_a_loss_that_the_usual_form_rounds_to_zero():
    n, scale = 6, torch.tensor(100.0)
    x = torch.eye(n, dtype=torch.float64)
    found = truth.clip(x, x, scale, None)
    expected = (n - 1) * math.exp(-100)  # log(1 + 5 exp(-100)), whose square is below 1e-80
    assert float(found.loss) == pytest.approx(expected, rel=1e-12, abs=0)
    assert float(found.dscale) == pytest.approx(-expected, rel=1e-12, abs=0)
    assert float(reference.clip_loss(x, x, scale)) == 0.0


def test_a_relative_error_is_seen_in_one_wrong_element():
    true = torch.ones(100, dtype=torch.float64)
    wrong = true.clone()
    wrong[3] += 0.1
    assert truth.relative_error(true.float(), true) == 0.0
    assert truth.relative_error(wrong, true) == pytest.approx(0.01)
    assert math.isnan(truth.relative_error(torch.full((100,), math.nan), true))


# ---- methods and cases


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "method",
    ["open_clip", "dense", "reference", "checkpoint", "fastclip", "fastclip torch", *CONTRAST],
)
def test_every_method_computes_the_same_loss_and_gradients(loss, method, monkeypatch):
    monkeypatch.setattr(dense, "CHECKPOINT_ROWS", 16)
    case = replace(TINY, loss=loss, m=37, n=37, methods=(method,))
    inputs = cases.make_inputs(case)
    try:
        step = make_step(case, method, inputs)
    except (registry.Unavailable, ImportError) as reason:
        pytest.skip(f"{method}: {reason}")
    true = loss_of(loss).truth(inputs.x, inputs.y, inputs.scale, inputs.bias)
    got = step()
    for value, expected in zip(got, (true.loss, true.dx, true.dy, true.dscale), strict=False):
        assert truth.relative_error(value, expected) < 2e-5
    forward = make_step(replace(case, mode="forward"), method, inputs)()
    assert len(forward) == 1 and not forward[0].requires_grad
    assert truth.relative_error(forward[0], true.loss) < 2e-5


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_the_rectangular_loss_is_that_of_the_dense_block(engine, scale):
    case = Case("clip", 24, 150, 16, "float32", scale)
    inputs = cases.make_inputs(case)
    true = truth.clip(inputs.x, inputs.y, inputs.scale, None)
    x, y = (side.detach().double().requires_grad_() for side in (inputs.x, inputs.y))
    plain = dense.dense_clip(x, y, inputs.scale.detach().double(), None)
    assert relative(true.loss, plain) < 1e-12
    for one, other in zip((true.dx, true.dy), torch.autograd.grad(plain, (x, y)), strict=True):
        assert relative(one, other) < 1e-12
    budget = 0 if engine == "torch" else 2**20
    got = rectangular.clip(engine, inputs, budget)
    for value, expected in zip(got, (true.loss, true.dx, true.dy, true.dscale), strict=True):
        assert truth.relative_error(value, expected) < 2e-5


def test_passes_follow_what_the_budget_keeps():
    def passes(method: str, n: int, **changes: object) -> float:
        case = replace(TINY, m=n, n=n, d=512, **changes)
        return registry.METHODS[method].passes(case, "cpu")

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
    # A loss written on `contrast` sweeps twice.
    for loss, method in itertools.product(LOSSES, CONTRAST):
        assert passes(method, 8192, loss=loss) == 3 and passes(method, 65536, loss=loss) > 3.9
        assert passes(method, 8192, loss=loss, mode="forward") == 1


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
    large = [case for case in plan if case.n == 8192 and set(CONTRAST) <= set(case.methods)]
    assert {(case.loss, case.dtype) for case in large} == {
        (loss, dtype) for loss in LOSSES for dtype in ("float32", "bfloat16")
    }
    assert set(cases.METHODS) <= set(registry.METHODS)
    names = [case.name for case in cases.full()]
    assert len(set(names)) == len(names)
