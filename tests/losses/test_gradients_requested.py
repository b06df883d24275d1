"""Only requested gradients are computed; repeated backwards and any upstream gradient work."""

import itertools
import math
from typing import Any

import pytest
import torch
from support.hard_inputs import batch
from support.judge import QUANTITIES
from support.losses import LOSSES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.loss import clip_loss, siglip_loss

N, D = 37, 11
INPUTS = QUANTITIES[1:]


def make_inputs(
    device: torch.device, requested: tuple[str, ...] = INPUTS, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    x, y = (torch.tensor(t, device=device, dtype=dtype) for t in batch("random", N, D))
    scale, bias = (torch.tensor(t, device=device) for t in (5.0, -2.0))
    inputs = [x, y, scale, bias]
    return [t.requires_grad_(n in requested) for n, t in zip(INPUTS, inputs, strict=True)]


class Operators(TorchDispatchMode):
    """Records fastclip's operators that run, and the tensors of the features' size that they make.

    A dispatch mode sees only the work that is really done, without autograd's bookkeeping.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.gradients = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "fastclip":
            self.names.append(function.name())
            outputs = result if isinstance(result, tuple) else (result,)
            self.gradients += sum(tuple(t.shape) == (N, D) for t in outputs)
        return result


def assert_same_value(value: Tensor, expected: Tensor) -> None:
    """Bit for bit, except on cards, where kernels that write less may sum in another order."""
    limits = {"rtol": 0.0, "atol": 0.0} if value.device.type == "cpu" else {}
    torch.testing.assert_close(value, expected, **limits)


# Every set of requested gradients, except the empty one.
SUBSETS = [names for size in range(1, 5) for names in itertools.combinations(INPUTS, size)]


@pytest.mark.parametrize("requested", SUBSETS, ids="+".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_only_requested_gradients_are_returned(
    loss: str, backend: str, reduction: str, requested: tuple[str, ...], device: torch.device
) -> None:
    everything = make_inputs(device)
    some = make_inputs(device, requested)
    for inputs in (everything, some):
        value = LOSSES[loss](*inputs, reduction=reduction, backend=backend)
        value.backward(torch.linspace(-1, 2, N, device=device) if value.dim() else None)
    for name, one, other in zip(INPUTS, everything, some, strict=True):
        if name in requested:
            assert_same_value(other.grad, one.grad)
        else:
            assert other.grad is None


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_is_computed_for_a_frozen_tower(
    loss: str, engine: str, reduction: str, normalize: bool, device: torch.device
) -> None:
    for requested in SUBSETS:
        inputs = make_inputs(device, requested)
        with Operators() as operators:
            options = {"reduction": reduction, "normalize": normalize, "backend": engine}
            LOSSES[loss](*inputs, **options).sum().backward()
        assert operators.names
        assert operators.gradients == ("dx" in requested) + ("dy" in requested), requested


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_only_one_sweep_runs(
    loss: str, engine: str, device: torch.device
) -> None:
    inputs = make_inputs(device)
    expected = LOSSES[loss](*inputs, backend=engine).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with Operators() as operators, context:
            value = LOSSES[loss](*inputs, backend=engine)
        # Neither `weigh` nor `sweep_and_weigh` runs; finishing the loss is O(N).
        sweeps = [name for name in operators.names if "sweep" in name]
        assert len(sweeps) == 1
        assert not any("weigh" in name for name in operators.names)
        assert not operators.gradients
        assert not value.requires_grad
        assert_same_value(value, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_inference_tensors_are_accepted(loss: str, backend: str, device: torch.device) -> None:
    expected = LOSSES[loss](*make_inputs(device), backend=backend)
    with torch.inference_mode():
        inputs = [t.detach().clone() for t in make_inputs(device)]
        value = LOSSES[loss](*inputs, backend=backend)
    assert_same_value(value, expected.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_backward_gives_the_same_gradients(
    loss: str, backend: str, reduction: str, device: torch.device
) -> None:
    inputs = make_inputs(device)
    value = LOSSES[loss](*inputs, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    tripled = torch.autograd.grad(3 * value, inputs, retain_graph=True)
    second = torch.autograd.grad(value, inputs)
    for one, three, two in zip(first, tripled, second, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, 3 * one)
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        torch.autograd.grad(value, inputs)


def test_gradients_accumulate_and_do_not_alias(backend: str, device: torch.device) -> None:
    # Two backwards must not return the same memory, because `.grad` is added to in place.
    inputs = make_inputs(device)
    for loss in (clip_loss, siglip_loss):
        value = loss(*inputs, backend=backend)
        once = torch.autograd.grad(value, inputs, retain_graph=True)
        kept = [t.clone() for t in once]
        for t in inputs:
            t.grad = None
        value.backward(retain_graph=True)
        value.backward(retain_graph=True)
        for t, before, g in zip(inputs, kept, once, strict=True):
            assert torch.equal(t.grad, 2 * before)
            assert torch.equal(g, before)
            g.zero_()  # a caller may change its gradient in place
        # If the next backward would read that memory, it must raise; a silent zero is wrong.
        try:
            again = torch.autograd.grad(value, inputs)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_raises_a_clear_error(
    loss: str, engine: str, reduction: str, device: torch.device
) -> None:
    for requested in (INPUTS, ("dx",), ("dscale",)):
        inputs = [t for t in make_inputs(device, requested)]
        leaves = [t for t in inputs if t.requires_grad]
        value = LOSSES[loss](*inputs, reduction=reduction, backend=engine).sum()
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative|twice|double"):
            sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-3, -7.0, 65536.0, 1e20])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_proportional_to_the_upstream_gradient(
    loss: str, backend: str, reduction: str, factor: float, device: torch.device
) -> None:
    inputs = make_inputs(device)
    value = LOSSES[loss](*inputs, reduction=reduction, backend=backend)
    g = torch.linspace(-1, 1, N, device=device) if value.dim() else torch.tensor(1.0).to(device)
    gradients = torch.autograd.grad(value, inputs, g, retain_graph=True)
    scaled = torch.autograd.grad(value, inputs, factor * g)
    for one, other in zip(gradients, scaled, strict=True):
        largest = float(one.abs().max()) * abs(factor)
        torch.testing.assert_close(other, factor * one, rtol=2e-5, atol=2e-7 * largest)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_infinite_upstream_gradient_shows_in_the_gradients(
    loss: str, backend: str, reduction: str, value: float, device: torch.device
) -> None:
    # A GradScaler looks for infinite gradients.
    inputs = make_inputs(device)
    result = LOSSES[loss](*inputs, reduction=reduction, backend=backend)
    g = torch.ones_like(result)
    g[() if reduction == "mean" else 3] = value
    dx, dy, dscale, _ = torch.autograd.grad(result, inputs, g)
    assert not dx.isfinite().all() and not dy.isfinite().all() and not dscale.isfinite()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_are_not_finite_show_in_the_result(
    loss: str, backend: str, bad: float, device: torch.device
) -> None:
    inputs = make_inputs(device)
    with torch.no_grad():
        inputs[0][5, 3] = bad
    value = LOSSES[loss](*inputs, backend=backend)
    assert not value.isfinite()
    value.backward()
    # The sigmoid of an infinite logit is 0 or 1, which leaves the image gradients finite.
    assert not inputs[1].grad.isfinite().all()
    assert loss == "siglip" or not inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gradient_scaler_skips_the_step_that_overflows(
    loss: str, backend: str, device: torch.device
) -> None:
    x, y, scale, bias = make_inputs(device)
    optimizer = torch.optim.SGD([x, y, scale, bias], lr=0.1)
    exact = torch.autograd.grad(LOSSES[loss](x, y, scale, bias, backend=backend), (x, y, scale))
    # Only the first scale factor takes gradients beyond float16's largest number, 65,504.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-28)
    before = x.detach().clone()
    for skipped in (True, False):
        optimizer.zero_grad()
        value = LOSSES[loss](x.half(), y.half(), scale, bias, backend=backend)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if not skipped:
            for t, g in zip((x, y, scale), exact, strict=True):
                torch.testing.assert_close(t.grad, g, rtol=0, atol=float(g.abs().max()) / 1000)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(x, before) == skipped
