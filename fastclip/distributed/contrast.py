"""`fastclip.contrast` of a batch that is spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.no_compile import no_compile
from ..kinds import LineStatistics
from .calls import ContrastCall, begin_contrast
from .compiled.call import takes_contrast, traced_contrast
from .sharded_statistics import sharded_statistics


def contrast(
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    kind: str = "softmax",
    normalize: bool = False,
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """`fastclip.contrast` of the rows and the columns of all ranks: of its statistics those of this
    rank's lines.

        c = contrast(x, y, logit_scale)
        loss = (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2

    is `clip_loss` here, of even batches. A loss of one's own is this rank's share of the whole, so
    that the mean over ranks is meant: R / B times the sum over this rank's lines where batches
    differ in size. After DDP's mean over ranks the gradients of towers, scale, biases are those of
    one process that takes the mean of the ranks' losses.

    Args:
        x, y: (m, D), (n, D), this rank's rows and columns; m and n need not be equal.
        offset: row i's own positive is this rank's column i + offset, where it has one; None: no
            row has one, on any rank.
        ids: (x_ids (m), y_ids (n)) of this rank's lines; compared across ranks.
        false_negative_margin: each rank's own positives and margin say what its lines leave out.
        key_bias: (n), of this rank's columns. Its gradient is the sum over all ranks.
        process_group, ring, uneven: as in `clip_loss`. Sizes m and n are exchanged; with `uneven` a
            rank may have no rows, no columns, or neither.
        logit_scale, logit_bias, same_id, rows, columns, kind, normalize: the same on all ranks;
            these, backend and memory_budget as in `fastclip.contrast`.

    Every rank must go backward through something that it got, a rank without pairs too, since the
    others' gradients wait for it: `c.rows.sum()` of no rows is enough.

    Bytes that a rank sends, E per feature element, B columns of all ranks: `(R - 1) n D E` for the
    features, `4 (R - 1) n D` for their gradients in fp32, around the ring features twice, as in
    `clip_loss`. Beside them at most 56 B for states and coefficients; 40 B more with
    `same_id="positive"`, 8 B for ids, 4 B for a margin, 16 B for key_bias.

    Bytes that a rank holds: as in `clip_loss`; where some of its rows alone have their positive
    among its columns, `4 B D` more while gathered gradients are put together.

    Raises, on every rank: what `fastclip.contrast` does; ValueError and RuntimeError as in
        `clip_loss`.
    """
    given = (x, y, logit_scale, logit_bias, key_bias, ids, false_negative_margin)
    call = ContrastCall(
        offset, same_id, rows, columns, kind, normalize, ring, uneven, backend, memory_budget
    )
    if torch.compiler.is_compiling() and takes_contrast(given, process_group, call):
        return traced_contrast(given, process_group, call)
    return _eager_contrast(given, process_group, call)


@no_compile
def _eager_contrast(
    given: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> LineStatistics:
    return sharded_statistics(*begin_contrast(given, process_group, call))
