"""`contrast` with a teacher, a guide, limits or levels, against formulas in NumPy.

The oracle is `support/family_oracle.py`; the dense reference is judged by it, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.contrast_case import allowance, make_problem
from support.family_oracle import ExactBeside
from support.judge import roundoff
from support.oracle import rounded
from torch import Tensor

import fastclip
from fastclip.kinds import LineStatistics

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}  # fmt: skip
# Options of `make_problem`, and of what stands beside the features: the width of the second pair,
# the teacher's scale, the size of limits, levels above own positives.
CASES: dict[str, dict[str, Any]] = {
    "teacher": {"teacher": 3.0},
    "sharp teacher": {"teacher": 1e4, "offset": 2, "ids": 7},
    "indifferent teacher": {"teacher": 0.0, "offset": None, "normalize": True},
    "teacher with everything": {
        "teacher": 20.0, "ids": 7, "same_id": "positive", "margin": -0.1, "means": True,
        "normalize": True,
    },
    "teacher with labels": {"teacher": 5.0, "labels": True, "margin": 0.1},
    "teacher of sigmoids": {"teacher": 5.0, "kind": "sigmoid", "ids": 7, "same_id": "positive"},
    "guide": {"guide": True, "margin": -0.1},
    "guide with everything": {
        "guide": True, "margin": -0.1, "ids": 9, "same_id": "positive", "key_bias": 1.0,
        "offset": -3, "means": True, "normalize": True,
    },
    "guide of labels": {"guide": True, "labels": True, "margin": 0.05, "key_bias": 2.0},
    "guide of sigmoids": {"guide": True, "margin": 0.0, "kind": "sigmoid"},
    "guide with limits": {"guide": True, "limits": 0.3, "ids": 7},
    "guide of itself": {"guide": True, "limits": 0.2, "one_set": True, "means": True},
    "limits": {"limits": 0.3, "normalize": True},
    "limits of itself": {"limits": 0.2, "one_set": True, "ids": 6, "same_id": "positive"},
    "hinge": {"kind": "hinge", "above": -5.0},
    "hinge, others": {
        "kind": "hinge", "above": -14.0, "ids": 7, "key_bias": 2.0, "offset": 3, "normalize": True,
    },
    "hinge, labels": {"kind": "hinge", "above": -6.0, "labels": True, "margin": 0.1},
    "hinge, guided": {"kind": "hinge", "above": -8.0, "guide": True, "margin": 0.1, "offset": -2},
    "hinge without positives": {"kind": "hinge", "above": -1.0, "offset": None},
    "means of a hinge": {"kind": "hinge", "above": -9.0, "means": True, "ids": 5},
}  # fmt: skip
SHAPES = [(1, 1), (2, 3), (31, 47), (67, 33)]
GIVEN = ("teacher", "guide", "limits", "above")


class Beside:
    """A problem with what stands beside it, as arrays for the oracle and as tensors."""

    def __init__(self, case: dict[str, Any], m: int, n: int, dtype: torch.dtype) -> None:
        options = {k: v for k, v in case.items() if k not in GIVEN}
        self.problem = p = make_problem(m, n, 12, dtype=dtype, **options)
        self.dtype, rng = dtype, np.random.default_rng(5)
        n = m if p.y is None else n
        name = str(dtype).removeprefix("torch.")
        # Partners are alike for the second pair, too.
        pair = [rounded(side[:, :7] + 0.3 * rng.normal(size=(len(side), 7)), name)
                for side in (p.x, p.x if p.y is None else p.y)]  # fmt: skip
        if p.y is None:
            pair[1] = pair[0]
        self.arrays: dict[str, Any] = {}
        if "teacher" in case:
            self.arrays["targets"] = (*pair, case["teacher"])
        if case.get("guide"):
            self.arrays["guide"] = tuple(pair)
        if "limits" in case:
            self.arrays["limits"] = rounded(case["limits"] * rng.normal(size=m), "float32")
        if "above" in case:
            self.arrays["above"] = case["above"]

    def exact(self) -> ExactBeside:
        return ExactBeside(self.problem, **self.arrays)

    def options(self, device: torch.device) -> dict[str, Any]:
        def tensor(value: NDArray, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value).to(device, dtype)

        found = dict(self.arrays)
        if "targets" in found:
            *pair, scale = found["targets"]
            found["targets"] = (*(tensor(side, self.dtype) for side in pair), scale)
        if "guide" in found:
            pair = tuple(tensor(side, self.dtype) for side in found["guide"])
            found["guide"] = pair[0] if self.problem.y is None else pair
        if "limits" in found:
            found["limits"] = tensor(found["limits"], torch.float64)
        return found

    def leaves(self, device: torch.device) -> dict[str, Tensor]:
        p = self.problem
        scalar = torch.float64 if self.dtype == torch.float64 else torch.float32
        every = {
            "dx": (p.x, self.dtype), "dy": (p.y, self.dtype), "dscale": (p.scale, scalar),
            "dbias": (p.bias, scalar), "dkey_bias": (p.key_bias, scalar),
        }  # fmt: skip
        return {
            name: torch.tensor(value, dtype=dtype, device=device).requires_grad_()
            for name, (value, dtype) in every.items() if value is not None
        }  # fmt: skip

    def call(self, leaves: dict[str, Tensor], engine: str, **options: Any) -> LineStatistics:
        p = self.problem
        x, scale, bias = (leaves[name] for name in ("dx", "dscale", "dbias"))
        ids = None if p.ids is None else tuple(torch.tensor(t, device=x.device) for t in p.ids)
        return fastclip.contrast(
            x, leaves.get("dy"), scale, bias, offset=p.offset,
            labels=None if p.labels is None else torch.tensor(p.labels, device=x.device),
            ids=ids[0] if ids and p.y is None else ids, same_id=p.same_id,
            false_negative_margin=p.margin, key_bias=leaves.get("dkey_bias"), kind=p.kind,
            means=p.means, normalize=p.normalize, backend=engine,
            **{**self.options(x.device), **options},
        )  # fmt: skip


def error_of_exponentials(beside: Beside, exact: ExactBeside) -> float:
    """Returns the error of the largest logit of both pairs."""
    allowed = allowance(exact, beside.dtype)
    if exact.teacher is not None:
        x, y, scale = beside.arrays["targets"]
        sides = [np.linalg.norm(side, axis=1).max() for side in (x, y)]
        length = 1.0 if beside.problem.normalize else sides[0] * sides[1]
        wide = torch.float64 if beside.dtype == torch.float64 else torch.float32
        allowed += 12 * roundoff(wide) * (1 + abs(scale) * length) * (1 + exact.largest_logit)
    return min(allowed, 0.05)


def check(beside: Beside, engine: str, device: torch.device, what: str) -> None:
    exact, leaves = beside.exact(), beside.leaves(device)
    found, truth = beside.call(leaves, engine), exact.statistics()
    allowed = error_of_exponentials(beside, exact)
    rng, upstream, used = np.random.default_rng(1), {}, []
    for name, right in truth.items():
        value = getattr(found, name)
        assert value is not None, f"{what}: {name} is missing"
        assert value.dtype == torch.float64 and value.shape == right.shape
        mine, some = value.detach().cpu().numpy(), np.isfinite(right)
        np.testing.assert_array_equal(mine[~some], right[~some], err_msg=f"{what}: {name}")
        # A sum of many pairs has the errors of all.
        size = np.maximum(1.0, np.abs(right[some])) * (exact.t.size**0.5 if right.size else 1)
        off = np.abs(mine[some] - right[some]) / size
        assert (off <= allowed).all(), f"{what}: {name} off by {off.max():.1e}, {allowed:.1e}"
        upstream[name] = np.where(some, rng.normal(size=right.shape), 0)
        used.append((value * torch.tensor(upstream[name], device=device)).masked_fill(
            value.isinf() | value.isnan(), 0).sum())  # fmt: skip
    assert [name for name, t in found._asdict().items() if t is not None] == [
        name for name in found._fields if name in truth
    ]
    gradients = torch.autograd.grad(sum(used), list(leaves.values()))
    expected = exact.gradients(upstream)
    narrow = 4 * roundoff(beside.dtype) if beside.dtype.itemsize == 2 else 0.0
    for name, gradient in zip(leaves, gradients, strict=True):
        right = getattr(expected, name)
        mistake = np.linalg.norm(gradient.double().cpu().numpy() - right)
        mistake /= np.linalg.norm(right) or 1.0
        features = narrow if name in ("dx", "dy") else 0.0
        limit = expected.conditions[name] * (4 * allowed + features) + features + 1e-7
        assert mistake <= limit, f"{what}: {name} off by {mistake:.1e}, allowed {limit:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_statistics_and_gradients(name: str, engine: str, dtype: str, device: torch.device) -> None:
    for m, n in SHAPES if dtype in ("float64", "float32") else SHAPES[2:3]:
        if CASES[name].get("labels") and n < 2:
            continue
        check(Beside(CASES[name], m, n, DTYPES[dtype]), engine, device, f"{(m, n)}")


@pytest.mark.parametrize("name", CASES)
def test_the_dense_form(name: str, device: torch.device) -> None:
    check(Beside(CASES[name], 31, 47, torch.float64), "reference", device, "dense")


def test_triton_has_levels_and_limits(device: torch.device, monkeypatch: Any) -> None:
    from support.gpu_engine_case import prepare

    prepare("triton", device, monkeypatch)
    for name in ("hinge, others", "limits", "limits of itself"):
        check(Beside(CASES[name], 9, 13, torch.float32), "triton", device, name)


@pytest.mark.parametrize("name", ["teacher with everything", "guide", "hinge, others"])
def test_frozen_inputs_and_single_statistics(name: str, engine: str, device: torch.device) -> None:
    beside = Beside(CASES[name], 13, 17, torch.float64)
    exact = beside.exact()
    for statistic in exact.statistics():
        leaves = beside.leaves(device)
        found = getattr(beside.call(leaves, engine), statistic)
        g = torch.where(found.isfinite(), torch.linspace(-1, 2, len(found)).double(), 0)
        right = exact.gradients({statistic: g.detach().numpy()})
        for alive in leaves:
            own = {k: v.detach().requires_grad_(k == alive) for k, v in leaves.items()}
            value = getattr(beside.call(own, engine), statistic)
            (mine,) = torch.autograd.grad(
                value, own[alive], torch.where(value.isfinite(), g, 0), allow_unused=True
            )
            mine = torch.zeros_like(own[alive]) if mine is None else mine
            torch.testing.assert_close(
                mine, torch.tensor(getattr(right, alive)), rtol=1e-8, atol=1e-9,
                msg=f"{statistic}, {alive}",
            )  # fmt: skip


@pytest.mark.parametrize("name", ["teacher", "guide with everything", "hinge, labels"])
def test_transforms(name: str, engine: str, device: torch.device) -> None:
    """Graphs, functional gradients, one value run after run, and no second derivative."""
    beside = Beside(CASES[name], 13, 17, torch.float64)
    leaves = beside.leaves(device)
    keys = list(leaves)

    def total(*values: Tensor) -> Tensor:
        found = beside.call(dict(zip(keys, values, strict=True)), engine)
        return sum(torch.where(t.isfinite(), t, 0).square().mean() for t in found if t is not None)

    value = total(*leaves.values())
    first = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    again = torch.autograd.grad(total(*leaves.values()), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first[0].sum(), leaves["dx"])
    given = [t.detach() for t in leaves.values()]
    functional = torch.func.grad(total, argnums=tuple(range(len(given))))(*given)
    for one, other in zip(functional, again, strict=True):
        torch.testing.assert_close(one, other)
    batched = torch.func.vmap(total)(*(torch.stack((t, 0.5 * t)) for t in given))
    alone = torch.stack([total(*given), total(*(0.5 * t for t in given))])
    torch.testing.assert_close(batched, alone)


@pytest.mark.parametrize("name", ["teacher", "hinge"])
def test_one_graph(name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    cases = [Beside(CASES[name], n, n, torch.float64) for n in (7, 12)]

    def total(beside: dict[str, Any], leaves: dict[str, Tensor]) -> Tensor:
        found = fastclip.contrast(*leaves.values(), kind=CASES[name].get("kind", "softmax"),
                                  **beside)  # fmt: skip
        return sum(t.mean() for t in found if t is not None)

    fast = torch.compile(total, backend="eager", fullgraph=True, dynamic=True)
    for beside in cases:
        leaves, given = beside.leaves(device), beside.options(device)
        ours, eager = (f(given, leaves) for f in (fast, total))
        torch.testing.assert_close(ours, eager)
        for one, other in zip(
            *(torch.autograd.grad(t, list(leaves.values())) for t in (ours, eager)), strict=True
        ):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_nan_stays(engine: str, device: torch.device) -> None:
    """A NaN of the teacher reaches the lines that it weighs, and no hinge hides a NaN."""
    x, y = torch.randn(2, 5, 4, device=device).unbind()
    spoilt = x.clone()
    spoilt[2, 1] = torch.nan
    found = fastclip.contrast(x, y, 2.0, targets=(spoilt, y, 1.0), backend=engine)
    assert found.row_expectations.isnan().nonzero().flatten().tolist() == [2]
    assert found.column_expectations.isnan().all() and not found.rows.isnan().any()
    found = fastclip.contrast(spoilt, y, 2.0, kind="hinge", above=-1.0, backend=engine)
    assert found.rows[2].isnan() and found.columns.isnan().all()


X = torch.ones(4, 6)
OK = (X, X, 1.0)
ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "targets": (TypeError, r"targets must be \(x', y', scale'\), got 2 of", {"targets": OK[:2]}),
    "one target": (TypeError, r"targets must be.*got Tensor", {"targets": X}),
    "rows of targets": (ValueError, r"targets: y' must have 4 rows.*\(3, 6\)",
                        {"targets": (X, X[:3], 1.0)}),
    "widths": (ValueError, r"x' and y' must have one width", {"targets": (X, X[:, :5], 1)}),
    "integers": (TypeError, r"targets: x' must be float", {"targets": (X.long(), X, 1.0)}),
    "a list": (TypeError, r"targets: y' must be a torch.Tensor", {"targets": (X, [1], 1.0)}),
    "scale": (TypeError, r"targets: scale' must be a number.*str", {"targets": (X, X, "1")}),
    "guide and targets": (ValueError, r"exclude each other", {"targets": OK, "guide": (X, X),
                                                              "limits": X[:, 0]}),
    "a guide alone": (ValueError, r"guide needs false_negative_margin or limits, got neither",
                      {"guide": (X, X)}),
    "a guide of three": (TypeError, r"guide must be \(x', y'\), got 3 of them",
                         {"guide": OK, "limits": X[:, 0]}),
    "limits and a margin": (ValueError, r"limits take the place of false_negative_margin",
                            {"limits": X[:, 0], "false_negative_margin": 0.1}),
    "few limits": (ValueError, r"limits must have the limit of each row.*\(3,\)",
                   {"limits": X[:3, 0]}),
    "integer limits": (TypeError, r"limits must be float", {"limits": X[:, 0].long()}),
    "targets with key_bias": (ValueError, r"targets take no key_bias",
                              {"targets": OK, "key_bias": X[:, 0]}),
    "targets of a hinge": (ValueError, r"no kind with levels, got kind 'hinge'",
                           {"targets": OK, "kind": "hinge", "above": 0.0}),
    "targets of itself": (ValueError, r"must be None without y", {"targets": OK, "y": None}),
    "a margin of itself": (ValueError, r"false_negative_margin must be None without y",
                           {"guide": X, "false_negative_margin": 0.1, "y": None}),
    "no level": (ValueError, r"kind 'hinge' needs above", {"kind": "hinge"}),
    "a level of softmax": (ValueError, r"above must be None for kind 'softmax', got 0.1",
                           {"above": 0.1}),
    "a level that is no number": (TypeError, r"above must be a number, got str",
                                  {"kind": "hinge", "above": "1"}),
    "positives of a hinge": (ValueError, r"same_id must be 'ignore' and y be given",
                             {"kind": "hinge", "above": 0.0, "same_id": "positive",
                              "ids": (X[:, 0].long(),) * 2}),
    "a hinge of itself": (ValueError, r"same_id must be 'ignore' and y be given",
                          {"kind": "hinge", "above": 0.0, "y": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    error, pattern, options = ERRORS[name]
    options = {"y": X, **options}
    with pytest.raises(error, match=pattern):
        fastclip.contrast(X, options.pop("y"), 1.0, **options)


def test_the_teacher_gets_no_gradient(engine: str, device: torch.device) -> None:
    x, y, a, b = (t.clone().requires_grad_() for t in torch.randn(4, 5, 6, device=device).unbind())
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    found = fastclip.contrast(x, y, 3.0, targets=(a, b, scale), backend=engine)
    found.row_expectations.sum().backward()
    assert x.grad.any() and y.grad.any()
    assert all(t.grad is None for t in (a, b, scale))
