"""Ranks whose scales or biases differ: the logits of a row have those of the row's rank."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.ranks import drift
from support.ranks.drift import Drift
from support.ranks.processes import Ranks


def test_values_and_gradients_are_the_dense_ones(three: Ranks) -> None:
    """The second scales are so far apart that ranks take different shifts."""
    cases = [
        Drift(loss, sizes, scales, ring)
        for loss, sizes, scales, ring in product(
            drift.OURS, ((3, 3, 3), (4, 0, 5)), ((5.0, 20.0, 0.3), (300.0, 0.1, -14.0)),
            (False, True),
        )
    ]  # fmt: skip
    for case, found in zip(cases, zip(*three.run(drift.ours, cases), strict=True), strict=True):
        for rank, ((value, gradients), (true, exact)) in enumerate(
            zip(found, drift.dense(case), strict=True)
        ):
            assert value == pytest.approx(true, rel=1e-10), (case, rank)
            for k, (mine, wanted) in enumerate(zip(gradients, exact, strict=True)):
                what = f"{case} {rank} {k}"
                torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-11, msg=what)


@pytest.mark.parametrize("as_numbers", [False, True], ids=["tensors", "numbers"])
def test_a_difference_warns_once_on_every_rank(three: Ranks, as_numbers: bool) -> None:
    for found in three.run(drift.warned, True, as_numbers):
        scale, bias = found
        assert "logit_scale must be the same on all ranks, got rank 0: 5.0, rank 1: 20.0" in scale
        assert "logit_bias must be the same on all ranks, got rank 0: -2.0, rank 1: 13.0" in bias
        assert "ranks/drift.py" in scale  # the caller
    assert three.run(drift.warned, False, as_numbers) == [[]] * 3
