"""The operators are right on any block: M != N, any offset, factors on any side, parts of it kept.

A loss on one process only ever asks for a square with its positives on the diagonal; block rows,
ring steps and local losses ask for everything else. The truth is a dense float64 computation.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from dense_block import (
    DTYPES,
    LOG2E,
    LOSSES,
    Block,
    Dense,
    accumulator,
    assert_gradients,
    assert_states,
    logarithms,
    make_block,
    make_weights,
    operator,
    sweep,
    weigh,
)
from torch import Tensor

import fastclip
from fastclip import chunked
from fastclip.ops import rows_to_keep

compiled_only = pytest.mark.skipif(
    DEVICE.type != "cpu" or fastclip.backends()["cpu"] != "available",
    reason="only the C++ engine keeps products, and it was not built or the device is another",
)

# The longer tower supplies the C++ engine's rows: M < N makes it change the towers' places. Columns
# beyond 1023 make its tiles larger, D beyond 128 splits its products.
SHAPES = {
    "tall": (150, 37, 24),
    "wide": (37, 150, 24),
    "column": (40, 1, 7),
    "row": (1, 40, 7),
    "long features": (70, 130, 131),
    "large tiles": (1100, 1030, 8),
    "large tiles, wide": (1030, 1100, 8),
}
SMALL = ("tall", "wide")
LARGE = ("large tiles", "large tiles, wide")
FACTORS = ((False, False), (True, False), (False, True), (True, True))


@pytest.fixture(autouse=True)
def on_the_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain PyTorch engine cuts these blocks, too, several times."""
    monkeypatch.setattr(chunked, "CHUNK", 1 << 10)


def offsets(m: int, n: int) -> dict[str, int]:
    return {
        "on the diagonal": 0,
        "to the right": 5,
        "to the left": -5,
        "partly beyond the last column": n - 1 - m // 4,
        "partly before the first column": 1 + n // 4 - m,
        "all beyond the last column": n,
        "all before the first column": -m,
        "far away": -(1 << 40),
    }


FEW = ("to the left", "partly beyond the last column", "all before the first column")


def blocks(
    shape: str, dtype: str, loss: str, few: bool = False, **options: object
) -> Iterator[tuple[str, Block]]:
    m, n, d = SHAPES[shape]
    for name, offset in offsets(m, n).items():
        if name in FEW or not (few or shape in LARGE):
            block = make_block(m, n, d, DTYPES[dtype], loss=loss, offset=offset, **options)
            yield f"positives {name}", block


everywhere = pytest.mark.parametrize("shape", SHAPES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
for_every_loss = pytest.mark.parametrize("loss", LOSSES)


@everywhere
@in_every_dtype
@for_every_loss
def test_any_block(engine: str, loss: str, dtype: str, shape: str) -> None:
    """States, positives (NaN where they lie elsewhere), gradients and totals, without factors."""
    if shape in LARGE and engine != "cpu":
        pytest.skip("tiles are the C++ engine's")
    for what, block in blocks(shape, dtype, loss):
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        assert_states(dense, state, positive, what)
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        assert_gradients(dense, exact, weigh(engine, block, state, positive, weights), what=what)


@pytest.mark.parametrize("shape", SMALL)
@in_every_dtype
@for_every_loss
def test_factors_on_either_tower(engine: str, loss: str, dtype: str, shape: str) -> None:
    """The features count as normalised, their gradient is projected only where that is asked."""
    for factors in FACTORS:
        for what, block in blocks(shape, dtype, loss, few=True, factors=factors):
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
    """Their norm was clamped. In fp16 their gradient of 1e12 is 0 instead of infinite."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], loss="sigmoid", factors=(True, True))
        block.x[0] = 0
        for row in (block.x[7], block.y[3]):
            row *= 1e-13 / row.norm()
        block.factor_x[[0, 7]], block.factor_y[3] = 1e12, 1e12
        dense = Dense(block)
        state, positive, _ = sweep(engine, block)
        weights = make_weights(state, dense.m, gain=1e-12)  # else 1e12 drowns the other rows
        w = dense.activations(state, weights.coefficients)
        dtypes = (DTYPES[out], DTYPES[out])
        dx, dy, totals = weigh(engine, block, state, positive, weights, project=True, dtypes=dtypes)
        exact = dense.gradients(w, weights, project=True)
        if out == "float16":
            assert not dx[[0, 7]].any() and not dy[3].any()
        else:
            assert_gradients(dense, exact, (dx, dy, totals), what=shape)


@pytest.mark.parametrize("needs", [(x, y) for x in (False, True) for y in (False, True)])
@for_every_loss
def test_only_what_is_needed(engine: str, loss: str, needs: tuple[bool, bool]) -> None:
    """A gradient that nobody wants has no rows; totals come in any case."""
    for shape in SMALL:
        for what, block in blocks(shape, "float32", loss, few=True, factors=(True, False)):
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            weights = make_weights(state, dense.m)
            exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
            results = weigh(engine, block, state, positive, weights, needs=needs)
            assert_gradients(dense, exact, results, needs, f"{shape}, {what}")
            if loss == "sigmoid":
                check_in_one_go(engine, block, needs, project=False, what=what)


def check_in_one_go(
    engine: str, block: Block, needs: tuple[bool, bool], project: bool, what: str
) -> None:
    dense = Dense(block)
    gain = torch.tensor(0.3, dtype=torch.float64)
    state, positive, *gradients = operator("sweep_and_weigh", engine)(
        *block.tensors, gain, block.offset, block.loss, *needs, project
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
def test_both_sweeps_in_one_go(engine: str, dtype: str, shape: str) -> None:
    if shape in LARGE and engine != "cpu":
        pytest.skip("tiles are the C++ engine's")
    for factors in FACTORS if shape in SMALL else FACTORS[:1]:
        for what, block in blocks(shape, dtype, "sigmoid", few=shape in SMALL, factors=factors):
            check_in_one_go(engine, block, (True, True), True, f"{what}, {factors}")


def test_a_loss_that_needs_its_state_is_not_weighed_in_one_go(engine: str) -> None:
    block = make_block(5, 9, 4, loss="softmax")
    gain = torch.ones((), dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"need (no|its) state"):
        operator("sweep_and_weigh", engine)(*block.tensors, gain, 0, "softmax", True, True, False)


@pytest.mark.parametrize("bias", [None, 0.0, -10.0, 25.0])
@for_every_loss
def test_bias(engine: str, loss: str, bias: float | None) -> None:
    """None is zero; softmax drops it, since it cancels."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], loss=loss, bias=bias)
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


# ---- products kept for the second sweep ----------------------------------------------------------


@compiled_only
@everywhere
@in_every_dtype
@for_every_loss
def test_kept_products_change_nothing(loss: str, dtype: str, shape: str) -> None:
    """No row, some rows, all rows, more room than rows."""
    block = make_block(*SHAPES[shape], DTYPES[dtype], loss=loss, offset=-3, factors=(True, True))
    dense = Dense(block)
    long, short = max(dense.m, dense.n), min(dense.m, dense.n)
    itemsize = accumulator(block.x.dtype).itemsize
    budgets = (0, 16 * short * itemsize, long // 2 * short * itemsize, 1 << 40)
    sizes = set()
    for budget in budgets:
        keep = rows_to_keep(dense.m, dense.n, itemsize, budget)
        state, positive, kept = sweep("cpu", block, keep)
        assert kept.shape == (keep * short,) and kept.nbytes <= budget
        sizes.add(kept.numel())
        assert_states(dense, state, positive, f"{keep} rows")
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        for _ in range(2):  # reading what was kept leaves it as it was
            results = weigh("cpu", block, state, positive, weights, kept)
            assert_gradients(dense, exact, results, what=f"{keep} rows")
    assert len(sizes) > 2


@compiled_only
@for_every_loss
def test_any_number_of_kept_rows(loss: str) -> None:
    """Whole registers of rows are kept; what does not fill one is made again."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], loss=loss)
        dense = Dense(block)
        for keep in (1, 15, 17, 64, 65, 149, 150, 151, 160):
            state, positive, kept = sweep("cpu", block, keep)
            assert_states(dense, state, positive, f"{keep} rows")
            weights = make_weights(state, dense.m)
            exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
            results = weigh("cpu", block, state, positive, weights, kept)
            assert_gradients(dense, exact, results, what=f"{keep} rows")


@compiled_only
@for_every_loss
def test_kept_products_are_what_the_second_sweep_reads(loss: str) -> None:
    for shape in SMALL:
        block = make_block(*SHAPES[shape], loss=loss)
        m, n, _ = SHAPES[shape]
        state, positive, kept = sweep("cpu", block, rows_to_keep(m, n, 4, 1 << 40))
        weights = make_weights(state, m)
        before = weigh("cpu", block, state, positive, weights, kept)
        kept.zero_()
        after = weigh("cpu", block, state, positive, weights, kept)
        for one, other in zip(before, after, strict=True):
            assert not torch.allclose(one, other)


@pytest.mark.parametrize("m, n", [(1, 1), (15, 16), (17, 5), (5, 17), (1000, 64), (64, 1000)])
def test_rows_to_keep_fit_the_budget(m: int, n: int) -> None:
    long, short = max(m, n), min(m, n)
    everything = -(-long // 16) * 16
    for itemsize in (4, 8):
        for rows in (0, 1, 15, 16, 17, 32, everything - 1, everything, everything + 100):
            keep = rows_to_keep(m, n, itemsize, rows * short * itemsize)
            assert keep == min(rows // 16 * 16, everything)


def test_the_plain_engine_keeps_nothing() -> None:
    with pytest.raises(ValueError, match=r"keep must be 0.*got 16"):
        sweep("torch", make_block(20, 20, 4), keep=16)


# ---- parts of a block ----------------------------------------------------------------------------


def merged(states: list[Tensor], loss: str) -> Tensor:
    """One number a line, from `sum * 2^reference`."""
    parts = torch.stack([logarithms(state, loss) for state in states])
    if loss == "sigmoid":
        return parts.sum(0)
    return torch.logsumexp(parts / LOG2E, 0) * LOG2E


@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("split", ["columns", "rows"])
@in_every_dtype
@for_every_loss
def test_parts_make_the_whole(engine: str, loss: str, dtype: str, split: str, scale: float) -> None:
    """States of two parts merge to the block's, and gradients add up to the block's."""
    m, n, d = 83, 59, 12
    for offset in (0, 20, -50, 500):
        whole = make_block(m, n, d, DTYPES[dtype], loss=loss, offset=offset, scale=scale)
        dense = Dense(whole)
        cut = 33
        if split == "columns":
            parts = [
                (whole._replace(y=whole.y[:cut]), slice(0, m), slice(0, cut)),
                (whole._replace(y=whole.y[cut:], offset=offset - cut), slice(0, m), slice(cut, n)),
            ]
        else:
            parts = [
                (whole._replace(x=whole.x[:cut]), slice(0, cut), slice(0, n)),
                (whole._replace(x=whole.x[cut:], offset=offset + cut), slice(cut, m), slice(0, n)),
            ]
        swept = [sweep(engine, block) for block, _, _ in parts]
        (first, _, _), (second, _, _) = swept
        one, other = first.split([len(parts[0][0].x), len(parts[0][0].y)], 1)
        two, another = second.split([len(parts[1][0].x), len(parts[1][0].y)], 1)
        if split == "columns":
            rows = merged([one, two], loss)
            columns = torch.cat([logarithms(other, loss), logarithms(another, loss)])
        else:
            rows = torch.cat([logarithms(one, loss), logarithms(two, loss)])
            columns = merged([other, another], loss)
        difference = torch.cat([rows, columns]) - dense.logarithms
        if loss == "sigmoid":
            difference = difference / dense.logarithms.clamp_min(1e-30)
        assert (difference.abs() <= 2 * dense.arithmetic).all()

        state, positive, _ = sweep(engine, whole)
        weights = make_weights(state, m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        dx, dy = torch.zeros_like(exact.dx), torch.zeros_like(exact.dy)
        totals = torch.zeros(2, dtype=torch.float64)
        for block, rows, columns in parts:
            lines = torch.cat([torch.arange(m)[rows], m + torch.arange(n)[columns]])
            part = type(weights)(
                weights.coefficients[lines], weights.positive_weight[rows], weights.gain
            )
            gradients = weigh(engine, block, state[:, lines].contiguous(), positive[rows], part)
            dx[rows] += gradients[0]
            dy[columns] += gradients[1]
            totals += gradients[2]
        assert_gradients(dense, exact, (dx, dy, totals), what=f"{offset=}")


# ---- finished lines ------------------------------------------------------------------------------


@in_every_dtype
@for_every_loss
def test_finish(engine: str, loss: str, dtype: str) -> None:
    """Rows and columns of a rectangular block that have their positive in it."""
    for shape in SMALL:
        for what, block in blocks(shape, dtype, loss):
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            here = dense.is_positive.nonzero()
            if not len(here):
                continue
            rows, columns = here.unbind(1)
            lines = torch.cat([rows, dense.m + columns])
            # One positive for both of its lines.
            losses, coefficients, weights = operator("finish", engine)(
                state[:, lines].contiguous(), positive[rows], block.scale, block.bias, loss
            )
            s = (dense.scale * dense.positive[rows] + dense.bias).repeat(2)
            if loss == "sigmoid":
                exact = dense.logarithms[lines] + F.softplus(-s, threshold=60)
                expected, weight = torch.ones_like(s), -torch.sigmoid(-s)
                found = coefficients
            else:
                negatives = dense.logarithms[lines] / LOG2E
                exact = F.softplus(negatives - s, threshold=60)
                total = torch.logaddexp(negatives, s) * LOG2E
                # coefficients are relative to the references: a * 2^-reference = 1 / (R + P)
                found, expected = torch.log2(coefficients) - state[0, lines], -total
                weight = -torch.sigmoid(negatives - s)
            tolerance = {"rtol": 2 * dense.arithmetic, "atol": 1e-12}
            torch.testing.assert_close(losses, exact, **tolerance, msg=what)
            torch.testing.assert_close(found, expected, atol=2 * dense.arithmetic, rtol=1e-12)
            torch.testing.assert_close(weights, weight, **tolerance)


@for_every_loss
def test_a_line_without_its_positive_leaves_the_others_alone(engine: str, loss: str) -> None:
    block = make_block(20, 9, 6, loss=loss)
    state, positive, _ = sweep(engine, block)
    arguments = (block.scale, block.bias, loss)
    finish = operator("finish", engine)
    alone = finish(state[:, :9].contiguous(), positive[:9], *arguments)
    together = finish(state[:, :20].contiguous(), positive, *arguments)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other[:9], rtol=1e-14, atol=0)
    assert together[0][9:].isnan().all()


# ---- memory layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_strides(engine: str, dtype: str) -> None:
    """Rows of a wider tensor, transposed, every second one, one row expanded."""
    m, n, d = 70, 45, 18
    block = make_block(m, n, d, DTYPES[dtype], loss="softmax")
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
