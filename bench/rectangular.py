"""CLIP's loss on a block with more columns than rows, straight on the low-level operators.

Such blocks are what one process of a distributed run holds: its own rows against everybody's
columns. The loss here is the mean over the M rows of half the row's and half its own column's
cross-entropy, the one of `baselines.dense_clip`. This file never builds an M x N matrix, and takes
no gradient by autograd: the operators have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Inputs


@torch.no_grad()
def clip(engine: str, inputs: Inputs, budget: int) -> tuple[Tensor, ...]:
    """Loss, dx, dy, dscale for x (M, D), y (N, D), N >= M.

    `engine` is "cpu" or "torch"; it may keep `budget` bytes of products between the sweeps.
    """
    from fastclip.kept import rows_to_keep

    sweep, finish, weigh = (
        getattr(getattr(torch.ops.fastclip, name), engine) for name in ("sweep", "finish", "weigh")
    )
    x, y, scale = inputs.x.detach(), inputs.y.detach(), inputs.scale.detach()
    m, n = len(x), len(y)
    block = (x, y, None, None, scale, None)
    keep = rows_to_keep(m, n, 4, budget)
    state, t, kept = sweep(*block, None, 0, "softmax", keep)

    # Rows and the first M columns have a positive; the others have no loss, so no coefficient.
    own = state[:, : 2 * m].contiguous()
    losses, coefficients, weights = finish(own, t, scale, None, "softmax")
    coefficients = torch.cat((coefficients, coefficients.new_zeros(n - m)))
    weights = weights.view(2, m).sum(0)

    # Each of the M pairs counts half its row's loss and half its column's.
    share = torch.tensor(1 / (2 * m))
    dx, dy, dbias_dscale = weigh(
        *block, state, t, coefficients, weights, share, kept, 0, "softmax",
        True, True, False, x.dtype, y.dtype,
    )  # fmt: skip
    return losses.mean().float(), dx, dy, dbias_dscale[1]
