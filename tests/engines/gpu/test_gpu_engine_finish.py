"""The GPU engines finish lines in float64 as plain PyTorch does, to the last digits."""

import pytest
import torch
from support.block_operators import operator
from support.dense_block import DENSE_KINDS, FINISHED

from fastclip.engine import torch_engine

pytestmark = pytest.mark.usefixtures("on_the_device")

# Sums from those of lines without negatives to the limit of fp32, positives beyond both limits.
SUMS = (0.0, 1e-300, 2.0**-78, 1e-9, 1.0, 3.7, 1e12, 2.0**127)
POSITIVES = (-1e5, -745.0, -3.0, -1e-12, 0.0, 0.7, 40.0, 2e4, float("nan"))
SHIFTS = (-200.0, 0.0, 37.0, 1443.0)


def lines() -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.cartesian_prod(
        *(torch.tensor(v, dtype=torch.float64) for v in (SHIFTS, SUMS, POSITIVES))
    )
    return grid[:, :2].T.contiguous(), grid[:, 2].contiguous()


@pytest.mark.parametrize("kind", FINISHED)
def test_it_agrees_with_plain_pytorch(gpu_engine: str, kind: str) -> None:
    state, positive = lines()
    if not DENSE_KINDS[kind].has_shift:
        state[0] = 0
    scale, bias = torch.tensor(1.3), torch.tensor(-2.0)
    finished = operator("finish", gpu_engine)(state, positive, scale, bias, kind)
    expected = torch_engine.finish(state, positive, scale, bias, kind)
    for result, truth in zip(finished, expected, strict=True):
        # Only lines without negatives have larger coefficients: they have no weights.
        result, truth = result.clamp_max(4e307), truth.clamp_max(4e307)
        torch.testing.assert_close(result, truth, rtol=5e-15, atol=1e-300, equal_nan=True)


def test_rows_and_columns_may_share_positives(gpu_engine: str) -> None:
    state, positive = torch.rand(2, 14, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    scale = torch.tensor([2.0])
    finish = operator("finish", gpu_engine)
    together = finish(state, positive, scale, None, "softmax")
    for start in (0, 7):
        alone = finish(state[:, start : start + 7], positive, scale, None, "softmax")
        for result, expected in zip(together, alone, strict=True):
            assert torch.equal(result[start : start + 7], expected)
