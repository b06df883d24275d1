"""CLIP's loss on a block with more columns than rows, straight on the low-level operators.

Such blocks are what one process of a distributed run holds: its own rows against everybody's
columns. The loss here is the mean over the M rows of half the row's and half its own column's
cross-entropy, the one of `baselines.dense_clip`. This file never builds an M x N matrix, and takes
no gradient by autograd: the operators have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Inputs


@torch.no_grad()
def clip(engine: str, inputs: Inputs, budget: int) -> tuple[Tensor, ...]:
    """Loss, dx, dy, dscale for x (M, D), y (N, D), N >= M.

    `engine` is "cpu" or "torch"; it may keep `budget` bytes of products between the sweeps.
    """
    from fastclip.engine import operators
    from fastclip.engine.block import Block, Side, Upstream, Wanted
    from fastclip.engine.kept import KEPT_BY

    x, y, scale = inputs.x.detach(), inputs.y.detach(), inputs.scale.detach()
    m, n = len(x), len(y)
    block = Block(Side(x), Side(y), scale, kind="softmax")
    found = operators.sweep(engine, block, keep=KEPT_BY[engine].keep(block, budget))

    # Rows and the first M columns have a positive; the others have no loss, so no coefficient.
    own = found.state[:, : 2 * m].contiguous()
    losses, coefficients, weights = operators.finish(
        engine, own, found.positive, scale, None, block.kind
    )
    coefficients = torch.cat((coefficients, coefficients.new_zeros(n - m)))
    # Each of the M pairs counts half its row's loss and half its column's.
    share = coefficients.new_tensor(1 / (2 * m))
    upstream = Upstream(coefficients, weights.view(2, m).sum(0), share)
    wanted = Wanted(True, True, False, False, x.dtype, y.dtype)
    gradients = operators.weigh(engine, block, found, upstream, wanted)
    return losses.mean().float(), gradients.x, gradients.y, gradients.bias_scale[1]
