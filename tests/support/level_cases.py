"""Checks of a kind with levels, for any engine: levels that are infinite, equal, or hit exactly."""

import torch
from support.block_operators import make_weights, sweep, weigh
from support.dense_block import LOG2E, Block, make_block
from support.dense_truth import Dense, assert_gradients, assert_states
from support.judge import assert_accurate, numbers
from support.masked_block import make_masked_block
from torch import Tensor


def check_levels(engine: str, block: Block, levels: Tensor, what: str = "") -> Tensor:
    """Checks both sweeps of a block with these levels against the truth; returns the state."""
    dense = Dense(block, levels)
    state, positive, kept = sweep(engine, block, levels=levels)
    assert_states(dense, state, positive, what)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
    results = weigh(engine, block, state, positive, weights, kept, levels=levels)
    assert_gradients(dense, exact, results, what=what, half_products=True)
    return state


def check_infinite_levels(engine: str, m: int, n: int) -> None:
    """No pair lies above infinity: its line's numbers are 0, and others do not change."""
    block = make_block(m, n, 8, kind="hinge", offset=3)
    levels = Dense(block).levels
    levels[[1, m + 2]] = torch.inf
    state = check_levels(engine, block, levels)
    assert not state[:, [1, m + 2]].any()


def check_equal_levels(engine: str, m: int, n: int) -> None:
    """One number for all lines, as a tensor that was expanded."""
    block = make_block(m, n, 8, torch.bfloat16, kind="hinge", factors=(True, True))
    s = Dense(block).s.flatten().sort().values * LOG2E
    near = slice(len(s) // 2, len(s) // 2 + 200)
    widest = int((s[near][1:] - s[near][:-1]).argmax()) + near.start
    level = (s[widest] + s[widest + 1]) / 2
    check_levels(engine, block, level.expand(m + n))


def check_pairs_at_the_level(engine: str, m: int, n: int) -> None:
    """They are not above it, and weigh nothing. Logits in log2 units are small integers."""
    x, y = torch.zeros(2, max(m, n), 4)
    x[:, 0], y[:, 0] = 1.0, torch.arange(max(m, n)) % 8
    scale = torch.tensor(1 / LOG2E, dtype=torch.float64)
    block = Block(x[:m], y[:n], None, None, scale, None, 1 << 40, "hinge")
    state = sweep(engine, block, levels=torch.full((m + n,), 5.0, dtype=torch.float64))[0]
    logits = y[:n, 0].double()
    above = (logits > 5).double()
    torch.testing.assert_close(state[0, :m], above.sum().expand(m), rtol=0, atol=0)
    torch.testing.assert_close(state[0, m:], above * m, rtol=0, atol=0)
    sums = torch.relu(logits - 5) / LOG2E
    torch.testing.assert_close(
        state[1], torch.cat([sums.sum().expand(m), sums * m]), rtol=1e-5, atol=0
    )


def check_a_nan(engine: str, m: int, n: int) -> None:
    """It spoils both numbers of its lines, and no others."""
    block = make_masked_block(m, n, 8, kind="hinge", ids=4)
    levels = Dense(block).levels
    block.x[3] = torch.nan
    state = sweep(engine, block, levels=levels)[0]
    hidden = (block.ids_y == block.ids_x[3]) | (torch.arange(n) == 3)
    for number in state:
        assert number[3].isnan() and number[:3].isfinite().all() and number[4:m].isfinite().all()
        assert torch.equal(number[m:].isnan(), ~hidden)


def check_accuracy(engine: str, m: int, n: int) -> None:
    """Logits and levels are large, and differ little: errors are those of dense PyTorch."""
    block = make_block(m, n, 64, kind="hinge", scale=100.0, bias=-7.0)
    dense = Dense(block)
    levels = torch.cat([dense.s.quantile(0.9, 1), dense.s.quantile(0.9, 0)]) * LOG2E
    dense = Dense(block, levels)
    state = sweep(engine, block, levels=levels)[0]
    s = block.scale.float() * (block.x @ block.y.T) + block.bias.float()
    row, column = (levels / LOG2E).float().split([m, n])
    above = [
        torch.relu(s - level).masked_fill(dense.is_positive, 0).sum(dim)
        for level, dim in ((row[:, None], 1), (column, 0))
    ]
    assert_accurate(state[1], torch.cat(above), numbers(dense.logarithms), 1e-7, "sums")


CHECKS = {
    "infinite levels": check_infinite_levels,
    "equal levels": check_equal_levels,
    "pairs at the level": check_pairs_at_the_level,
    "a NaN": check_a_nan,
    "accuracy": check_accuracy,
}
