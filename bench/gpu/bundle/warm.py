"""Compiles what `make gpu` launches, on a simulated card: `python -m bench.gpu.bundle.warm I OF`.

It takes every `OF`-th item of a list in the order of `make gpu`. Shapes must equal those of the
headline and of the smoke test, because Triton specialises code for some arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...cases import CONTRAST, SCALES, Case, Inputs
from ...losses import loss_of
from ...methods import on_contrast
from ...methods.passes import bytes_of_everything
from .. import cases, figures, fp32, smoke, smoke_checks, tiles
from . import pretended


def items() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields names and steps: timed cases, the smoke test's problems, tile candidates."""
    seen = set()
    for case in [one for group in cases.GROUPS.values() for one in group()]:
        budgets = [0]
        if case.n == 32768 and not loss_of(case.loss).in_one_go:
            budgets.append(bytes_of_everything(case))
        for budget in budgets:
            key = (case.loss, case.n, case.d, case.dtype, budget)
            if case.n <= 65536 and key not in seen:
                seen.add(key)
                yield f"{case.name} {budget}", partial(timed, case, budget)
                if cases.SPLIT in case.methods:
                    yield f"{case.name} split", partial(timed_split, case)
        for method in CONTRAST:
            if method in case.methods and case.scale == SCALES[0]:
                yield f"{case.name} {method}", partial(timed_on_contrast, case, method)
    for label, loss, dtype in smoke.jobs(["triton", "triton tf32", "triton split"]):
        for problem, check in smoke_checks.checks(loss, dtype, "cpu"):
            if check in ("rerun", "kept", "masked"):
                yield f"smoke {label} {problem} {check}", partial(smoked, label, problem, check)
    for index in range(CANDIDATE_SHARES):
        share = partial(tiles.compile_share, index, CANDIDATE_SHARES, "cpu")
        yield f"tiles {index}", share


CANDIDATE_SHARES = 8


def timed(case: Case, budget: int) -> None:
    function = loss_of(case.loss).of_fastclip()
    _step(case, partial(function, backend="triton", memory_budget=budget))


def timed_on_contrast(case: Case, method: str) -> None:
    _step(case, on_contrast.make(case, method, "cpu", "triton"))


def _step(case: Case, loss: Callable[..., torch.Tensor]) -> None:
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    x, y = (torch.zeros(n, case.d, dtype=dtype) for n in (case.m, case.n))
    inputs = Inputs(x, y, torch.tensor(case.scale), loss_of(case.loss).bias_on("cpu"))
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    loss(inputs.x, inputs.y, inputs.scale, inputs.bias).backward()


def timed_split(case: Case) -> None:
    with fp32.split():
        timed(case, 0)


def smoked(label: str, problem: smoke_checks.Problem, check: str) -> None:
    budget = smoke_checks.budget_of_everything(problem) if check == "kept" else 0
    with smoke.engine_of(label, None) as engine:
        if check == "masked":
            smoke_checks.masked_step(engine, problem, problem.leaves())
            return
        problem.step(engine, problem.leaves(), budget)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.bundle.warm")
    parser.add_argument("index", type=int)
    parser.add_argument("of", type=int)
    options = parser.parse_args(arguments)
    pretended.pretend()
    failed = 0
    for name, step in list(items())[options.index :: options.of]:
        began = time.monotonic()
        try:
            step()
        except Exception as error:
            failed += 1
            print(f"FAILED: {name}: {figures.reason(error)}", flush=True)
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
