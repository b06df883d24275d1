"""Runs a step of a soak, and returns what is wrong with its results."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from soak.drawn import Step, decides_by_comparison
from soak.judged import exact_of, mistakes, undecided
from support import family
from support.contrast_case import (
    OPTIONS,
    Evaluated,
    check_gradients,
    check_statistics,
    make_problem,
    random_upstream,
)
from support.judge import PRECISIONS
from support.statistics_oracle import Exact
from torch import Tensor

from fastclip import loss, reference

CPU = torch.device("cpu")


def wrong_in(step: Step) -> list[str]:
    """Runs the step in as many Python threads as it says. Returns a line for each mistake."""
    torch.set_num_threads(step.threads)
    run = _contrast if step.is_contrast else _loss
    if step.callers == 1:
        return _caught(run, step)[0]
    with ThreadPoolExecutor(step.callers) as pool:
        found = list(pool.map(lambda _: _caught(run, step), range(step.callers)))
    wrong = [line for lines, _ in found for line in lines]
    if step.backend == "cpu" and not wrong:  # the same bits for any number of threads
        for _, other in found[1:]:
            wrong += [
                f"{name} differs between two Python threads"
                for name, value in found[0][1].items()
                if not torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0))
            ]
    return wrong


def _caught(run: Any, step: Step) -> tuple[list[str], dict[str, Tensor]]:
    torch.set_num_threads(step.threads)  # each Python thread has a number of its own
    try:
        return run(step)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], {}


def _loss(step: Step) -> tuple[list[str], dict[str, Tensor]]:
    case, given, p = step.case, step.arrays(), PRECISIONS[step.precision]
    how = {
        "normalize": step.normalize, "reduction": step.reduction, "upstream": step.upstream()
    }  # fmt: skip
    options = {**how, "backend": step.backend, "memory_budget": step.memory_budget}
    if step.cuts:
        found = _in_slices(step, given, options)
    else:
        found = family.evaluate(case, loss, given, p, CPU, **options)
    if decides_by_comparison(case) and undecided(case, given, p, step.normalize):
        return [], found
    exact = exact_of(case, given, p, **how)
    dense = family.evaluate(case, reference, given, p, CPU, **how)
    return mistakes(found, dense, exact, p, given, step.backend == "reference"), found


def _in_slices(step: Step, given: family.Arrays, options: dict[str, Any]) -> dict[str, Tensor]:
    """Value and gradients of a loss, summed over slices of live pairs."""
    p, total = PRECISIONS[step.precision], {}
    for live in itertools.pairwise(step.cuts):
        found = family.evaluate(step.case, loss, given, p, CPU, live=live, **options)
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    return total


def _contrast(step: Step) -> tuple[list[str], dict[str, Tensor]]:
    dtype = PRECISIONS[step.precision].x
    m, n, d = step.shape
    problem = make_problem(
        m, n, d, dtype=dtype, kind=step.kind, normalize=step.normalize, seed=step.seed,
        scale=step.scale, **OPTIONS[step.name],
    )  # fmt: skip
    evaluated = Evaluated(problem, step.backend, CPU, dtype, memory_budget=step.memory_budget)
    found = evaluated.statistics
    upstream = random_upstream(found)
    total = sum(
        (g * torch.where(getattr(found, name).isfinite(), getattr(found, name), 0)).sum()
        for name, g in upstream.items()
    )
    gradients = evaluated.gradients(total)
    results = {k: torch.from_numpy(v) for k, v in gradients.items()}
    with np.errstate(all="ignore"):
        exact = Exact(problem)
        if problem.margin is not None and _near(exact, problem.margin, dtype):
            return [], results
        try:
            check_statistics(problem, found, dtype, exact)
            of_truth = {name: g.numpy() for name, g in upstream.items()}
            if _overflows(exact, of_truth, gradients, dtype):
                return [], results
            check_gradients(problem, gradients, of_truth, dtype, exact)
        except AssertionError as error:
            return [str(error)], results
    return [], results


def _near(exact: SimpleNamespace, margin: float, dtype: torch.dtype) -> bool:
    """True if rounding decides which pairs exceed the margin."""
    gap = np.inf
    for dim in (0, 1):
        own = np.where(exact.own, exact.t, -np.inf).max(dim, keepdims=True)
        gap = min(gap, np.abs(exact.t - own - margin).min())
    return gap < (1e-12 if dtype == torch.float64 else 1e-5)


def _overflows(exact: Exact, upstream: Any, gradients: Any, dtype: torch.dtype) -> bool:
    truth = exact.gradients(upstream)
    return any(np.abs(getattr(truth, k)).max() > torch.finfo(dtype).max for k in gradients)
