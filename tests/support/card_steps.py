"""Steps of the losses for tests that only a card can run."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from support.losses import LOSSES
from torch import Tensor

from fastclip import contrast

FUSED = [name for name in ("triton", "cuda") if name in BACKENDS]


on_each = pytest.mark.parametrize("fused", FUSED or ["triton"])


def of_everything(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, reduction: str = "mean", **options: object
) -> Tensor:
    """A loss of all statistics, with every option of `contrast`."""
    ids = torch.arange(len(x), device=x.device) // 3
    c = contrast(
        x, y, scale, bias, ids=(ids, ids), same_id="positive", false_negative_margin=0.1,
        key_bias=torch.linspace(-1, 1, len(y), device=y.device), **options,
    )  # fmt: skip
    rows, columns = c.rows - c.row_positives, c.columns - c.column_positives
    losses = (F.softplus(rows, threshold=60) + F.softplus(columns, threshold=60)).float()
    return losses.mean() if reduction == "mean" else losses


STEPS = LOSSES | {"contrast": of_everything}


MIB = 1 << 20


def inputs(n: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    towers = torch.randn(2, n, d, device=DEVICE, generator=generator)
    leaves = [*F.normalize(towers, dim=-1).to(dtype).unbind()]
    leaves += [torch.tensor(value, device=DEVICE) for value in (20.0, -5.0)]
    return [leaf.clone().requires_grad_() for leaf in leaves]


def step(loss: str, leaves: list[Tensor], engine: str, **options: object) -> list[Tensor]:
    value = STEPS[loss](*leaves, backend=engine, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
