"""The passes that methods need, and the bytes of products that they keep for the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case
from ..cases import CONTRAST
from ..losses import loss_of


def bytes_of_everything(case: Case) -> int:
    """A memory budget that no engine can exceed: one fp32 number per pair."""
    long, short = max(case.m, case.n), min(case.m, case.n)
    return 4 * (long + 16) * short


def budget_of_method(method: str, device: str) -> int:
    """The bytes of products that fastclip may keep: its default, or 0."""
    from fastclip.engine.checks import budget_of

    return 0 if method == "fastclip budget=0" else budget_of(None, torch.device(device))


def _keeps_everything(case: Case, method: str) -> bool:
    kept = method.endswith(" kept") and case.mode != "forward"
    return kept and not loss_of(case.loss).in_one_go


def _in_one_go(case: Case, method: str) -> bool:
    """True if one sweep suffices. A loss on `contrast` takes two, whatever its kind."""
    return loss_of(case.loss).in_one_go and method not in CONTRAST


def bytes_of_kept_products(m: int, n: int, method: str, device: str) -> int:
    """Bytes of the rows of products that a block keeps between two sweeps; only whole rows are
    kept. The PyTorch engine keeps none, and GPU engines keep none by default."""
    from fastclip.engine.kept import rows_to_keep

    if method == "fastclip torch" or device != "cpu":
        return 0
    return rows_to_keep(m, n, 4, budget_of_method(method, device)) * min(m, n) * 4


def passes_of_two_sweeps(m: int, n: int, kept: int) -> float:
    """The passes of two sweeps: 4 if nothing is kept. The second reuses the `kept` bytes of
    products."""
    return 4.0 - min(1.0, kept / (4 * m * n))


def gradient_bytes(case: Case) -> int:
    """The bytes of the gradients of the features."""
    rows = case.m + (0 if loss_of(case.loss).one_side else case.n)
    return 0 if case.mode == "forward" else rows * case.d * (2 if case.dtype == "bfloat16" else 4)


def kept_bytes(case: Case, method: str, device: str) -> int:
    """How many bytes of its memory budget a method uses: 0 for all but fastclip.

    A loss computed in one go keeps float32 gradients if the features have another dtype; any other
    loss keeps products.
    """
    if not method.startswith("fastclip") or case.mode == "forward":
        return 0
    if _keeps_everything(case, method):
        # For half-precision features the Triton engine keeps weights in half precision.
        return case.m * case.n * (2 if case.half and "triton" in method else 4)
    if _in_one_go(case, method):
        waiting = (case.m + case.n) * case.d * 4
        return (
            waiting
            if case.dtype == "bfloat16" and waiting <= budget_of_method(method, device)
            else 0
        )
    swept = loss_of(case.loss).swept(case.m, case.n, device)
    return sum(bytes_of_kept_products(s.m, s.n, method, device) for s in swept if s.keeps)


def passes_of_fastclip(case: Case, device: str, method: str) -> float:
    swept, pairs = loss_of(case.loss).swept(case.m, case.n, device), case.m * case.n
    if case.mode == "forward":
        return sum(s.forward * s.m * s.n for s in swept) / pairs
    both = sum(s.both * s.m * s.n for s in swept) / pairs
    keeping = sum(s.m * s.n for s in swept if s.keeps) / pairs
    if _keeps_everything(case, method):
        return both - keeping
    kept = kept_bytes(case, method, device)
    if _in_one_go(case, method):
        # The forward computes the gradients, too, if they may be held until the backward; on GPUs
        # they always may.
        return 3.0 if kept or case.dtype != "bfloat16" or device != "cpu" else 4.0
    return both - min(keeping, kept / (4 * pairs))


def passes_of_dense(case: Case, device: str) -> float:
    forward, both = loss_of(case.loss).dense_passes
    return forward if case.mode == "forward" else both


def passes_of_peer(case: Case, device: str, name: str) -> float:
    peer = loss_of(case.loss).peers.get(name)
    if peer is None:
        return 0.0
    return peer.forward if case.mode == "forward" else peer.both


def passes_a_direction(again: int) -> Callable[[Case, str], float]:
    """The passes of losses that compute their logits for each direction, and `again` times in the
    backward."""

    def count(case: Case, device: str) -> float:
        loss = loss_of(case.loss)
        forward, both = loss.dense_passes
        passes = forward if case.mode == "forward" else both + again * forward
        return loss.directions * passes

    return count
