"""What the scale model says of a case that was measured: the same formulas, this machine's rates.

Work goes at the rate of one process on a rank's own pairs while all ranks do the same, so that what
ranks share of the machine, cores or memory, is in it; exchanges go at the rates of theirs.
"""

from __future__ import annotations

from ..losses import loss_of
from ..measure.timing import Timing
from ..methods import registry
from ..scale import model
from .cases import Case
from .methods import GATHERED, GATHERED_RECOMPUTED, RING, RING_RECOMPUTED
from .rank import GATHER, HOP, SCATTER, SINGLE, SMALL


def makes_gradients_at_once(case: Case, method: str) -> bool:
    return loss_of(case.loss).in_one_go and (case.dtype, method) == ("float32", GATHERED)


def passes(case: Case, method: str) -> float:
    """That are due across ranks: the second sweep takes what is kept of the first one's products.
    Where weights need no state and all texts are there, gradients are made at once, if they can
    wait in the features' dtype."""
    if makes_gradients_at_once(case, method):
        return 3.0
    rows_by_all = case.b, case.ranks * case.b
    kept = registry.kept_products(*rows_by_all, GATHERED, "cpu")
    return registry.passes_of_two_sweeps(*rows_by_all, kept)


def small_exchanges(case: Case, method: str) -> int:
    """On CPUs ranks compare what they bring at every step. Where weights need no state none is
    exchanged, and gradients that the forward has made need no other ranks' upstream ones."""
    if not loss_of(case.loss).in_one_go:
        return model.STATE_EXCHANGES + 1
    return 1 if makes_gradients_at_once(case, method) else 2


def predicted_ms(case: Case, method: str, times: dict[str, Timing]) -> float | None:
    """None of open_clip's, whose logits' traffic has no rate here, and of a single rank."""
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
    """What a rank holds where no products are kept. On CPUs a copy of gradients is added up."""
    job = model.Job(case.ranks, case.b, case.d, case.itemsize)
    if method == GATHERED_RECOMPUTED:
        return model.gathered_bytes(job, scratch=job.ranks * job.gradients) / 2**20
    return model.ring_bytes(job) / 2**20 if method == RING_RECOMPUTED else None
