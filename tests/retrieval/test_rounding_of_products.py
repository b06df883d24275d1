"""Ranks and best keys stay exact where products round, underflow, overflow or cancel."""

from collections.abc import Iterator

import pytest
import torch
from conftest import DEVICE
from support.retrieval_oracle import dense_ranks, dense_topk, features
from torch import Tensor

from fastclip import retrieval


@pytest.fixture
def bfloat16_products() -> Iterator[None]:
    """The user lets float32 products round their operands to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def check(x: Tensor, y: Tensor, engine: str) -> None:
    found = retrieval.ranks(x.to(DEVICE), y.to(DEVICE), backend=engine)
    assert found.rows.tolist() == dense_ranks(x, y)
    assert found.columns.tolist() == dense_ranks(y, x)
    _, indices = retrieval.topk(x.to(DEVICE), y.to(DEVICE), 5, backend=engine)
    assert torch.equal(indices.cpu(), dense_topk(x, y, 5, lambda i, j, score: True)[1])


@pytest.mark.parametrize("product", ["mm", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_that_round(
    dtype: torch.dtype, product: str, engine: str, bfloat16_products: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FASTCLIP_CPU", product)
    x = features("random", 100, 64, 0, dtype)
    y = (x + 0.3 * features("random", 100, 64, 1, dtype)).to(dtype)
    check(x, y, engine)


@pytest.mark.parametrize("size", [1e-23, 1e-30, 1e-42])
@pytest.mark.parametrize("other", [1.0, 1e23, 1e37])
def test_tiny_features(size: float, other: float, engine: str) -> None:
    x, y = (features("near", 40, 20, seed, torch.float64) for seed in (2, 3))
    check((x * other).float(), (y * size).float(), engine)


def test_denormal_bfloat16_features(engine: str) -> None:
    x, y = (features("random", 40, 20, seed, torch.float64) for seed in (4, 5))
    check((1e37 * x).bfloat16(), (1e-39 * y).bfloat16(), engine)


def test_partial_sums_that_overflow(engine: str) -> None:
    x = torch.full((3, 3), 1e30)
    y = torch.tensor([[3e8, 3e8, -5e8], [2e8, 0, 0], [1.5e8, 0, 0]])
    check(x, y, engine)
    check(y, x, engine)


def test_huge_features_are_normalised(engine: str) -> None:
    x, y = (features("random", 30, 8, seed, torch.float32).to(DEVICE) for seed in (6, 7))
    expected = retrieval.ranks(x, y, normalize=True, backend=engine)
    for size in (1e30, 1e38, 1e-30):
        found = retrieval.ranks(size * x, y, normalize=True, backend=engine)
        # Below 1e-12 a norm counts as 1e-12, which keeps the order of a query's keys.
        assert torch.equal(found.rows, expected.rows)


def test_float64_scores_must_be_finite(engine: str) -> None:
    x = torch.full((2, 2), 1e200, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="queries must have norms of at most"):
        retrieval.topk(x, x, 1, backend=engine)


def test_scores_that_differ_in_their_last_digit_are_the_same_on_every_engine(
    backends: list[str],
) -> None:
    generator = torch.Generator().manual_seed(8)
    value = torch.rand(33, generator=generator)
    y = torch.stack([value[torch.randperm(33, generator=generator)] for _ in range(60)])
    x = torch.full((60, 33), 0.7)
    found = [
        retrieval.ranks(x.to(DEVICE), y.to(DEVICE), backend=engine).rows for engine in backends[:-1]
    ]
    assert all(torch.equal(rows, found[0]) for rows in found)


def test_long_features_tie(engine: str) -> None:
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        x, y = torch.rand(2, 70_000, generator=generator).to(DEVICE)
        found = retrieval.ranks(x[None], y.expand(2, -1), offset=1, backend=engine)
        assert found.rows.tolist() == [1]
