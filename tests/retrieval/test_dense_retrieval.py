"""The dense forms equal those of the oracle, which sorts in Python."""

import pytest
import torch
from support.retrieval_oracle import dense_ranks, dense_topk, features

from fastclip import reference


@pytest.mark.parametrize("kind", ["random", "integers", "alike"])
def test_dense_forms(kind: str) -> None:
    x, y = features(kind, 12, 5, 0, torch.float32), features(kind, 31, 5, 1, torch.float32)
    ids = torch.arange(12) % 5, torch.arange(31) % 4
    found = reference.ranks(x, y, offset=4)
    assert found.rows.tolist() == dense_ranks(x, y, 4)
    assert found.columns.tolist() == dense_ranks(y, x, -4)
    found = reference.ranks(x, y, ids=ids)
    assert found.rows.tolist() == dense_ranks(x, y, ids=ids)
    assert found.columns.tolist() == dense_ranks(y, x, ids=ids[::-1])
    assert reference.ranks(x, y, columns=False).columns is None

    def allowed(i: int, j: int, score: float) -> bool:
        return score <= 1.5 and i != j and ids[0][i] != ids[1][j]

    scores, indices = reference.topk(x, y, 40, ids=ids, max_score=1.5, exclude_own=True)
    expected, places = dense_topk(x, y, 40, allowed)
    assert torch.equal(indices, places)
    torch.testing.assert_close(scores, expected.float())
