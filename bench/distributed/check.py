"""The scale model's prediction for a measured case: its formulas with this machine's rates.

The rate of work is that of one process on a rank's own pairs while all ranks do the same, so that
it includes the competition for cores and memory. The rates of exchanges are measured alone.
"""

from __future__ import annotations

from ..losses import loss_of
from ..measure.timing import Timing
from ..methods import registry
from ..methods.passes import bytes_of_kept_products, passes_of_two_sweeps
from ..scale import model
from .cases import Case
from .methods import GATHERED, GATHERED_RECOMPUTED, RING, RING_RECOMPUTED
from .rank import GATHER, HOP, SCATTER, SINGLE, SMALL


def makes_gradients_at_once(case: Case, method: str) -> bool:
    return loss_of(case.loss).in_one_go and (case.dtype, method) == ("float32", GATHERED)


def passes(case: Case, method: str) -> float:
    """The passes that the loss needs across ranks.

    The second sweep reuses the products that the first one kept. The forward computes the gradients
    if weights need no state, all texts are gathered and the gradients may be held in the features'
    dtype.
    """
    if makes_gradients_at_once(case, method):
        return 3.0
    rows_by_all = case.b, case.ranks * case.b
    kept = bytes_of_kept_products(*rows_by_all, GATHERED, "cpu")
    return passes_of_two_sweeps(*rows_by_all, kept)


def small_exchanges(case: Case, method: str) -> int:
    """The number of small exchanges in a step.

    One compares the ranks' arguments, on CPUs at every step. If weights need a state, the exchanges
    of states follow. If they need none, one exchange of upstream gradients follows, but not if the
    forward has computed the gradients.
    """
    if not loss_of(case.loss).in_one_go:
        return model.STATE_EXCHANGES + 1
    return 1 if makes_gradients_at_once(case, method) else 2


def predicted_ms(case: Case, method: str, times: dict[str, Timing]) -> float | None:
    """The predicted time of a step. None for open_clip, because the memory traffic of its logits
    has no measured rate, and for a single rank."""
    if method not in (GATHERED, RING) or case.ranks == 1:
        return None
    due = registry.METHODS["fastclip"].passes(case.single, "cpu")
    job = model.Job(
        case.ranks, case.b, case.d, case.itemsize, passes(case, method),
        small_exchanges(case, method),
    )  # fmt: skip
    net = model.Loopback(
        flops=due * job.block_flops / times[SINGLE].median,
        gathered=job.others * job.features / times[GATHER].median,
        scattered=job.others * job.gradients / times[SCATTER].median,
        hopped=job.features / times[HOP].median,
        small=times[SMALL].median,
    )
    predict = model.ring_seconds if method == RING else model.gathered_seconds
    return 1e3 * predict(job, net)


def stated_mib(case: Case, method: str) -> float | None:
    """The memory that a rank holds if no products are kept; None for other methods. On CPUs the
    sum of gradients takes a copy of them."""
    job = model.Job(case.ranks, case.b, case.d, case.itemsize)
    if method == GATHERED_RECOMPUTED:
        return model.gathered_bytes(job, scratch=job.ranks * job.gradients) / 2**20
    return model.ring_bytes(job) / 2**20 if method == RING_RECOMPUTED else None
