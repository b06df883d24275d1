"""Inputs for our losses and open_clip's, and a comparison of the two."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclip.loss

N, D = 19, 16
NAMES = ("ClipLoss", "SigLipLoss")


def ours_of(name: str) -> type[nn.Module]:
    """Returns our class of that name."""
    return getattr(fastclip.loss, name)


def model_out(
    device: torch.device, scale_shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Returns the output of an open_clip model: normalised features, exponentiated scale, bias."""
    generator = torch.Generator().manual_seed(3)
    x, y = F.normalize(torch.randn(2, N, D, generator=generator), dim=-1).to(device, dtype)
    out = {
        "image_features": x,
        "text_features": y,
        "logit_scale": torch.full(scale_shape, 14.3, device=device),
        "logit_bias": torch.full(scale_shape, -3.0, device=device),
    }
    return {name: t.clone().requires_grad_() for name, t in out.items()}


def compare(one: nn.Module, other: nn.Module, out: dict[str, Tensor]) -> None:
    """Asserts that two losses have the same value and the same gradients of all inputs."""
    found = []
    for module in (one, other):
        value = module(**out)
        found.append((value, *torch.autograd.grad(value, list(out.values()), allow_unused=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
