"""Own positives, ids and margins: which pair is which, and which lines have pairs of a set.

This takes O((M + N) D) operations of plain PyTorch, and reads no number from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import LOG2E
from . import arithmetic
from .block import Block, Side
from .dtypes import accumulation_dtype, state_dtype


def partners(m: int, n: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns for each row (M) the column of its own positive, clamped to the block, and a mask of
    the rows whose own positive lies in the block."""
    columns = torch.arange(m, device=device) + offset
    inside = (columns >= 0) & (columns < n)
    return columns.clamp(0, n - 1), inside


def at_rows(values: Tensor, m: int, offset: int, absent: float) -> Tensor:
    """Maps values of columns (N) to rows (M): row i gets the value of the column of its own
    positive, or `absent` if it has none."""
    n = values.shape[0]
    columns, inside = partners(m, n, offset, values.device)
    # The index must be valid in a block without columns, too.
    padded = torch.cat((values, values.new_full((1,), absent)))
    return padded[torch.where(inside, columns, n)]


def at_columns(values: Tensor, n: int, offset: int, absent: float) -> Tensor:
    """Maps values of rows (M) to columns (N): column j gets the value of the row that has its own
    positive in column j, or `absent` if there is none."""
    columns, inside = partners(values.shape[0], n, offset, values.device)
    # Rows without an own positive write past the last column.
    out = values.new_full((n + 1,), absent)
    return out.scatter(0, torch.where(inside, columns, n), values)[:n]


def codes_of(ids_x: Tensor, ids_y: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ids of any size to int32 numbers that are equal where the ids are."""
    m = ids_x.shape[0]
    ordered, places = torch.cat((ids_x.to(torch.int64), ids_y.to(torch.int64))).sort()
    # An id's number counts the distinct ids below it.
    numbers = torch.zeros_like(ordered, dtype=torch.int32)
    numbers[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    codes = torch.zeros_like(numbers).scatter(0, places, numbers)
    return codes[:m], codes[m:]


def numbers_of(codes_x: Tensor, codes_y: Tensor) -> tuple[Tensor, Tensor]:
    """Maps codes to int64 numbers below N that only depend on the codes of y (N), so that ranks
    with different x get the same numbers. Rows whose code no column has get N."""
    n = codes_y.shape[0]
    ordered, places = codes_y.sort()
    numbers = torch.zeros_like(places)
    numbers[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    at = torch.searchsorted(ordered, codes_x).clamp_max(n - 1)
    of_rows = torch.where(ordered[at] == codes_x, numbers[at], n)
    return of_rows, torch.zeros_like(numbers).scatter(0, places, numbers)


def own_products(x: Side, y: Side, offset: int, labels: Tensor | None = None) -> Tensor:
    """Returns (M): t of each row's own positive, infinite for a row without one. labels (M): the
    columns of the own positives, in place of offset."""
    m, n = x.features.shape[0], y.features.shape[0]
    columns, inside = partners(m, n, offset, x.features.device)
    if labels is not None:
        columns, inside = labels.long(), torch.ones_like(inside)
    dtype = accumulation_dtype(x.features)
    # The usual block needs no copy of y.
    plain = offset == 0 and m == n and labels is None
    partner = y.features if plain else y.features[columns]
    t = (x.features.to(dtype) * partner.to(dtype)).sum(1)
    if x.factor is not None:
        t = t * x.factor
    if y.factor is not None:
        t = t * y.factor[columns]
    return torch.where(inside, t, torch.inf)


def levels(block: Block, labels: Tensor | None, bias: Tensor | None, above: float) -> Tensor:
    """The levels of lines (M + N), in log2 units: the logit of the own positive plus `above`.
    Infinite for lines without one and, with labels, which rows may share, for columns."""
    m, n = block.sizes()
    device, dtype = block.x.features.device, state_dtype(block.x.features.device)
    if m == 0 or n == 0:
        return torch.full((m + n,), torch.inf, dtype=dtype, device=device)
    columns, inside = partners(m, n, block.offset, device)
    if labels is not None:
        columns, inside = labels.long(), torch.ones_like(inside)
    t = own_products(block.x, block.y, block.offset, labels).to(dtype)
    logits = torch.where(inside, t, 0) * block.scale.reshape(()).to(dtype)
    if bias is not None:
        logits = logits + bias.reshape(()).to(dtype)
    if block.key_bias is not None:
        logits = logits + block.key_bias.to(dtype)[columns]
    # An own positive that key_bias takes out is none.
    exists = inside & (logits != -torch.inf)
    of_rows = torch.where(exists, (logits + above) * LOG2E, torch.inf)
    if labels is not None:
        return torch.cat((of_rows, of_rows.new_full((n,), torch.inf)))
    return torch.cat((of_rows, at_columns(of_rows, n, block.offset, torch.inf)))


def thresholds(
    x: Side, y: Side, offset: int, labels: Tensor | None, margin: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest t that a negative may have in each row and column. With labels, which several
    rows may share, columns have no limit.

    Duplicates of the own positive stay, however the products are rounded.
    """
    m, n = x.features.shape[0], y.features.shape[0]
    if m == 0 or n == 0:
        dtype = accumulation_dtype(x.features)
        return tuple(x.features.new_full((k,), torch.inf, dtype=dtype) for k in (m, n))
    t = own_products(x, y, offset, labels)
    longest = [
        1.0 if side.factor is not None
        else torch.linalg.vector_norm(side.features, dim=1, dtype=t.dtype).amax()
        for side in (x, y)
    ]  # fmt: skip
    rounding = 16 * torch.finfo(t.dtype).eps
    if t.dtype == torch.float32 and arithmetic.tf32():
        # An engine's product may round each feature by a relative 2^-11; the products here do not.
        rounding += 2.0**-10
    rounding = rounding * longest[0] * longest[1]
    of_rows = t + margin.to(t.dtype).reshape(()) + rounding
    if labels is not None:
        return of_rows, of_rows.new_full((n,), torch.inf)
    return of_rows, at_columns(of_rows, n, offset, torch.inf)


def occupied(block: Block, codes: int, rows: bool, columns: bool) -> Tensor | None:
    """Returns the wanted lines that have negatives, bool (1, M + N). With same_id_positive it is
    (2, M + N); the second row marks lines that have positives by id. None: the offset decides.

    codes: a number above all ids of the block, which are codes (`codes_of`): M + N, or more if the
    block is part of a larger one.
    """
    x, y, key_bias, offset = block.x, block.y, block.key_bias, block.offset
    if x.ids is None and key_bias is None and rows and columns:
        return None
    m, n = x.features.shape[0], y.features.shape[0]
    device = x.features.device
    alive = torch.ones(n, dtype=torch.bool, device=device)
    if key_bias is not None:
        alive = key_bias != -torch.inf
    partner, inside = partners(m, n, offset, device)
    own = inside.long()
    by_id = [torch.zeros(k, dtype=torch.int64, device=device) for k in (m, n)]
    if x.ids is not None:
        own_same = own * (x.ids == y.ids[partner])
        by_id = [
            _count(x.ids, y.ids, alive, codes) - own_same * alive[partner],
            _count(y.ids, x.ids, torch.ones_like(x.ids), codes)
            - at_columns(own_same, n, offset, 0),
        ]
    found = [
        alive.sum() - own * alive[partner] - by_id[0] > 0,
        alive & (m - at_columns(own, n, offset, 0) - by_id[1] > 0),
    ]
    sets = [torch.cat((found[0] & rows, found[1] & columns))]
    if block.same_id_positive:
        sets.append(torch.cat((by_id[0] > 0, alive & (by_id[1] > 0))))
    return torch.stack(sets)


def _count(codes: Tensor, others: Tensor, weights: Tensor, most: int) -> Tensor:
    """Returns for each code the sum of the weights of equal codes among `others`.

    All codes are below `most`.
    """
    found = torch.zeros(most, dtype=torch.int64, device=codes.device)
    return found.scatter_add(0, others.long(), weights.long())[codes]
