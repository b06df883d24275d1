"""The operators are right on any block: M != N, any offset, any layout, factors on either side.

A loss in one process only needs square blocks with the positives on the diagonal; block rows, ring
steps and local losses need all other blocks. The truth is a dense float64 computation.
"""

import pytest
import torch
from support.block_cases import (
    FACTORS,
    LARGE,
    SHAPES,
    SMALL,
    blocks,
    everywhere,
    for_every_kind,
    in_every_dtype,
)
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DENSE_KINDS, DTYPES, Block, accumulator, make_block
from support.dense_truth import Dense, assert_gradients, assert_states

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")


@everywhere
@in_every_dtype
@for_every_kind
def test_any_block(engine: str, kind: str, dtype: str, shape: str) -> None:
    """Without factors, all results are right; positives outside the block are NaN."""
    if shape in LARGE and engine != "cpu":
        pytest.skip("tiles are the C++ engine's")
    for what, block in blocks(shape, dtype, kind):
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        assert_states(dense, state, positive, what)
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        assert_gradients(dense, exact, weigh(engine, block, state, positive, weights), what=what)


@pytest.mark.parametrize("shape", SMALL)
@in_every_dtype
@for_every_kind
def test_factors_on_either_tower(engine: str, kind: str, dtype: str, shape: str) -> None:
    """Factors normalise the features; the gradient is projected only on request."""
    for factors in FACTORS:
        for what, block in blocks(shape, dtype, kind, few=True, factors=factors):
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            assert_states(dense, state, positive, f"{what}, {factors}")
            weights = make_weights(state, dense.m)
            w = dense.activations(state, weights.coefficients)
            for project in (False, True):
                results = weigh(engine, block, state, positive, weights, project=project)
                exact = dense.gradients(w, weights, project)
                assert_gradients(dense, exact, results, what=f"{what}, {factors}, {project=}")


@pytest.mark.parametrize("out", DTYPES)
def test_features_shorter_than_epsilon_are_not_projected(engine: str, out: str) -> None:
    """Their norm is clamped to epsilon. In fp16 their gradient of 1e12 is 0, not infinite."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], kind="sigmoid", factors=(True, True))
        block.x[0] = 0
        for row in (block.x[7], block.y[3]):
            row *= 1e-13 / row.norm()
        block.factor_x[[0, 7]], block.factor_y[3] = 1e12, 1e12
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        weights = make_weights(state, dense.m, gain=1e-12)  # else 1e12 would hide the other rows
        w = dense.activations(state, weights.coefficients)
        dtypes = (DTYPES[out], DTYPES[out])
        dx, dy, totals = weigh(engine, block, state, positive, weights, project=True, dtypes=dtypes)
        exact = dense.gradients(w, weights, project=True)
        if out == "float16":
            assert not dx[[0, 7]].any() and not dy[3].any()
        else:
            assert_gradients(dense, exact, (dx, dy, totals), what=shape)


@pytest.mark.parametrize("needs", [(x, y) for x in (False, True) for y in (False, True)])
@for_every_kind
def test_only_requested_gradients_are_returned(
    engine: str, kind: str, needs: tuple[bool, bool]
) -> None:
    """A gradient that is not requested has no rows; totals are always returned."""
    for shape in SMALL:
        for what, block in blocks(shape, "float32", kind, few=True, factors=(True, False)):
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            weights = make_weights(state, dense.m)
            exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
            results = weigh(engine, block, state, positive, weights, needs=needs)
            assert_gradients(dense, exact, results, needs, f"{shape}, {what}")
            if DENSE_KINDS[kind].is_linear:
                check_in_one_go(engine, block, needs, project=False, what=what)


def check_in_one_go(
    engine: str, block: Block, needs: tuple[bool, bool], project: bool, what: str
) -> None:
    dense = Dense(block)
    gain = torch.tensor(0.3, dtype=torch.float64)
    state, positive, *gradients = operator("sweep_and_weigh", engine)(
        *block.arguments, gain, *needs, project
    )
    assert_states(dense, state, positive, what)
    weight = -torch.sigmoid(-(dense.scale * dense.positive + dense.bias)).nan_to_num(0)
    halves = torch.full((dense.m + dense.n,), 0.5, dtype=torch.float64)
    weights = make_weights(state, dense.m)
    weights = type(weights)(halves, weight, gain)
    exact = dense.gradients(dense.activations(state, halves), weights, project)
    dtype = accumulator(block.x.dtype)
    assert gradients[0].dtype == gradients[1].dtype == dtype
    assert_gradients(dense, exact, tuple(gradients), needs, what)


@everywhere
@in_every_dtype
def test_sweep_and_weigh(engine: str, dtype: str, shape: str) -> None:
    if shape in LARGE and engine != "cpu":
        pytest.skip("tiles are the C++ engine's")
    for factors in FACTORS if shape in SMALL else FACTORS[:1]:
        for what, block in blocks(shape, dtype, "sigmoid", few=shape in SMALL, factors=factors):
            check_in_one_go(engine, block, (True, True), True, f"{what}, {factors}")


def test_sweep_and_weigh_refuses_a_kind_that_needs_its_state(engine: str) -> None:
    block = make_block(5, 9, 4, kind="softmax")
    gain = torch.ones((), dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"need (no|its) state"):
        operator("sweep_and_weigh", engine)(*block.arguments, gain, True, True, False)


@pytest.mark.parametrize("bias", [None, 0.0, -10.0, 25.0])
@for_every_kind
def test_bias(engine: str, kind: str, bias: float | None) -> None:
    """None means zero; softmax ignores the bias, because it cancels."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], kind=kind, bias=bias)
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        assert_states(dense, state, positive, shape)
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        assert_gradients(dense, exact, weigh(engine, block, state, positive, weights))


@pytest.mark.parametrize("gain", [0.0, -1.0, 1e-6, 1e6])
def test_gain_multiplies_every_result(engine: str, gain: float) -> None:
    for shape in SMALL:
        block = make_block(*SHAPES[shape])
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        weights = make_weights(state, dense.m, gain=gain)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        assert_gradients(dense, exact, weigh(engine, block, state, positive, weights))


@pytest.mark.parametrize("dtype_x", DTYPES)
@pytest.mark.parametrize("dtype_y", DTYPES)
def test_gradients_in_any_dtype(engine: str, dtype_x: str, dtype_y: str) -> None:
    dtypes = (DTYPES[dtype_x], DTYPES[dtype_y])
    for shape in SMALL:
        for dtype in DTYPES:
            block = make_block(*SHAPES[shape], DTYPES[dtype], factors=(True, False))
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            weights = make_weights(state, dense.m)
            exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
            results = weigh(engine, block, state, positive, weights, project=True, dtypes=dtypes)
            assert (results[0].dtype, results[1].dtype) == dtypes
            assert_gradients(dense, exact, results, what=f"{shape}, {dtype}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_strides(engine: str, dtype: str) -> None:
    """Layouts: rows of a wider tensor, a transpose, every second row, one expanded row."""
    m, n, d = 70, 45, 18
    block = make_block(m, n, d, DTYPES[dtype], kind="softmax")
    padded = torch.full((m, 3 * d), torch.nan, dtype=DTYPES[dtype])
    padded[:, d : 2 * d] = block.x
    every_other = torch.full((m, 2 * d), torch.nan, dtype=DTYPES[dtype])
    every_other[:, ::2] = block.x
    for x in (padded[:, d : 2 * d], block.x.T.contiguous().T, every_other[:, ::2]):
        assert not x.is_contiguous()
        check_strides(engine, block._replace(x=x))
        check_strides(engine, block._replace(x=block.y, y=x))
    check_strides(engine, block._replace(x=block.x[:1].expand(m, d)))


def check_strides(engine: str, block: Block) -> None:
    dense = Dense(block)
    state, positive, _ = sweep(engine, block)
    assert_states(dense, state, positive)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
    assert_gradients(dense, exact, weigh(engine, block, state, positive, weights))
