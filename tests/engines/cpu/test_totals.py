"""The C++ engine's sums over all pairs keep what a plain sum would round away."""

import torch
from support.block_cases import compiled_only
from support.block_operators import weigh
from support.dense_block import Block, Weights


@compiled_only
def test_small_terms_between_large_ones_are_not_lost() -> None:
    """Products 1e16, 1 and -1e16 lie in three strips of rows, and each weighs 1/2."""
    x = torch.zeros(192, 1, dtype=torch.float64)
    x[0], x[70], x[140] = 1e16, 1.0, -1e16
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    block = Block(x, torch.ones(1, 1).double(), None, None, zero, None, 1 << 40, "sigmoid")
    weights = Weights(torch.full((193,), 0.5).double(), torch.zeros(192).double(), one)
    positive = torch.full((192,), torch.nan, dtype=torch.float64)
    totals = weigh("cpu", block, torch.zeros(2, 193).double(), positive, weights)[2]
    assert totals.tolist() == [96.0, 0.5]
