"""The bytes that ranks send for `distributed.contrast`, as its docstring states them."""

from __future__ import annotations

import pytest
import torch
from support.ranks import contrast
from support.ranks.processes import Ranks


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("extra", [{}, {"columns": False}], ids=["both", "rows alone"])
def test_bytes_sent_are_the_stated_ones(four: Ranks, extra: dict, ring: bool) -> None:
    m, n, d = 24, 40, 256
    found = four.run(contrast.bytes_sent, m, n, d, torch.bfloat16, {"ring": ring, **extra})
    features, gradients, batch = 2 * n * d, 4 * n * d, 4 * n
    stated = 3 * ((2 if ring else 1) * features + gradients)
    for sent in found:
        assert stated <= sum(sent.values()) <= stated + 56 * batch, sent


def test_bytes_sent_for_means(four: Ranks) -> None:
    """An all-reduce sends almost twice its tensor: here 3/2 with four ranks."""
    m, n, d = 24, 40, 256
    sent = [
        four.run(contrast.bytes_sent, m, n, d, torch.bfloat16, options)[0]
        for options in ({"ids": 7}, {"ids": 7, "means": True}, {}, {"means": True})
    ]
    by_id, of_all = (sum(b.values()) - sum(a.values()) for a, b in (sent[:2], sent[2:]))
    sums = 3 / 2 * 8 * 6 * d  # float64, twice in the forward and four times in the backward
    assert sums * 4 * n <= by_id - of_all <= sums * (4 * n + 2)
    assert sums <= of_all <= 1.5 * sums  # one row of sums: there are no lines without a group
    # One set against itself needs half of these sums.
    few, more = (
        four.run(contrast.bytes_sent, 0, n, d, torch.bfloat16, {"ids": 7, "means": means})[0]
        for means in (False, True)
    )
    added = sum(more.values()) - sum(few.values())
    assert sums / 2 * 4 * n <= added <= sums / 2 * (4 * n + 4)
