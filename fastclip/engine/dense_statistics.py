"""`fastclip.contrast`, dense: the (M, N) matrix of logits, and masks of the pairs that count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import LN2, LOG2E, Kind, LineStatistics, kind_of
from .dense import dense_logits


def dense_contrast(
    x: Tensor,  # (M, D)
    y: Tensor | None,  # (N, D)
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
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """`fastclip.contrast` in plain PyTorch, with derivatives of any order and O(M N) memory.

    Args, Returns, Raises: as `fastclip.contrast`; backend and memory_budget are ignored. Logits are
    float32, or float64 if either side is.
    """
    one_set = y is None
    y = x if one_set else y
    ids = (ids, ids) if isinstance(ids, Tensor) else ids
    columns = columns and not one_set
    logits = dense_logits(x, y, logit_scale, logit_bias, normalize)
    compared = (x, y) if guide is None else (guide, guide) if isinstance(guide, Tensor) else guide
    t = dense_logits(*(side.detach() for side in compared), 1.0, None, normalize)
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)
    m, n = logits.shape
    i, j = torch.arange(m, device=x.device)[:, None], torch.arange(n, device=x.device)
    own = i + offset == j if offset is not None else torch.zeros_like(t, dtype=torch.bool)
    if labels is not None:
        own = labels[:, None] == j
    same = own if ids is None else (ids[0][:, None] == ids[1]) | own
    by_row = by_column = ~same
    if false_negative_margin is not None:
        similarity = torch.where(own, t, -torch.inf)
        for dim in (1, 0) if labels is None else (1,):
            # A line without an own positive has no limit.
            limit = similarity.amax(dim, keepdim=True)
            limit = torch.where(limit == -torch.inf, torch.inf, limit + false_negative_margin)
            if dim == 1:
                by_row = by_row & ~(t > limit)
            else:
                by_column = by_column & ~(t > limit)
    found = kind_of(kind)
    positives = torch.where(own, logits, 0).sum(1)
    positives = torch.where(own.any(1), positives, torch.nan).double()
    if limits is not None:
        by_row = by_row & ~(t > limits[:, None])
        by_column = by_column & ~(t > limits) if one_set else by_column
    levels: list[Tensor | None] = [None, None]
    if found.has_levels:
        # A line without an own positive has an infinite level.
        there = own & (logits > -torch.inf)
        exists = there.any(0) if labels is None else torch.zeros_like(there[0])
        # An own positive that key_bias takes out is none.
        own_logits = torch.where(there, logits, 0)
        levels = [
            torch.where(some, own_logits.sum(dim, dtype=torch.float64) + above, torch.inf)
            for dim, some in ((1, there.any(1)), (0, exists))
        ]
    statistics = LineStatistics(
        _statistic(found, logits, by_row, 1, levels[0]) if rows else None,
        _statistic(found, logits, by_column, 0, levels[1]) if columns else None,
        None if one_set else positives,
    )
    # The pair of a feature with itself is no positive of its own.
    positive = same & ~own if one_set else same
    if same_id == "positive":
        sign = -1 if found.negates_positives else 1
        by_id = [_statistic(found, sign * logits, positive, dim) for dim in (1, 0)]
        statistics = statistics._replace(
            row_positives=by_id[0] if rows else None, column_positives=by_id[1] if columns else None
        )
    if targets is not None:
        teacher = dense_logits(
            *(side.detach() for side in targets[:2]), targets[2], None, normalize
        )
        expected = [
            (teacher.double().softmax(dim) * logits.double()).sum(dim) if wanted else None
            for dim, wanted in ((1, rows), (0, columns))
        ]
        statistics = statistics._replace(
            row_expectations=expected[0], column_expectations=expected[1]
        )
    if not means:
        return statistics
    counted = ~same if one_set else ~same | own
    # A key that key_bias takes out counts in no mean. NaN logits count.
    alive = True if key_bias is None else key_bias != -torch.inf
    counted, positive = counted & alive, positive & alive
    by_name = {"means": counted | positive if same_id == "positive" else counted}
    if same_id == "positive":
        by_name["positive_means"] = positive
    wanted = [("row", 1)] * rows + [("column", 0)] * columns
    return statistics._replace(**{
        f"{line}_{name}": _mean(logits, pairs, dim)
        for name, pairs in by_name.items() for line, dim in wanted
    })  # fmt: skip


def _mean(logits: Tensor, counts: Tensor, dim: int) -> Tensor:
    """The mean logit of each line over the pairs that count; NaN without any."""
    return torch.where(counts, logits.double(), 0).sum(dim) / counts.sum(dim)


def _statistic(
    kind: type[Kind], logits: Tensor, counts: Tensor, dim: int, levels: Tensor | None = None
) -> Tensor:
    """The statistic of each line over the pairs that count; float64."""
    logits = logits.double() * LOG2E
    if not kind.has_shift:
        relative = torch.zeros_like(logits) if levels is None else levels.unsqueeze(dim) * LOG2E
        return torch.where(counts, kind.fold(logits, relative), 0).sum(dim)
    logits = torch.where(counts, logits, -torch.inf)
    largest = logits.detach().amax(dim, keepdim=True)
    shift = torch.where(largest == -torch.inf, 0, largest)
    sums = kind.fold(logits, shift).sum(dim)
    # A line without pairs has -inf, and no gradient.
    some = sums != 0  # NaN counts
    return torch.where(
        some, (torch.where(some, sums, 1).log2() + shift.squeeze(dim)) * LN2, -torch.inf
    )
