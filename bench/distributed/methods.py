"""Every method across processes: open_clip's losses, which build their logits, and this library's.

With each of them a rank receives gradients from all ranks' losses: as in open_clip with
`local_loss=True, gather_with_grad=True`, or any `dist_impl` of its SigLIP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..losses import Rival, loss_of
from ..methods import open_clip
from ..methods.registry import Unavailable

LossFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

GATHERED, RING = "fastclip", "fastclip ring"
GATHERED_RECOMPUTED, RING_RECOMPUTED = "fastclip budget=0", "fastclip ring budget=0"


def names_of(loss: str, timed: bool = True) -> tuple[str, ...]:
    """The names of a loss's methods. The first is the baseline of the others.

    Kept products are up to b B numbers (B: all ranks' pairs), within the budget, and hide all other
    memory. If only memory is measured (not `timed`), variants that keep none are therefore added.
    """
    ours = (GATHERED, RING) if timed else (GATHERED, GATHERED_RECOMPUTED, RING, RING_RECOMPUTED)
    return (*loss_of(loss).rivals, *ours)


def make(loss: str, method: str, rank: int, ranks: int) -> LossFunction:
    """The loss of this rank's pairs.

    Raises:
        Unavailable: with the reason.
    """
    every = names_of(loss, timed=False)
    if method not in every:
        raise Unavailable(f"{loss} has no method {method!r}: {', '.join(every)}")
    if rival := loss_of(loss).rivals.get(method):
        return _open_clip(loss_of(loss).module, rival, rank, ranks)
    options = {
        "ring": method in (RING, RING_RECOMPUTED),
        "memory_budget": 0 if method.endswith("budget=0") else None,
    }
    return partial(loss_of(loss).of_fastclip("distributed"), **options)


def _open_clip(module: str, rival: Rival, rank: int, ranks: int) -> LossFunction:
    try:
        losses = open_clip.import_module("open_clip.loss")
    except ImportError as error:
        raise Unavailable(str(error)) from None
    return getattr(losses, module)(rank=rank, world_size=ranks, **rival.options)
