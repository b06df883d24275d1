"""`fastclip.contrast` of a batch that is spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.compile_marks import no_compile
from ..kinds import LineStatistics
from .calls import ContrastCall, begin_contrast, contrast_call
from .compiled.call import takes_contrast, traced_contrast
from .sharded_statistics import sharded_statistics


def contrast(
    x: Tensor,  # (m, D)
    y: Tensor | None,  # (n, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    labels: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    means: bool = False,
    kind: str = "softmax",
    above: float | None = None,
    targets: tuple[Tensor, Tensor, Tensor | float] | None = None,
    guide: tuple[Tensor, Tensor] | Tensor | None = None,
    limits: Tensor | None = None,
    normalize: bool = False,
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """`fastclip.contrast` of all ranks' rows and columns; returns the statistics of this rank's.

        c = contrast(x, y, logit_scale)
        loss = (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2

    computes `clip_loss` if all ranks' batches have one size. A rank's loss is its share of the
    whole: the mean over ranks must be the loss of the whole batch. If batches differ in size, take
    R / B times the sum over this rank's pairs as its loss (R ranks, B pairs in all). After DDP's
    mean over ranks, the gradients of towers, scale and biases equal those of one process that takes
    the mean of the ranks' losses.

    Args:
        x, y: (m, D), (n, D), this rank's rows and columns; m and n may differ. With y=None all
            ranks' features are contrasted with themselves.
        offset: the own positive of row i is this rank's column i + offset, if the rank has that
            column; None: no row has an own positive, on any rank.
        labels: (m), for each row one of this rank's columns.
        ids: (x_ids (m), y_ids (n)) of this rank's lines. They are compared across ranks.
        false_negative_margin: applies to a rank's lines with its own positives and margin.
        key_bias: (n), for this rank's columns. Its gradient is the sum over all ranks.
        targets, guide: (m, D'), (n, D'), of this rank's rows and columns. The columns' are
            gathered, also with `ring`. limits: (m).
        process_group, ring, uneven: as in `clip_loss`. With `uneven` a rank may have no rows, no
            columns, or neither.
        logit_scale, logit_bias, same_id, rows, columns, means, kind, above, normalize: the same on
            all ranks. These, backend and memory_budget are as in `fastclip.contrast`.

    Every rank must run backward through at least one of its statistics, since the others' gradients
    wait for it. A rank without pairs can use `c.rows.sum()`.

    Bytes that a rank sends (B columns of all ranks, E bytes a feature element): features and
    gradients as in `clip_loss`, with n in place of b; at most 56 * B for states and coefficients,
    40 * B more with `same_id="positive"`, 8 * B for ids and labels, 4 * B for a margin, 16 * B for
    key_bias; with `means` and ids, 32 * B * D in the forward and 64 * B * D in the backward,
    half as many with y=None.

    Bytes that a rank holds: as in `clip_loss`. If only some of its rows have their positive among
    its columns, `4 B D` more while gathered gradients are concatenated.

    Raises, on every rank: as `fastclip.contrast`, and ValueError and RuntimeError as `clip_loss`.
    """
    given, call = contrast_call(
        x, y, logit_scale, logit_bias, offset=offset, labels=labels, ids=ids, same_id=same_id,
        false_negative_margin=false_negative_margin, key_bias=key_bias, rows=rows,
        columns=columns, means=means, kind=kind, above=above, targets=targets, guide=guide,
        limits=limits, normalize=normalize, ring=ring, uneven=uneven, backend=backend,
        memory_budget=memory_budget,
    )  # fmt: skip
    return contrast_of(given, process_group, call)


def contrast_of(
    given: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> LineStatistics:
    """The entry of every call of `contrast` across ranks."""
    if torch.compiler.is_compiling() and takes_contrast(given, process_group, call):
        return traced_contrast(given, process_group, call)
    return _eager_contrast(given, process_group, call)


@no_compile
def _eager_contrast(
    given: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> LineStatistics:
    return sharded_statistics(*begin_contrast(given, process_group, call))
