"""Statistics of `contrast`, and gradients of functions of them, are right with all options."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.contrast_case import (
    OPTIONS,
    Evaluated,
    check_gradients,
    check_statistics,
    make_problem,
    random_upstream,
)
from support.judge import PRECISIONS
from support.statistics_oracle import KINDS, Exact, Problem
from torch import Tensor

import fastclip
from fastclip import contrast, reference
from fastclip.engine import operators

DTYPES = {name: PRECISIONS[name].x for name in ("float64", "float32", "bfloat16", "float16")}
SHAPES = {"tall": (60, 23, 10), "wide": (23, 60, 10), "row": (1, 30, 7), "column": (30, 1, 7)}

for_every_option = pytest.mark.parametrize("options", OPTIONS)
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def check(
    problem: Problem, backend: str, device: torch.device, dtype: torch.dtype, **options: object
) -> None:
    """Checks the statistics, and the gradients of a random linear function of all of them."""
    evaluated, exact = Evaluated(problem, backend, device, dtype, **options), Exact(problem)
    found = evaluated.statistics
    check_statistics(problem, found, dtype, exact)
    upstream = random_upstream(found)
    loss = sum(
        (g * torch.where(getattr(found, name).isfinite(), getattr(found, name), 0)).sum()
        for name, g in upstream.items()
    )
    truth = {name: g.cpu().numpy() for name, g in upstream.items()}
    check_gradients(problem, evaluated.gradients(loss), truth, dtype, exact)


@for_every_option
@for_every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradients(
    backend: str, device: torch.device, dtype: str, kind: str, options: str
) -> None:
    for m, n, d in (SHAPES["tall"], SHAPES["wide"]):
        for normalize in (False, True):
            problem = make_problem(
                m, n, d, dtype=DTYPES[dtype], kind=kind, normalize=normalize, **OPTIONS[options]
            )
            check(problem, backend, device, DTYPES[dtype])


@for_every_kind
@pytest.mark.parametrize("shape", ["row", "column"])
def test_lines_of_one_pair(backend: str, device: torch.device, kind: str, shape: str) -> None:
    for options in OPTIONS.values():
        check(make_problem(*SHAPES[shape], kind=kind, **options), backend, device, torch.float32)


@for_every_kind
@pytest.mark.parametrize("scale", [0.0, 1e-3, -20.0, 100.0, 1e4])
def test_any_scale(engine: str, device: torch.device, kind: str, scale: float) -> None:
    for options in ("plain", "everything"):
        problem = make_problem(40, 50, 16, kind=kind, scale=scale, **OPTIONS[options])
        check(problem, engine, device, torch.float32)


def test_negatives_far_below_the_positive(backend: str, device: torch.device) -> None:
    """Their log-sum-exp is accurate, although added to the positive it would vanish."""
    opposite = np.array([[0.6, 0.8], [-0.6, -0.8]])
    check(Problem(opposite, opposite, scale=150.0), backend, device, torch.float32)


# ---- losses written on statistics ----------------------------------------------------------------


def clip_of(c: fastclip.LineStatistics) -> Tensor:
    return (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2


def siglip_of(c: fastclip.LineStatistics) -> Tensor:
    return ((c.rows + c.columns) / 2 + F.softplus(-c.positives)).mean()


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_losses_written_on_statistics_equal_the_fused_ones(
    engine: str, device: torch.device, loss: str
) -> None:
    write, fused, kind = {
        "clip": (clip_of, fastclip.clip_loss, "softmax"),
        "siglip": (siglip_of, fastclip.siglip_loss, "sigmoid"),
    }[loss]
    problem = make_problem(50, 50, 12, kind=kind)
    mine = Evaluated(problem, engine, device)
    value = write(mine.statistics)
    gradients = mine.gradients(value)
    leaves = [t.detach().requires_grad_() for t in mine.leaves.values()]
    other = fused(*leaves, backend=engine)
    torch.testing.assert_close(value.float(), other)
    for name, gradient in zip(gradients, torch.autograd.grad(other, leaves), strict=True):
        found = torch.from_numpy(gradients[name]).to(gradient)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_more_negatives_from_another_block(engine: str, device: torch.device) -> None:
    """The log-sum-exps of a batch and of a queue add up to that of all negatives."""
    whole = make_problem(20, 55, 8)
    parts = whole.with_sides(whole.x, whole.y[:20]), whole.with_sides(whole.x, whole.y[20:])
    parts = parts[0], Problem(**{**vars(parts[1]), "offset": None})
    found = [Evaluated(p, engine, device).statistics for p in parts]
    joined = torch.logaddexp(found[0].rows, found[1].rows)
    torch.testing.assert_close(joined, Evaluated(whole, engine, device).statistics.rows)


def test_one_side_against_itself(engine: str, device: torch.device) -> None:
    """If x is also y, its gradient is the sum of both sides' gradients."""
    x = torch.randn(20, 6, device=device, requires_grad=True)
    ids = torch.arange(20, device=device) // 2
    found = []
    for backend in (engine, "reference"):
        c = contrast(x, x, 3.0, ids=(ids, ids), same_id="positive", backend=backend)
        loss = (torch.logaddexp(c.rows, c.row_positives) - c.row_positives).mean()
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# ---- only requested results are computed ---------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the sweeps that run, by name."""
    made: list[str] = []
    sweep, weigh = operators.sweep, operators.weigh
    monkeypatch.setattr(
        operators, "sweep", lambda *a, **b: (made.append("sweep"), sweep(*a, **b))[1]
    )
    monkeypatch.setattr(
        operators, "weigh", lambda *a, **b: (made.append("weigh"), weigh(*a, **b))[1]
    )
    return made


def test_without_gradients_only_one_sweep_runs(
    engine: str, device: torch.device, calls: list[str]
) -> None:
    problem = make_problem(20, 30, 6)
    with torch.no_grad():
        found = Evaluated(problem, engine, device).statistics
    assert calls == ["sweep"] and not found.rows.requires_grad
    check_statistics(problem, found, torch.float32)


def test_positives_are_differentiated_without_a_second_sweep(
    engine: str, device: torch.device, calls: list[str]
) -> None:
    c = Evaluated(make_problem(20, 30, 6), engine, device)
    x = c.leaves["dx"]
    assert torch.autograd.grad(c.statistics.rows.sum(), x, retain_graph=True)[0].any()
    assert calls == ["sweep", "weigh"]
    # The positives need only the products of N pairs.
    dx, dy, dscale, dbias = torch.autograd.grad(c.statistics.positives.sum(), c.leaves.values())
    assert calls == ["sweep", "weigh"]
    y, scale = c.leaves["dy"].detach(), float(c.leaves["dscale"].detach())
    torch.testing.assert_close(dx, scale * y[:20])
    torch.testing.assert_close(dy, scale * F.pad(x.detach(), (0, 0, 0, 10)))
    torch.testing.assert_close(dscale, (x * y[:20]).sum().detach())
    assert dbias == 20


@pytest.mark.parametrize("wanted", ["rows", "columns"])
def test_rows_or_columns_alone(engine: str, device: torch.device, wanted: str) -> None:
    """The other direction's statistics are None; the requested ones and gradients do not change."""
    for options in ("plain", "positives by id"):
        problem = make_problem(20, 30, 6, **OPTIONS[options])
        both = Evaluated(problem, engine, device)
        one = Evaluated(problem, engine, device, rows=wanted == "rows", columns=wanted != "rows")
        names = [n for n in ("rows", "columns") if getattr(one.statistics, n) is not None]
        assert names == [wanted]
        unwanted = "column_positives" if wanted == "rows" else "row_positives"
        assert getattr(one.statistics, unwanted) is None
        lines = [getattr(c.statistics, wanted) for c in (both, one)]
        torch.testing.assert_close(*lines)
        found = [c.gradients(line.sum()) for c, line in zip((both, one), lines, strict=True)]
        for name in found[0]:
            np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


def test_frozen_sides(engine: str, device: torch.device) -> None:
    problem = make_problem(20, 30, 6, key_bias=1.0)
    whole = Evaluated(problem, engine, device)
    expected = whole.gradients(clip_like(whole.statistics))
    for frozen in ("dx", "dy", "dscale", "dbias", "dkey_bias"):
        leaves = {k: v.detach().requires_grad_(k != frozen) for k, v in whole.leaves.items()}
        x, y, scale, bias, key_bias = leaves.values()
        c = contrast(x, y, scale, bias, key_bias=key_bias, backend=engine)
        clip_like(c).backward()
        for name, leaf in leaves.items():
            if name == frozen:
                assert leaf.grad is None
            else:
                np.testing.assert_allclose(
                    leaf.grad.cpu().numpy(), expected[name], rtol=1e-5, atol=1e-6
                )


def clip_like(c: fastclip.LineStatistics) -> Tensor:
    return F.softplus(c.rows - c.positives).mean() + c.columns.mean()


def test_upstream_gradients_of_any_size(engine: str, device: torch.device) -> None:
    for factor in (0.0, 1e-30, -1e30):
        c = Evaluated(make_problem(20, 30, 6), engine, device, torch.float64)
        one = c.gradients(clip_like(c.statistics))
        c = Evaluated(make_problem(20, 30, 6), engine, device, torch.float64)
        other = c.gradients(clip_like(c.statistics) * factor)
        for name in one:
            np.testing.assert_allclose(other[name], factor * one[name], rtol=1e-9, atol=0)


def test_infinite_upstream_gradients_show(engine: str, device: torch.device) -> None:
    """The gradient of x is not finite, which a GradScaler looks for."""
    c = Evaluated(make_problem(20, 30, 6), engine, device)
    assert not np.isfinite(c.gradients(c.statistics.rows.sum() * float("inf"))["dx"]).all()


def test_a_second_derivative_is_refused(engine: str, device: torch.device) -> None:
    c = Evaluated(make_problem(20, 30, 6), engine, device)
    x = c.leaves["dx"]
    (dx,) = torch.autograd.grad(clip_like(c.statistics), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_a_second_backward_through_a_retained_graph(engine: str, device: torch.device) -> None:
    c = Evaluated(make_problem(20, 30, 6), engine, device)
    loss = clip_like(c.statistics)
    found = [torch.autograd.grad(loss, c.leaves["dx"], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*found)


def test_the_reference_has_derivatives_of_any_order(device: torch.device) -> None:
    problem = make_problem(7, 9, 4, kind="softmax", **OPTIONS["everything"])
    leaves = Evaluated(problem, "reference", device, torch.float64).leaves
    ids = tuple(torch.tensor(side, device=device) for side in problem.ids)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        c = reference.contrast(x, y, 3.0, ids=ids, same_id="positive", offset=3)
        return (torch.logaddexp(c.rows, c.row_positives) - c.row_positives).mean()

    assert torch.autograd.gradgradcheck(loss, (leaves["dx"], leaves["dy"]))


def test_repeated_runs_are_bitwise_equal(engine: str, device: torch.device) -> None:
    problem = make_problem(300, 200, 16, **OPTIONS["everything"])
    runs = []
    for _ in range(3):
        c = Evaluated(problem, engine, device)
        runs.append(
            [*c.statistics, *map(torch.from_numpy, c.gradients(clip_like(c.statistics)).values())]
        )
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert (one is two is None) or torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


@pytest.mark.parametrize("value", [1e30, float("inf")])
def test_a_single_pair_has_no_negatives_even_if_norms_overflow(
    engine: str, device: torch.device, value: float
) -> None:
    """Norms that overflow leave no valid shift; without negatives none is needed."""
    x = torch.full((1, 3), value, device=device)
    c = contrast(x, x.clone(), 1.0, backend=engine)
    assert c.rows == c.columns == -torch.inf
    assert F.softplus(c.rows - 1).item() == 0
