"""The streamed truth of large batches agrees with the dense losses."""

import pytest
import torch
from support.losses import REFERENCES
from support.streamed_truth import truth


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", REFERENCES)
def test_streamed_truth_equals_the_dense_loss(loss: str, normalize: bool) -> None:
    """The last chunk of rows is smaller than the others."""
    leaves = [*torch.randn(2, 50, 7, dtype=torch.float64)]
    leaves += [torch.tensor(value, dtype=torch.float64) for value in (2.5, -1.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value = REFERENCES[loss](*leaves, normalize=normalize)
    expected = (value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True))
    for result, exact in zip(truth(loss, *leaves, normalize, rows=16), expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-14)
