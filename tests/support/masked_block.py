"""Blocks with masked pairs, and the lines of a block that have any pairs."""

from typing import Any

import torch
from support.dense_block import DENSE_KINDS, Block, accumulator, make_block, random_tensor
from support.dense_truth import Dense
from torch import Tensor


def make_masked_block(
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    ids: int | None = None,
    margin: float | None = None,
    key_bias: float | None = None,
    same_id_positive: bool = False,
    **options: Any,
) -> Block:
    """Returns a block with `ids` different ids and thresholds `margin` above own positives.

    `key_bias` is the size of the columns' biases, one of which is -inf. A kind with levels has no
    positives by id: pairs with equal ids are then left out.
    """
    block = make_block(m, n, d, dtype, **options)
    seed, extra = options.get("seed", 0), {}
    if ids is not None:
        names = [(random_tensor(k, seed=seed + 7 * k).abs() * 1e4).int() % ids for k in (m, n)]
        same_id_positive = same_id_positive and not DENSE_KINDS[block.kind].has_levels
        extra |= {"ids_x": names[0], "ids_y": names[1], "same_id_positive": same_id_positive}
    if margin is not None:
        dense = Dense(block)
        t = dense.positive + margin
        partner = torch.arange(m) + block.offset
        inside = (partner >= 0) & (partner < n)
        of_columns = torch.full((n,), torch.inf, dtype=torch.float64)
        of_columns[partner[inside]] = t[inside]
        thresholds = (_between(t.nan_to_num(torch.inf), dense.t), _between(of_columns, dense.t.T))
        wide = accumulator(dtype)
        extra |= {"threshold_x": thresholds[0].to(wide), "threshold_y": thresholds[1].to(wide)}
    if key_bias is not None:
        extra["key_bias"] = key_bias * random_tensor(n, seed=seed + 3)
        if DENSE_KINDS[block.kind].has_shift or not same_id_positive:  # else softplus(-s) = inf
            extra["key_bias"][n // 2] = -torch.inf
    return block._replace(**extra)


def _between(thresholds: Tensor, t: Tensor) -> Tensor:
    """Returns each threshold moved halfway between its neighbours among its line's products.

    Rounding then cannot decide which pairs exceed it.
    """
    above = torch.where(t > thresholds[:, None], t, torch.inf).amin(1)
    below = torch.where(t > thresholds[:, None], -torch.inf, t).amax(1)
    middle = (above + below) / 2
    return torch.where(middle.isfinite(), middle, torch.where(above.isinf(), torch.inf, -torch.inf))


def occupied(block: Block) -> Tensor | None:
    """Returns the lines that have any pairs, thresholds aside; None if the engine knows them."""
    if block.ids_x is None and block.key_bias is None:
        return None
    dense = Dense(block._replace(threshold_x=None, threshold_y=None))
    exists = torch.ones(dense.m, dense.n, dtype=torch.bool)
    if block.key_bias is not None:
        exists = exists & (block.key_bias > -torch.inf)
    sets = [dense.by_row, dense.is_same] if block.same_id_positive else [dense.by_row]
    return torch.stack(
        [torch.cat([(pairs & exists).any(1), (pairs & exists).any(0)]) for pairs in sets]
    )
