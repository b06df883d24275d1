"""Blocks for which one shift of all lines is enough, or by little is not, for any engine."""

import torch
from support.dense_block import Block, make_block

from fastclip.loss import clip_loss


def column_below(offset: int, along: float, across: float) -> Block:
    """Returns a block with one low column, 12: `along` is its component in the direction that all
    rows share, `across` its length in the others."""
    block = make_block(60, 66, 24, scale=100.0, offset=offset)
    block.x[:, 0] = 1
    block.y[:, 0] = 0
    block.y[12] *= across / block.y[12].norm()
    block.y[12, 0] = along
    return block


def lines_of_one_pair() -> list[Block]:
    """Returns a row and a column of pairs, each with a line whose only pair is its own positive.
    Its sum is 0, and no term was lost."""
    return [make_block(1, 40, 24, offset=5), make_block(40, 1, 24, offset=-5)]


def check_that_no_loss_is_invented(engine: str, n: int, scale: float, all_finite: bool) -> None:
    """Each pair's loss is right or not finite. A mean would be NaN, and hide wrong losses."""
    x, y = torch.randn(2, n, 6).unbind()
    options = {"normalize": True, "reduction": "none"}
    ours = clip_loss(x, y, scale, backend=engine, memory_budget=0, **options).double()
    exact = clip_loss(x.double(), y.double(), scale, backend="reference", **options)
    sound = ours.isfinite()
    assert bool(sound.all()) == all_finite
    # Rounded logits move a loss by this much.
    assert ((ours - exact).abs() <= 1e-6 * scale)[sound].all()
