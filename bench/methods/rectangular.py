"""CLIP's loss on a block with more columns than rows, on the low-level operators.

One rank of a distributed run holds such a block: its own rows against all ranks' columns. The loss
is that of `dense.dense_clip`: the mean over the M rows of half the row's and half its own column's
cross-entropy. No M x N matrix is built, and autograd is not used: the operators have no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import Inputs


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

    # Only rows and the first M columns have a positive; the other columns' coefficients are zero.
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
