"""The measurements on each rank: times, bytes sent and errors of a case; one method's peak memory.

A time is that of the slowest rank after a barrier. All ranks call these functions together, and
must take the same branches.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import warnings
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..case import Inputs
from ..cases import make_inputs
from ..losses import loss_of
from ..measure.memory import WARM_UP_PAIRS, peak_bytes
from ..measure.timing import Run, Timing, host_clock, interleaved
from ..measure.traffic import Traffic
from ..measure.truth import relative_error
from ..methods.step import Step, make_step
from . import methods
from .cases import Case, own_inputs

# Yardsticks of the scale model, timed in the same rounds as the methods. SINGLE: this rank's pairs
# as a batch of one process, while the other ranks do the same. The others are exchanges: those of
# an all-gather, of a reduce-scatter, of one hop of the ring, and of states.
SINGLE = "single"
GATHER, SCATTER, HOP, SMALL = "gather", "scatter", "hop", "small"

_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass
class Measured:
    """One rank's measurements. Times are those of the slowest rank. Errors cover the results of all
    ranks, and only the first rank has them."""

    times: dict[str, Timing] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # dx, dscale


def measure(rank: int, ranks: int, case: Case, wanted: tuple[str, ...], seconds: float) -> Measured:
    """Measures all methods in turns, in rounds of about `seconds` altogether."""
    # From torch.distributed.nn, which open_clip calls.
    warnings.simplefilter("ignore", FutureWarning)
    whole = make_inputs(case.whole)
    inputs = own_inputs(case, rank, whole)
    steps = {method: step_of(case, method, rank, ranks, inputs) for method in wanted}
    found = Measured()
    results = {}
    for method, step in steps.items():
        with Traffic() as traffic:
            results[method] = step()
        found.sent[method] = traffic.total
    if not case.timed:
        return found
    found.errors = errors(case, rank, ranks, whole, results)
    results.clear()
    yardsticks = _yardsticks(case, rank, ranks, inputs)
    for run in yardsticks.values():
        run()
    runs = {**steps, **yardsticks}
    found.times = interleaved(runs, seconds, clock=_slowest, now=_agreed_time)
    return found


def step_of(case: Case, method: str, rank: int, ranks: int, inputs: Inputs) -> Step:
    loss = methods.make(case.loss, method, rank, ranks)

    def both() -> tuple[Tensor | None, ...]:
        value = loss(inputs.x, inputs.y, inputs.scale, inputs.bias)
        return value.detach(), *torch.autograd.grad(value, inputs.leaves, allow_unused=True)

    return both


def _yardsticks(case: Case, rank: int, ranks: int, inputs: Inputs) -> dict[str, Run]:
    from fastclip.distributed.collectives import gather_rows, scatter_sum_rows

    group, texts = dist.group.WORLD, inputs.y.detach()
    sizes = (case.b,) * ranks
    gradients = torch.zeros((ranks * case.b, case.d))
    arriving = torch.empty_like(texts)
    states = torch.zeros(ranks * case.b, dtype=torch.float64)

    def hop() -> None:
        operations = [
            dist.P2POp(dist.isend, texts, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, arriving, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return {
        SINGLE: make_step(case.single, "fastclip", inputs),
        GATHER: lambda: gather_rows(texts, sizes, group),
        SCATTER: lambda: scatter_sum_rows(gradients, sizes, rank, group),
        HOP: hop,
        SMALL: lambda: dist.all_reduce(states),
    }


def _slowest(run: Run, repeats: int) -> float:
    dist.barrier()
    taken = torch.tensor(host_clock(run, repeats), dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _agreed_time() -> float:
    """The first rank's time, on every rank."""
    now = torch.tensor(time.perf_counter(), dtype=torch.float64)
    dist.broadcast(now, 0)
    return float(now)


def errors(
    case: Case, rank: int, ranks: int, whole: Inputs, results: dict[str, tuple[Tensor | None, ...]]
) -> dict[str, tuple[float, float]]:
    """Errors of dx and dscale, averaged over ranks, against float64 gradients on all pairs."""
    true = None
    if rank == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or threads)  # the other ranks wait
        true = loss_of(case.loss).truth(whole.x, whole.y, whole.scale, whole.bias)
        torch.set_num_threads(threads)
    found = {}
    for method, (_, dx, _, dscale, *_) in results.items():
        parts = [torch.empty_like(dx) for _ in range(ranks)] if rank == 0 else None
        dist.gather(dx, parts)
        sum_of_dscale = dscale.double()
        dist.all_reduce(sum_of_dscale)
        if true is not None:
            found[method] = (
                relative_error(torch.cat(parts).double() / ranks, true.dx),
                relative_error(sum_of_dscale / ranks, true.dscale),
            )
    return found


def peak(rank: int, ranks: int, case: Case, method: str) -> int | None:
    """Bytes beyond the rank's inputs, gradients included; in a fresh process."""
    warnings.simplefilter("ignore", FutureWarning)
    _give_back_at_once()
    small = replace(case, b=min(WARM_UP_PAIRS, case.b))
    step_of(small, method, rank, ranks, own_inputs(small, rank))()
    step = step_of(case, method, rank, ranks, own_inputs(case, rank))
    results: list[object] = []  # the gradients live until the mark has been read
    dist.barrier()
    return peak_bytes(lambda: results.append(step()))


def _give_back_at_once() -> None:
    """Makes malloc return freed memory at once, so that the high-water mark counts only memory in
    use. glibc's own threshold grows with the blocks that are freed; it left a third more of
    open_clip's peak resident."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
