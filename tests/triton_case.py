"""What every test of the interpreted Triton engine asks for: a block checked through both sweeps.

The interpreter takes milliseconds for a tile, so blocks are small and tiles smaller (32 x 32).
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from dense_block import (
    Block,
    Dense,
    Weights,
    assert_gradients,
    assert_states,
    make_weights,
    operator,
    sweep,
    weigh,
)
from torch import Tensor

import fastclip

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_engine = pytest.mark.skipif(
    fastclip.backends()["triton"] != "available",
    reason=f"the Triton engine cannot run: {fastclip.backends()['triton']}",
)


def check(
    block: Block,
    keep: int = 0,
    bound: Tensor | None = None,
    projects: tuple[bool, ...] = (True,),
    needs: tuple[bool, bool] = (True, True),
    what: str = "",
) -> Tensor:
    """The state of a block, after both sweeps agreed with the truth."""
    dense = Dense(block)
    state, positive, kept = sweep("triton", block, keep, bound)
    assert_states(dense, state, positive, what)
    weights = make_weights(state, dense.m)
    w = dense.activations(state, weights.coefficients)
    for project in projects:
        results = weigh("triton", block, state, positive, weights, kept, needs, project)
        exact = dense.gradients(w, weights, project)
        assert_gradients(dense, exact, results, needs, what, half_products=True)
    return state


def check_in_one_go(
    block: Block, needs: tuple[bool, bool] = (True, True), project: bool = True, what: str = ""
) -> None:
    dense = Dense(block)
    gain = torch.tensor(0.3, dtype=torch.float64)
    state, positive, *results = operator("sweep_and_weigh", "triton")(
        *block.tensors, gain, block.offset, block.loss, *needs, project
    )
    assert_states(dense, state, positive, what)
    s = dense.scale * dense.positive + dense.bias
    halves = torch.full((dense.m + dense.n,), 0.5, dtype=torch.float64)
    weights = Weights(halves, -torch.sigmoid(-s).nan_to_num(0), gain)
    exact = dense.gradients(dense.activations(state, halves), weights, project)
    assert results[0].dtype == results[1].dtype == torch.float32
    assert_gradients(dense, exact, tuple(results), needs, what, half_products=True)


@contextmanager
def small_chunks(patch: pytest.MonkeyPatch, rows: int = 1, columns: int = 32) -> Iterator[None]:
    """Every block in several chunks, of rows and of columns."""
    from fastclip.triton_kernels import plan

    with patch.context() as context:
        context.setattr(plan, "PARTIAL_BYTES", 1)
        context.setattr(plan, "WEIGHT_BYTES", 1)
        context.setattr(plan, "ROW_UNIT", rows)
        context.setattr(plan, "WEIGHT_COLUMNS", columns)
        yield


def cover(intervals: list[tuple[int, int]], end: int) -> bool:
    """Whether they follow one another from 0 to the end."""
    intervals = sorted(set(intervals))
    joined = all(one[1] == other[0] for one, other in pairwise(intervals))
    return intervals[0][0] == 0 and intervals[-1][1] == end and joined
