"""Sampled negatives follow the softmax, never an own positive, and depend on the seed alone."""

import math

import pytest
import torch
from conftest import DEVICE
from support.retrieval_oracle import features
from torch import Tensor

from fastclip import retrieval

REPEATS = 4000


def drawn(x: Tensor, y: Tensor, engine: str, **options: object) -> tuple[Tensor, Tensor]:
    """Draws for REPEATS copies of each row of x: they are rows with noise of their own."""
    rows = x.repeat_interleave(REPEATS, 0).to(DEVICE)
    found, _ = retrieval.sample_negatives(
        rows, y.to(DEVICE), 3.0, backend=engine, columns=False, **options
    )
    return found.view(len(x), REPEATS).cpu()


def assert_distributed(found: Tensor, probabilities: Tensor) -> None:
    """A chi-squared test of each row of draws, which fails once in 10^6 of correct draws."""
    for row, expected in zip(found, probabilities, strict=True):
        counts = torch.bincount(row, minlength=len(expected)).double()
        assert counts[expected == 0].sum() == 0
        kept = expected > 0
        statistic = ((counts - REPEATS * expected)[kept] ** 2 / (REPEATS * expected[kept])).sum()
        freedom = kept.sum().item() - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 15


def test_rows_are_drawn_from_their_softmax(engine: str) -> None:
    x, y = features("random", 3, 6, 0, torch.float32), features("random", 9, 6, 1, torch.float32)
    expected = (3.0 * x.double() @ y.double().T).softmax(1)
    assert_distributed(drawn(x, y, engine, offset=None), expected)


def test_columns_are_drawn_from_theirs(engine: str) -> None:
    x, y = features("random", 7, 6, 2, torch.float32), features("random", 2, 6, 3, torch.float32)
    keys = y.repeat_interleave(REPEATS, 0).to(DEVICE)
    _, found = retrieval.sample_negatives(x.to(DEVICE), keys, 3.0, backend=engine, offset=None)
    expected = (3.0 * x.double() @ y.double().T).softmax(0).T
    assert_distributed(found.view(2, REPEATS).cpu(), expected)


def test_pairs_of_equal_ids_are_not_drawn(engine: str) -> None:
    x, y = features("random", 2, 6, 4, torch.float32), features("random", 8, 6, 5, torch.float32)
    ids = torch.tensor([0, 1]), torch.arange(8) % 3
    logits = 3.0 * x.double() @ y.double().T
    expected = logits.masked_fill(ids[0][:, None] == ids[1], -math.inf).softmax(1)
    repeated = ids[0].repeat_interleave(REPEATS).to(DEVICE), ids[1].to(DEVICE)
    assert_distributed(drawn(x, y, engine, offset=None, ids=repeated), expected)


@pytest.mark.parametrize("offset", [0, -3, 5])
def test_own_positives_are_never_drawn(offset: int, engine: str) -> None:
    # Own positives would win every time.
    x = 10 * torch.eye(12, device=DEVICE)
    y = x.roll(offset, 0)
    for seed in range(20):
        rows, columns = retrieval.sample_negatives(
            x, y, 10.0, offset=offset, seed=seed, backend=engine
        )
        own = torch.arange(12, device=DEVICE) + offset
        inside = (own >= 0) & (own < 12)
        assert not (rows == own)[inside].any()
        assert not (columns == torch.arange(12, device=DEVICE) - offset)[inside.roll(offset)].any()


def test_draws_of_rows_are_independent() -> None:
    x = torch.zeros(2000, 1)
    rows, columns = retrieval.sample_negatives(x, torch.zeros(2, 1), 1.0, offset=None)
    pairs = rows.view(-1, 2)
    counts = torch.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4).double()
    assert ((counts - 250) ** 2 / 250).sum() < 25
    assert len(columns) == 2


def test_equal_seeds_draw_alike_on_any_engine_and_number_of_threads(backends: list[str]) -> None:
    x, y = (features("random", n, 16, n, torch.float32).to(DEVICE) for n in (300, 500))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for engine in backends[:-1]:
                found.append(retrieval.sample_negatives(x, y, 20.0, seed=-5, backend=engine))
    finally:
        torch.set_num_threads(before)
    for rows, columns in found[1:]:
        assert torch.equal(rows, found[0][0]) and torch.equal(columns, found[0][1])
    other, _ = retrieval.sample_negatives(x, y, 20.0, seed=-4)
    assert not torch.equal(other, found[0][0])


def test_without_a_seed_every_call_draws_anew() -> None:
    x = features("random", 64, 8, 0, torch.float32)
    torch.manual_seed(5)
    first, second = (retrieval.sample_negatives(x, x, 1.0)[0] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(retrieval.sample_negatives(x, x, 1.0)[0], first)
    assert (first == second).float().mean() < 0.2


def test_lines_without_negatives_get_none(engine: str) -> None:
    x = torch.ones(1, 2, device=DEVICE)
    rows, columns = retrieval.sample_negatives(x, x, 1.0, backend=engine)
    assert (rows.tolist(), columns.tolist()) == ([-1], [-1])
    rows, columns = retrieval.sample_negatives(x[:0], x, 1.0, backend=engine)
    assert (rows.tolist(), columns.tolist()) == ([], [-1])


def test_bad_arguments() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="logit_scale must be finite, got inf"):
        retrieval.sample_negatives(x, x, math.inf)
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits, got"):
        retrieval.sample_negatives(x, x, 1.0, seed=2**63)
    with pytest.raises(ValueError, match="logits must be finite in float32, got features of norms"):
        retrieval.sample_negatives(1e20 * x, 1e20 * x, 1.0)
