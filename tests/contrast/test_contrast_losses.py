"""Random losses on random statistics have the oracle's gradients, tested with hypothesis.

A loss is written once, in PyTorch, and differentiated twice: through `contrast`, and through the
oracle's statistics, whose gradients the oracle computes from formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.contrast_case import Evaluated, check_gradients, make_problem
from support.statistics_oracle import KINDS, NAMES, Exact, Problem
from torch import Tensor

from fastclip import LineStatistics

pytest.importorskip("hypothesis")
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

# Common forms of losses, as functions of a line's statistic and its own positive's logit.
TERMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross entropy": lambda s, p, _: F.softplus(s - p, threshold=60),
    "decoupled": lambda s, p, _: s - p,
    "additive margin": lambda s, p, m: F.softplus(s - p + m, threshold=60),
    "focal": lambda s, p, _: torch.sigmoid(s - p).square() * F.softplus(s - p, threshold=60),
    "global": lambda s, p, m: torch.exp((s - p) / 10) * m,
    "sum": lambda s, p, _: s + F.softplus(-p, threshold=60),
    "repelled": lambda s, p, m: -m * s,
}


class Term(NamedTuple):
    statistic: str
    form: str
    margin: float
    weight: float


terms = st.builds(
    Term,
    st.sampled_from([name for name in NAMES if name != "positives"]),
    st.sampled_from(sorted(TERMS)),
    st.floats(0.1, 3),
    st.floats(-2, 2).filter(lambda w: abs(w) > 0.01),
)
problems = st.fixed_dictionaries(
    {
        "m": st.integers(1, 70), "n": st.integers(1, 70), "d": st.integers(1, 40),
        "seed": st.integers(0, 2**31), "kind": st.sampled_from(sorted(KINDS)),
        "scale": st.sampled_from([-5.0, 0.5, 14.3, 60.0]), "bias": st.floats(-8, 8),
        "normalize": st.booleans(),
        "offset": st.sampled_from([None, 0, 0, 0, 3, -11]),
        "ids": st.sampled_from([None, 1, 4, 1000]), "key_bias": st.sampled_from([None, 0.5, 6.0]),
        "margin": st.sampled_from([None, None, 0.05, -0.4]),
        "same_id": st.sampled_from(["ignore", "positive"]), "means": st.booleans(),
        "masked": st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        "own": st.sampled_from(["offset", "offset", "labels", "itself"]),
    }
)  # fmt: skip


def write(statistics: dict[str, Tensor], problem: Problem, drawn: list[Term]) -> Tensor:
    """Returns the sum of the terms whose statistics are all present. Without y the terms take 0 for
    a positive's logit."""
    total, (m, n) = (
        torch.zeros((), dtype=torch.float64),
        (len(problem.x if side is None else side) for side in (problem.x, problem.y)),
    )
    i = torch.arange(m)
    positives = statistics.get("positives", torch.zeros(m, dtype=torch.float64))
    partner = i + (problem.offset if problem.offset is not None else n)
    if problem.labels is not None:
        partner = torch.from_numpy(problem.labels)
    inside = (partner >= 0) & (partner < n)
    # The loss of a key that key_bias takes out is infinite.
    inside = inside & positives.isfinite()
    own = {
        "row": (positives[inside], i[inside]), "column": (positives[inside], partner[inside]),
    }  # fmt: skip
    for term in drawn:
        if term.statistic not in statistics:
            continue
        own_logits, lines = own["column" if "column" in term.statistic else "row"]
        values = statistics[term.statistic][lines]
        some = values.isfinite()
        total = (
            total
            + term.weight * TERMS[term.form](values[some], own_logits[some], term.margin).sum()
        )
    return total


# The one feature's products nearly cancel in dx, so that the truth's own roundings show.
CANCELLING = {
    "m": 57, "n": 6, "d": 1, "seed": 0, "kind": "sigmoid", "scale": -5.0, "bias": 0.0,
    "normalize": False, "offset": 0, "ids": None, "key_bias": 6.0, "margin": None,
    "same_id": "ignore", "means": False, "masked": 0.0, "own": "offset",
}  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@example(options=CANCELLING, drawn=[Term("columns", "global", 1.0, 1.0)])
@given(options=problems, drawn=st.lists(terms, min_size=1, max_size=4))
def test_any_loss(
    engine: str, device: torch.device, options: dict[str, Any], drawn: list[Term]
) -> None:
    if options["ids"] is None:
        options = options | {"same_id": "ignore"}
    own = options["own"]
    if own != "offset":
        options = options | {"offset": 0}
    if own == "itself":
        options = options | {"key_bias": None, "margin": None}
    options = {k: v for k, v in options.items() if k != "own"}
    options |= {"labels": own == "labels", "one_set": own == "itself"}
    problem = make_problem(
        *(options[k] for k in "mnd"), **{k: v for k, v in options.items() if k not in "mnd"},
        dtype=torch.float64,
    )  # fmt: skip
    exact = Exact(problem)
    leaves = {
        name: torch.tensor(value, requires_grad=True) for name, value in exact.statistics().items()
    }
    truth = write(leaves, problem, drawn)
    assume(truth.requires_grad)
    upstream = torch.autograd.grad(truth, list(leaves.values()), allow_unused=True)
    upstream = {
        name: np.zeros(leaf.shape) if g is None else g.numpy()
        for (name, leaf), g in zip(leaves.items(), upstream, strict=True)
    }
    dtype = torch.float64
    evaluated = Evaluated(problem, engine, device, dtype)
    found = {k: v.cpu() for k, v in named(evaluated.statistics).items()}
    value = write(found, problem, drawn)
    torch.testing.assert_close(value, truth.detach(), rtol=1e-7, atol=1e-9)
    if value.requires_grad:
        check_gradients(problem, evaluated.gradients(value), upstream, dtype, exact)


def named(found: LineStatistics) -> dict[str, Tensor]:
    return {name: t for name, t in found._asdict().items() if t is not None}
