"""The k best keys in plain PyTorch: `torch.topk` of a chunk's products chooses a few more, and
their exact scores decide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine.dtypes import state_dtype
from .chunks import chunks_of
from .scores import bands, pair_scores, product_error
from .sides import Sides

SPARE = 16  # candidates beyond k


def topk(sides: Sides, k: int, limit: float, exclude_own: bool) -> tuple[Tensor, Tensor]:
    """Returns scores (M, k), in the dtype of states, and indices (M, k), int64."""
    m, device = len(sides.x), sides.device
    scores = torch.full((m, k), -torch.inf, dtype=state_dtype(device), device=device)
    indices = torch.full((m, k), -1, dtype=torch.int64, device=device)
    if sides.is_empty:
        return scores, indices
    band, _ = bands(sides, product_error(sides))
    for part, t in chunks_of(sides):
        _leave_out(sides, part, t, limit, band[part], exclude_own)
        found = _best_of_chunk(sides, part, t, k, band[part])
        for out, values in zip((scores, indices), found, strict=True):
            out[part, : values.shape[1]] = values
    return scores, indices


def _leave_out(
    sides: Sides, part: slice, t: Tensor, limit: float, band: Tensor, exclude_own: bool
) -> None:
    """Writes -inf to the products of the keys that are left out."""
    # Infinite products and NaN would hide keys, and -inf marks those that are left out.
    largest = torch.finfo(t.dtype).max
    t.nan_to_num_(0, largest, -largest)
    if limit < math.inf:
        near = (~((t - limit).abs() > 2 * band[:, None])).nonzero(as_tuple=True)
        above = pair_scores(sides, near[0] + part.start, near[1]) > limit
        of_near = t[near]
        t[t > limit] = -torch.inf
        t[near] = torch.where(above, -torch.inf, of_near)
    if sides.ids_x is not None:
        t[sides.ids_x[part, None] == sides.ids_y] = -torch.inf
    if exclude_own and part.start < len(sides.y):
        lines = torch.arange(part.start, min(part.stop, len(sides.y)), device=t.device)
        t[lines - part.start, lines] = -torch.inf


def _best_of_chunk(
    sides: Sides, part: slice, t: Tensor, k: int, band: Tensor
) -> tuple[Tensor, Tensor]:
    n = t.shape[1]
    chosen, wanted = min(k + SPARE, n), min(k, n)
    products, keys = t.topk(chosen, 1)
    scores, keys = _ordered(sides, part, products, keys)
    scores, keys = scores[:, :wanted], keys[:, :wanted]
    if chosen < n:
        # Keys that were not chosen score at most the least product and its error.
        least = products[:, -1].to(scores.dtype) + 2 * band  # infinite if products may overflow
        unsure = (products[:, -1] > -torch.inf) & ~(scores[:, -1] > least)
        for row in unsure.nonzero()[:, 0].tolist():
            one = slice(part.start + row, part.start + row + 1)
            all_keys = torch.arange(n, device=t.device)[None]
            of_row = _ordered(sides, one, t[row][None], all_keys)
            scores[row], keys[row] = (values[0, :wanted] for values in of_row)
    return scores, keys


def _ordered(sides: Sides, part: slice, products: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exact scores and keys in order; -inf and -1 where the product is -inf."""
    lines = torch.arange(part.start, part.stop, device=keys.device)
    scores = pair_scores(sides, lines[:, None].expand_as(keys).flatten(), keys.flatten())
    left_out = products == -torch.inf
    scores = scores.view(keys.shape).masked_fill(left_out, -torch.inf)
    keys, order = keys.masked_fill(left_out, len(sides.y)).sort(1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    keys = keys.gather(1, order)
    return scores, keys.masked_fill(keys == len(sides.y), -1)
