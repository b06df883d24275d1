"""Blocks with targets: a teacher that weighs the pairs, or a guide that leaves some out."""

from typing import Any

import torch
from support.dense_block import Block, make_block
from support.masked_block import make_masked_block


def with_teacher(block: Block, width: int = 11, scale: float = 20.0, **options: Any) -> Block:
    """Returns the block with a teacher whose positives stand out, too."""
    options = {"offset": block.offset, "seed": 41, **options}
    other = make_block(len(block.x), len(block.y), width, block.x.dtype, **options)
    return _with_features(block, other)._replace(
        target_scale=torch.tensor(scale, dtype=torch.float64)
    )


def with_guide(block: Block, width: int = 11, margin: float = -0.8, **options: Any) -> Block:
    """Returns the block with a guide, and thresholds `margin` above its own positives. By default a
    fifth of the pairs exceed them, but not by our own products, which are others."""
    options = {"offset": block.offset, "seed": 43, "margin": margin, **options}
    other = make_masked_block(len(block.x), len(block.y), width, block.x.dtype, **options)
    return _with_features(block, other)._replace(
        guided=True, threshold_x=other.threshold_x, threshold_y=other.threshold_y
    )


def _with_features(block: Block, other: Block) -> Block:
    return block._replace(
        target_x=other.x,
        target_y=other.y,
        target_factor_x=other.factor_x,
        target_factor_y=other.factor_y,
    )
