"""Blocks for tests of the operators (shapes, offsets, dtypes, kinds), and marks for them."""

from collections.abc import Iterator

import pytest
from conftest import DEVICE
from support.dense_block import DTYPES, KINDS, Block, make_block

import fastclip

compiled_only = pytest.mark.skipif(
    DEVICE.type != "cpu" or fastclip.backends()["cpu"] != "available",
    reason="only the C++ engine keeps products, and it was not built or the device is another",
)

# The C++ engine takes the longer tower's features as rows, so it swaps the towers if M < N. More
# than 1023 columns make its tiles larger, and D beyond 128 splits its products.
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
    shape: str, dtype: str, kind: str, few: bool = False, **options: object
) -> Iterator[tuple[str, Block]]:
    m, n, d = SHAPES[shape]
    for name, offset in offsets(m, n).items():
        if name in FEW or not (few or shape in LARGE):
            block = make_block(m, n, d, DTYPES[dtype], kind=kind, offset=offset, **options)
            yield f"positives {name}", block


everywhere = pytest.mark.parametrize("shape", SHAPES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
for_every_kind = pytest.mark.parametrize("kind", KINDS)
