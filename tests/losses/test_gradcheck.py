"""The returned gradients are those of the returned loss: torch.autograd.gradcheck."""

import pytest
import torch
from support.hard_inputs import batch
from support.losses import LOSSES


@pytest.mark.parametrize("batch_name", ["random", "duplicates", "lengths"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(
    loss: str, backend: str, reduction: str, normalize: bool, batch_name: str, device: torch.device
) -> None:
    for n, scale_shape in ((1, ()), (2, (1,)), (6, ())):
        x, y = (torch.tensor(t, device=device, requires_grad=True) for t in batch(batch_name, n, 4))
        scale = torch.full(scale_shape, 2.5, dtype=torch.float64, device=device)
        bias = torch.full(scale_shape, -1.5, dtype=torch.float64, device=device)
        inputs = (x, y, scale.requires_grad_(), bias.requires_grad_())

        def function(*inputs: torch.Tensor) -> torch.Tensor:
            options = {"normalize": normalize, "reduction": reduction, "backend": backend}
            return LOSSES[loss](*inputs, **options)

        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_across_tiles(loss: str, backend: str, device: torch.device) -> None:
    # Fast mode compares one random projection of the Jacobian, which large batches can afford.
    x, y = (torch.tensor(t, device=device, requires_grad=True) for t in batch("random", 161, 70))
    scale, bias = (torch.tensor(t, device=device).double().requires_grad_() for t in (3.0, -1.0))
    for options in ({}, {"normalize": True}, {"reduction": "none"}, {"memory_budget": 0}):
        assert torch.autograd.gradcheck(
            lambda *inputs, options=options: LOSSES[loss](*inputs, backend=backend, **options),
            (x, y, scale, bias),
            fast_mode=True,
        )
