"""A block may be swept in parts: states merge, gradients add up, lines are finished separately.

Distributed losses rely on this, because they receive a block piece by piece.
"""

import pytest
import torch
import torch.nn.functional as F
from support.block_cases import SMALL, blocks, for_every_kind, in_every_dtype
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DENSE_KINDS, DTYPES, FINISHED, LOG2E, make_block
from support.dense_truth import Dense, assert_gradients, logarithms
from torch import Tensor

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")
for_every_finished_kind = pytest.mark.parametrize("kind", FINISHED)


def merged(states: list[Tensor], kind: str) -> Tensor:
    """Returns one number a line: the states of parts, added in the units of `logarithms`."""
    parts = torch.stack([logarithms(state, kind) for state in states])
    if not DENSE_KINDS[kind].has_shift:
        return parts.sum(0)
    return torch.logsumexp(parts / LOG2E, 0) * LOG2E


@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("split", ["columns", "rows"])
@in_every_dtype
@for_every_kind
def test_parts_add_up_to_the_block(
    engine: str, kind: str, dtype: str, split: str, scale: float
) -> None:
    """The states of two parts merge to those of the block, and their gradients add up."""
    m, n, d = 83, 59, 12
    for offset in (0, 20, -50, 500):
        whole = make_block(m, n, d, DTYPES[dtype], kind=kind, offset=offset, scale=scale)
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
        lines = [
            torch.cat([torch.arange(m)[rows], m + torch.arange(n)[columns]])
            for _, rows, columns in parts
        ]
        levels = [None if dense.levels is None else dense.levels[index] for index in lines]
        swept = [
            sweep(engine, block, levels=given)
            for (block, _, _), given in zip(parts, levels, strict=True)
        ]
        (first, _, _), (second, _, _) = swept
        one, other = first.split([len(parts[0][0].x), len(parts[0][0].y)], 1)
        two, another = second.split([len(parts[1][0].x), len(parts[1][0].y)], 1)
        if split == "columns":
            rows = merged([one, two], kind)
            columns = torch.cat([logarithms(other, kind), logarithms(another, kind)])
        else:
            rows = torch.cat([logarithms(one, kind), logarithms(two, kind)])
            columns = merged([other, another], kind)
        difference = torch.cat([rows, columns]) - dense.logarithms
        if not DENSE_KINDS[kind].has_shift:
            size = dense.logarithms + (dense.above if dense.kind.has_levels else 0)
            difference = difference / size.clamp_min(1e-30)
        assert (difference.abs() <= 2 * dense.arithmetic).all()

        state, positive, _ = sweep(engine, whole)
        weights = make_weights(state, m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        dx, dy = torch.zeros_like(exact.dx), torch.zeros_like(exact.dy)
        totals = torch.zeros(2, dtype=torch.float64)
        for (block, rows, columns), index, given in zip(parts, lines, levels, strict=True):
            part = type(weights)(
                weights.coefficients[index], weights.positive_weight[rows], weights.gain
            )
            gradients = weigh(
                engine, block, state[:, index].contiguous(), positive[rows], part, levels=given
            )
            dx[rows] += gradients[0]
            dy[columns] += gradients[1]
            totals += gradients[2]
        assert_gradients(dense, exact, (dx, dy, totals), what=f"{offset=}")


# ---- finished lines ------------------------------------------------------------------------------


@in_every_dtype
@for_every_finished_kind
def test_finish(engine: str, kind: str, dtype: str) -> None:
    """Finishes the rows and columns of a rectangular block whose positives lie in it."""
    for shape in SMALL:
        for what, block in blocks(shape, dtype, kind):
            dense = Dense(block)
            state, positive, _ = sweep(engine, block)
            here = dense.is_positive.nonzero()
            if not len(here):
                continue
            rows, columns = here.unbind(1)
            lines = torch.cat([rows, dense.m + columns])
            # Each positive belongs to two lines.
            losses, coefficients, weights = operator("finish", engine)(
                state[:, lines].contiguous(), positive[rows], block.scale, block.bias, kind
            )
            s = (dense.scale * dense.positive[rows] + dense.bias).repeat(2)
            if not DENSE_KINDS[kind].has_shift:
                exact = dense.logarithms[lines] + F.softplus(-s, threshold=60)
                expected, weight = torch.ones_like(s), -torch.sigmoid(-s)
                found = coefficients
            else:
                negatives = dense.logarithms[lines] / LOG2E
                exact = F.softplus(negatives - s, threshold=60)
                total = torch.logaddexp(negatives, s) * LOG2E
                # coefficients are relative to the shifts: a * 2^-shift = 1 / (R + P)
                found, expected = torch.log2(coefficients) - state[0, lines], -total
                weight = -torch.sigmoid(negatives - s)
            tolerance = {"rtol": 2 * dense.arithmetic, "atol": 1e-12}
            torch.testing.assert_close(losses, exact, **tolerance, msg=what)
            torch.testing.assert_close(found, expected, atol=2 * dense.arithmetic, rtol=1e-12)
            torch.testing.assert_close(weights, weight, **tolerance)


@for_every_finished_kind
def test_a_line_without_its_positive_does_not_change_the_others(engine: str, kind: str) -> None:
    block = make_block(20, 9, 6, kind=kind)
    state, positive, _ = sweep(engine, block)
    arguments = (block.scale, block.bias, kind)
    finish = operator("finish", engine)
    alone = finish(state[:, :9].contiguous(), positive[:9], *arguments)
    together = finish(state[:, :20].contiguous(), positive, *arguments)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other[:9], rtol=1e-14, atol=0)
    assert together[0][9:].isnan().all()
