"""Results in bf16 are rounded to nearest, and ties to even, by every engine."""

import pytest
import torch
from support.block_operators import weigh
from support.dense_block import Block, Weights

pytestmark = pytest.mark.usefixtures("on_the_device")


def check_ties(engine: str) -> None:
    """One pair, whose gradients are the features themselves. They lie halfway between two
    neighbours in bf16, of which the even one is below or above."""
    x, y = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    one = torch.ones(())
    block = Block(torch.tensor([[x]]), torch.tensor([[y]]), None, None, one, None, 0, "softmax")
    state = torch.zeros(2, 2, dtype=torch.float64)
    positive = torch.tensor([x * y], dtype=torch.float64)
    weights = Weights(state[0], torch.ones(1, dtype=torch.float64), one)
    dtypes = (torch.bfloat16, torch.bfloat16)
    dx, dy, _ = weigh(engine, block, state, positive, weights, dtypes=dtypes)
    assert dx.item() == 1 + 4 * 2.0**-8 and dy.item() == 1.0


def test_gradients_in_bf16_are_rounded_to_nearest_even(engine: str) -> None:
    check_ties(engine)


def test_gradients_of_gpu_engines_are_rounded_to_nearest_even(gpu_engine: str) -> None:
    check_ties(gpu_engine)
