"""The GPU engines are right on blocks of several tiles, on a card as well as interpreted.

Both kinds in every dtype, with factors and depths that steps do not divide; diagonals through edges
and corners of tiles; several chunks; a numerical switch that a single line requires.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from support.dense_block import DENSE_KINDS, DTYPES, KINDS, Block, make_block
from support.dense_truth import has_one_shift
from support.gpu_engine_case import (
    check,
    check_in_one_go,
    depth,
    many_tiles,
    several_tiles,
    small_chunks,
    tf32_products,
    tile_of,
)

pytestmark = pytest.mark.usefixtures("on_the_device")


class Case(NamedTuple):
    """A dtype, a number of features, and the towers that have factors."""

    dtype: str
    width: int
    factors: tuple[bool, bool] = (False, False)
    tall: bool = False  # M > N

    def __str__(self) -> str:
        factors = [side for side, used in zip("xy", self.factors, strict=True) if used]
        return " ".join([self.dtype, str(self.width), *factors, *["tall"] * self.tall])

    def block(self, size: tuple[int, int], kind: str, offset: int) -> Block:
        m, n = size[::-1] if self.tall else size
        return make_block(
            m, n, depth(self.width), DTYPES[self.dtype], kind=kind, offset=offset,
            factors=self.factors,
        )  # fmt: skip


# Rows begin on 16 bytes and end within a step; end with a step; or begin anywhere.
CASES = [
    Case("bfloat16", 1000, (True, True)),
    Case("bfloat16", 1001, (False, True), tall=True),
    Case("float16", 520, (True, True), tall=True),
    Case("float16", 1001, (True, False)),
    Case("float32", 96, (True, False), tall=True),
    Case("float32", 1001),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_tiles(gpu_engine: str, case: Case) -> None:
    check(gpu_engine, case.block(many_tiles(gpu_engine), "softmax", 5))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("case", CASES[:4:3], ids=str)
def test_many_tiles_of_a_kind_without_a_shift(gpu_engine: str, case: Case, kind: str) -> None:
    check(gpu_engine, case.block(many_tiles(gpu_engine), kind, -5))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_tiles_in_one_go(gpu_engine: str, case: Case) -> None:
    check_in_one_go(gpu_engine, case.block(many_tiles(gpu_engine), "sigmoid", 5))


def test_many_tiles_in_tf32(gpu_engine: str) -> None:
    """The features hold tf32 numbers, so only weights are rounded."""
    for kind, run in (("softmax", check), ("sigmoid", check_in_one_go), ("hinge", check)):
        block = Case("float32", 520, (True, False)).block(many_tiles(gpu_engine), kind, -5)
        held = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in block[:2]]
        with tf32_products():
            run(gpu_engine, block._replace(x=held[0], y=held[1]))


def diagonals(rows: int, columns: int, m: int, n: int) -> dict[str, int]:
    """Returns offsets, named after the way that the diagonal meets tiles of rows x columns."""
    return {
        "through corners": 0,
        "a corner above": 1,  # the last row of a tile has its positive in the next tile's first
        "a corner below": -1,
        "a tile's last column": columns - 1,
        "through corners, one tile on": columns,
        "a tile's last row": 1 - rows,
        "through corners, one tile down": -rows,
        "ends with the block": n - m,
        "one pair, last column": n - 1,
        "one pair, last row": 1 - m,
    }


@pytest.mark.parametrize("diagonal", diagonals(0, 0, 0, 0))
def test_any_diagonal(gpu_engine: str, diagonal: str) -> None:
    """Each row that has a positive gets it, and no other pair is mistaken for one."""
    rows, columns = tile_of(gpu_engine)
    m, n = rows + rows // 2, 2 * columns + columns // 4
    offset = diagonals(rows, columns, m, n)[diagonal]
    kind = KINDS[offset % len(KINDS)]
    check(gpu_engine, make_block(m, n, 8, torch.bfloat16, kind=kind, offset=offset))


class Cut(NamedTuple):
    """A kind, the shape of chunks and the offset in tiles, and the share of rows to keep."""

    kind: str
    rows: int
    columns: int
    offset: float
    kept: float = 0


CUTS = [
    Cut("softmax", 1, 2, 0),  # the diagonal passes through the corners of chunks
    Cut("sigmoid", 2, 1, -1),
    Cut("softmax", 1, 1, 1.03, kept=0.4),  # beside them; kept rows end within a chunk
    Cut("sigmoid", 1, 2, -0.97, kept=0.4),
    Cut("softmax", 2, 2, -0.97, kept=1),
    Cut("hinge", 1, 1, 1.03),
    Cut("hinge", 2, 1, -0.97, kept=0.4),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: " ".join(map(str, cut)))
def test_chunks_of_tiles(gpu_engine: str, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = tile_of(gpu_engine)
    m, n = several_tiles(gpu_engine)
    block = make_block(
        m, n, depth(520), torch.bfloat16, kind=cut.kind, offset=round(cut.offset * columns),
        factors=(True, True),
    )  # fmt: skip
    keep = int(cut.kept * n) // 16 * 16
    with small_chunks(gpu_engine, monkeypatch, cut.rows * rows, cut.columns * columns):
        check(gpu_engine, block, keep)
        if DENSE_KINDS[cut.kind].is_linear and not keep:
            check_in_one_go(gpu_engine, block)


# ---- the numerical switch ------------------------------------------------------------------------


def as_it_is(block: Block) -> None:
    pass


def one_long(block: Block) -> None:
    """The bound fits one pair; all other logits are far below it."""
    block.x[-2] *= 25
    block.y[len(block.y) // 2] *= 25


def low_row(block: Block) -> None:
    """All logits of one row, its positive included, are far below the others."""
    block.y[:, 0] = block.y[:, 0].abs() + 1
    block.x[-2] = 0
    block.x[-2, 0] = -1


def low_column(block: Block) -> None:
    block.x[:, 0] = block.x[:, 0].abs() + 1
    block.y[-2] = 0
    block.y[-2, 0] = -1


SWITCHES = [
    (as_it_is, 112.3, "float32", False),
    (one_long, 14.3, "float16", False),
    (low_row, 100.0, "bfloat16", True),
    (low_column, 100.0, "float32", True),
]


@pytest.mark.parametrize(
    "spoil, scale, dtype, in_chunks", SWITCHES, ids=lambda value: getattr(value, "__name__", None)
)
def test_the_switch_among_tiles(
    gpu_engine: str, spoil: Callable[[Block], None], scale: float, dtype: str, in_chunks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every line is right, not only the line that needs a shift of its own."""
    rows, columns = tile_of(gpu_engine)
    m, n = several_tiles(gpu_engine)
    block = make_block(m, n, 24, DTYPES[dtype], scale=scale, offset=rows + 1)
    spoil(block)
    with small_chunks(gpu_engine, monkeypatch, rows, columns) if in_chunks else nullcontext():
        state = check(gpu_engine, block)
    assert has_one_shift(state) == (spoil is as_it_is)
