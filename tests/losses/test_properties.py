"""Symmetries, bounds and sums that hold for every batch, tested with hypothesis."""

import math
from typing import NamedTuple

import pytest
import torch
from support.losses import LOSSES
from torch import Tensor

from fastclip.loss import clip_loss

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

settings.register_profile(
    "fastclip", max_examples=40, deadline=None, derandomize=True, database=None
)
settings.load_profile("fastclip")

sizes = st.tuples(st.integers(1, 150), st.integers(1, 80), st.integers(0, 2**31))
scales = st.floats(-50, 50, width=32)
biases = st.floats(-20, 20, width=32)
losses = st.sampled_from(sorted(LOSSES))


class Case(NamedTuple):
    """A loss without reduction, and a batch to evaluate it on."""

    size: tuple[int, int, int]
    loss: str
    scale: float
    bias: float
    normalize: bool

    def losses(self, x: Tensor, y: Tensor, engine: str) -> Tensor:
        options = {"normalize": self.normalize, "reduction": "none", "backend": engine}
        return LOSSES[self.loss](x, y, self.scale, self.bias, **options)


cases = st.builds(Case, sizes, losses, scales, biases, st.booleans())


def features(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns float64 features, so that a broken property cannot be mistaken for rounding."""
    n, d, seed = size
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return x.to(device).requires_grad_(), y.to(device).requires_grad_()


def leaves(device: torch.device, *values: float) -> list[Tensor]:
    return [torch.tensor(t, device=device).double().requires_grad_() for t in values]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@given(case=cases)
def test_no_loss_is_negative(engine: str, device: torch.device, case: Case) -> None:
    x, y = features(case.size, device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value = case.losses(x.to(dtype), y.to(dtype), engine)
        assert value.shape == (len(x),)
        assert value.isfinite().all() and (value >= 0).all()


@given(case=cases)
def test_permuting_the_pairs_permutes_losses_and_gradients(
    engine: str, device: torch.device, case: Case
) -> None:
    x, y = features(case.size, device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(case.size[2])).to(device)
    value = case.losses(x, y, engine)
    permuted = case.losses(x[order], y[order], engine)
    close(permuted, value[order])
    g = torch.linspace(-1, 1, len(x), dtype=torch.float64, device=device)
    direct = torch.autograd.grad(value, (x, y), g)
    for one, other in zip(direct, torch.autograd.grad(permuted, (x, y), g[order]), strict=True):
        close(one, other)


@given(case=cases)
def test_swapping_the_towers_swaps_their_gradients(
    engine: str, device: torch.device, case: Case
) -> None:
    x, y = features(case.size, device)
    one, other = case.losses(x, y, engine), case.losses(y, x, engine)
    close(one, other)
    g = torch.linspace(-1, 1, len(x), dtype=torch.float64, device=device)
    found = torch.autograd.grad(one, (x, y), g), torch.autograd.grad(other, (x, y), g)
    for a, b in zip(*found, strict=True):
        close(a, b)


@given(size=sizes, scale=scales, bias=biases)
def test_a_bias_does_not_change_clip(
    engine: str, device: torch.device, size: tuple, scale: float, bias: float
) -> None:
    x, y = features(size, device)
    results = []
    for given_bias in (bias, None, torch.tensor(bias, dtype=torch.float64, device=device)):
        value = clip_loss(x, y, scale, given_bias, backend=engine)
        results.append((value, *torch.autograd.grad(value, (x, y))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@given(size=sizes, loss=losses, scale=scales, bias=biases)
def test_reductions_are_sums_of_the_same_losses(
    engine: str, device: torch.device, size: tuple, loss: str, scale: float, bias: float
) -> None:
    x, y = features(size, device)
    found = {}
    for reduction in ("none", "mean", "sum"):
        scalars = leaves(device, scale, bias)
        value = LOSSES[loss](x, y, *scalars, reduction=reduction, backend=engine)
        found[reduction] = (value.sum(), *torch.autograd.grad(value.sum(), (x, y, *scalars)))
    for none, mean, total in zip(*found.values(), strict=True):
        close(none, total)
        close(mean * size[0], total)


@given(size=sizes, loss=losses, scale=scales, bias=biases)
def test_scale_and_bias_gradients_are_finite_differences(
    engine: str, device: torch.device, size: tuple, loss: str, scale: float, bias: float
) -> None:
    x, y = (t.detach() for t in features(size, device))

    def value(*scalars: float | Tensor) -> Tensor:
        return LOSSES[loss](x, y, *scalars, backend=engine)

    scalars = leaves(device, scale, bias)
    dscale, dbias = torch.autograd.grad(value(*scalars), scalars)
    h = 1e-5
    for gradient, step in ((dscale, (h, 0)), (dbias, (0, h))):
        up = value(scale + step[0], bias + step[1])
        down = value(scale - step[0], bias - step[1])
        torch.testing.assert_close(gradient, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


@given(size=sizes, loss=losses, scale=scales, factor=st.floats(1e-3, 1e3))
def test_the_length_of_normalised_features_does_not_matter(
    engine: str, device: torch.device, size: tuple, loss: str, scale: float, factor: float
) -> None:
    x, y = features(size, device)
    options = {"normalize": True, "backend": engine}
    one = LOSSES[loss](x, y, scale, **options)
    other = LOSSES[loss](factor * x, y, scale, **options)
    close(one, other)
    dx, dy = torch.autograd.grad(one, (x, y))
    # A function that does not depend on a feature's length has a gradient orthogonal to it (Euler).
    for d, t in ((dx, x), (dy, y)):
        assert (d * t).sum(1).abs().max() <= 1e-10 * (1 + abs(scale))


@given(size=sizes, scale=scales)
def test_a_scale_equals_scaled_features(
    engine: str, device: torch.device, size: tuple, scale: float
) -> None:
    x, y = features(size, device)
    for loss in LOSSES.values():
        close(
            loss(x, y, scale, -1.0, backend=engine), loss(scale * x, y, 1.0, -1.0, backend=engine)
        )
