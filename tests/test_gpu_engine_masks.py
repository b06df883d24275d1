"""Pairs that do not count, positives by id and biases of columns in the GPU engines.

`test_masked_blocks.py`, which a card runs for these engines, too, on blocks of few tiles: whole ones
and those of the edges, in chunks, on both sides of the numerical switch, and small blocks.
"""

import functools
import importlib.util

import masked_cases
import pytest
import torch
from conftest import DEVICE
from dense_block import (
    DTYPES,
    LOSSES,
    assert_gradients,
    has_one_reference,
    make_masked_block,
    make_weights,
    sweep,
    weigh_all,
)
from gpu_engine_case import depth, enlarged, prepare, several_tiles, small_chunks, tile_of
from masked_cases import OPTIONS, check_masked, masked_blocks
from triton_case import needs_engine

from fastclip.kept import PLANS

pytestmark = pytest.mark.usefixtures("on_the_device", "half_products")
HALVES = ("float32", "bfloat16", "float16")


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 weights enter products in fp16."""
    check = functools.partial(assert_gradients, half_products=True)
    monkeypatch.setattr(masked_cases, "assert_gradients", check)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_option(gpu_engine: str, loss: str, options: str) -> None:
    """Another dtype, and other factors, at each offset."""
    shape = (*several_tiles(gpu_engine), 24)
    for turn, dtype in enumerate(HALVES):
        factors = (turn > 0, turn > 1)
        blocks = masked_blocks(shape, DTYPES[dtype], options, loss=loss, factors=factors)
        what, block = list(blocks)[turn]
        check_masked(gpu_engine, block, what, project=turn > 0)
