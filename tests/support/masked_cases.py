"""Blocks in which not every pair counts, and a check of an engine's operators on them."""

from collections.abc import Iterator
from typing import Any

import torch
from support.block_operators import make_weights, sweep, weigh_all
from support.dense_block import Block, Weights
from support.dense_truth import Dense, assert_gradients, assert_states
from support.masked_block import make_masked_block

# The options of a block: each alone, some together, and all together.
OPTIONS: dict[str, dict[str, Any]] = {
    "ids": {"ids": 5},
    "one id": {"ids": 1},
    "positives by id": {"ids": 9, "same_id_positive": True},
    "no margin": {"margin": 0.0},
    "margin": {"margin": -0.3},
    "key bias": {"key_bias": 4.0},
    "ids, margin, key bias": {"ids": 9, "margin": -0.2, "key_bias": 2.0},
    "everything": {"ids": 9, "margin": -0.2, "key_bias": 2.0, "same_id_positive": True},
}
OFFSETS = {"on the diagonal": 0, "aside": -7, "none": 1 << 40}


# The options of the block that `low_positive_by_id` changes.
LOW_POSITIVE: dict[str, Any] = {**OPTIONS["positives by id"], "offset": 1 << 40}


def low_positive_by_id(block: Block) -> Block:
    """Returns the block with one positive by id, which is far below all other pairs."""
    block.ids_x[:], block.ids_y[:] = 0, 1
    block.ids_x[3] = block.ids_y[5] = 2
    block.x[3] = -block.y[5] * (1 - 1e-3)
    return block


def masked_blocks(
    shape: tuple[int, int, int], dtype: torch.dtype, options: str, **others: Any
) -> Iterator[tuple[str, Block]]:
    """Yields a name and a masked block for each place of the positives."""
    for name, offset in OFFSETS.items():
        block = make_masked_block(*shape, dtype, offset=offset, **OPTIONS[options], **others)
        yield f"positives {name}", block


def check_masked(
    engine: str, block: Block, what: str, keep: int = 0, project: bool = False, **options: Any
) -> None:
    """Checks states and gradients against the dense truth. A column whose bias is -inf must have
    the sum 0; its shift is not compared."""
    dense = Dense(block)
    state, positive, kept = sweep(engine, block, keep)
    assert_states(dense, state, positive, what)
    weights: Weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, project)
    results = weigh_all(engine, block, state, positive, weights, kept, project=project, **options)
    assert_gradients(dense, exact, results, what=what)
