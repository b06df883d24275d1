"""Functions that call the operators on a block, and weights like those of a loss."""

from collections.abc import Callable
from typing import Any

import torch
from support.dense_block import DENSE_KINDS, Block, Weights, accumulator, random_tensor
from support.dense_truth import Dense
from support.masked_block import occupied
from torch import Tensor


def operator(name: str, engine: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops.fastclip, name), engine)


def levels_of(block: Block) -> Tensor | None:
    """Returns the levels that the truth takes, or None for a kind that has none."""
    kind = DENSE_KINDS.get(block.kind)
    return Dense(block).levels if kind is not None and kind.has_levels else None


def sweep(
    engine: str, block: Block, keep: int = 0, bound: Tensor | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    levels = levels_of(block) if levels is None else levels
    return operator("sweep", engine)(*block.arguments, bound, occupied(block), levels, keep)


def relative_to(levels: Tensor | None, state: Tensor) -> Tensor:
    """Returns the state that `weigh` takes: with levels in place of the numbers of pairs."""
    return state if levels is None else torch.cat([levels[None], state[1:]])


def make_weights(state: Tensor, m: int, gain: float = -0.7, seed: int = 1) -> Weights:
    """Returns coefficients that bring each line's weights to order 1, and weights of positives."""
    sums = state[: len(state) // 2 * 2][1::2]  # those of a teacher are the last
    coefficients = torch.exp2(random_tensor(*sums.shape, seed=seed) / 3) / torch.where(
        sums > 1e-30, sums, 1
    )
    coefficients = coefficients if len(sums) > 1 else coefficients[0]
    positive = -torch.sigmoid(random_tensor(m, seed=seed + 1))
    return Weights(coefficients, positive, torch.tensor(gain, dtype=torch.float64))


def weigh(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dy and (dbias, dscale); the arguments are those of `weigh_all`."""
    return weigh_all(*arguments, **options)[:3]


def weigh_all(
    engine: str,
    block: Block,
    state: Tensor,
    positive: Tensor,
    weights: Weights,
    kept: Tensor | None = None,
    needs: tuple[bool, bool] = (True, True),
    project: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the results of `weigh`, followed by the gradient of a key bias if there is one."""
    dtype = accumulator(block.x.dtype)
    kept = block.x.new_empty(0, dtype=dtype) if kept is None else kept
    state = relative_to(levels_of(block) if levels is None else levels, state)
    return operator("weigh", engine)(
        *block.arguments, state, positive, kept, weights.coefficients, weights.positive_weight,
        weights.gain, *needs, block.key_bias is not None, project, *(dtypes or (dtype, dtype)),
    )  # fmt: skip
