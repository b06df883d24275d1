"""Ranks by the GPU engines' sweeps, interpreted or emulated, equal those of sorted exact scores."""

import pytest
import torch
from support.retrieval_oracle import KINDS, dense_ranks, features
from torch import Tensor

from fastclip.retrieval import plain_ranks, swept_ranks
from fastclip.retrieval.own import own_partners
from fastclip.retrieval.sides import sides_of


def check(x: Tensor, y: Tensor, engine: str, ids: tuple | None = None, offset: int = 0) -> None:
    sides = sides_of(x, y, ids, offset, False, "torch")._replace(engine=engine)
    of_rows, of_columns = own_partners(sides), own_partners(sides.swapped())
    found = swept_ranks.counts(sides, of_rows, of_columns, 0)
    expected = plain_ranks.counts(sides._replace(engine="torch"), of_rows, of_columns, 0)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)
    rows = swept_ranks.counts(sides, of_rows, None, 0)
    assert len(rows) == 1 and torch.equal(rows[0], found[0])
    ranks = torch.where(of_rows.index < 0, -1, found[0])
    assert ranks.tolist() == dense_ranks(x, y, offset, ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "large"])
def test_inputs_on_which_ties_and_rounding_decide(kind: str, gpu_engine: str) -> None:
    x, y = (features(kind, n, 20, n, torch.float32) for n in (40, 41))
    check(x, y, gpu_engine, offset=-3)


def test_ids_and_half_features(gpu_engine: str) -> None:
    x, y = (features("random", n, 16, n, torch.bfloat16) for n in (12, 60))
    check(x, y, gpu_engine, ids=(torch.arange(12), torch.arange(60) // 5))
