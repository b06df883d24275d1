"""Scale and bias of any shape, dtype or Python type, and features of any dtype, are accepted."""

from types import ModuleType

import pytest
import torch
from support.drop_in import NAMES, compare, model_out, ours_of

from fastclip.loss import ClipLoss, SigLipLoss


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scale_and_bias_keep_their_shape(
    name: str, shape: tuple[int, ...], device: torch.device, theirs: ModuleType
) -> None:
    out = model_out(device, shape)
    value = ours_of(name)()(**out)
    assert value.shape == ()
    value.backward()
    assert out["logit_scale"].grad.shape == shape and out["logit_bias"].grad.shape == shape
    compare(ours_of(name)(), getattr(theirs, name)(), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scale_and_bias_keep_their_dtype(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    out = model_out(device)
    out["logit_scale"], out["logit_bias"] = (
        torch.tensor(t, dtype=dtype, device=device, requires_grad=True) for t in (14.25, -3.0)
    )
    value = ours_of(name)()(**out)
    assert value.dtype == torch.float32
    value.backward()
    assert out["logit_scale"].grad.dtype == dtype and out["logit_bias"].grad.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_bias_may_be_python_numbers(
    name: str, device: torch.device, theirs: ModuleType
) -> None:
    x, y, *_ = model_out(device).values()
    for scale in (14.25, 14, torch.tensor(14.25, device=device)):
        for bias in (-3.0, 0):
            value = ours_of(name)()(x, y, scale, bias)
            torch.testing.assert_close(value, getattr(theirs, name)()(x, y, scale, bias))
            assert all(g.any() for g in torch.autograd.grad(value, (x, y)))


def test_the_gradient_of_clips_bias_is_exactly_zero(device: torch.device) -> None:
    for requested in ("all", "bias alone"):
        out = model_out(device)
        if requested == "bias alone":
            out = {n: t.detach().requires_grad_(n == "logit_bias") for n, t in out.items()}
        ClipLoss()(**out).backward()
        gradient = out["logit_bias"].grad
        assert gradient is not None and torch.equal(gradient, torch.zeros_like(gradient))


def test_the_gradient_of_siglips_bias_equals_open_clips(
    device: torch.device, theirs: ModuleType
) -> None:
    out = model_out(device)
    SigLipLoss()(**out).backward()
    assert out["logit_bias"].grad.abs() > 1e-3
    compare(SigLipLoss(), theirs.SigLipLoss(), out)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_half_precision_features_is_float32(
    name: str, dtype: torch.dtype, expected: torch.dtype, device: torch.device
) -> None:
    out = model_out(device, dtype=dtype)
    value = ours_of(name)()(**out)
    assert value.dtype == expected and value.device.type == device.type
    value.backward()
    assert out["image_features"].grad.dtype == out["text_features"].grad.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_has_the_dtype_of_its_input(name: str, device: torch.device) -> None:
    out = model_out(device)
    exact = ours_of(name)()(**out)
    exact_gradient = torch.autograd.grad(exact, out["text_features"])[0]
    out["image_features"] = out["image_features"].detach().bfloat16().requires_grad_()
    value = ours_of(name)()(**out)
    value.backward()
    assert out["image_features"].grad.dtype == torch.bfloat16
    assert out["text_features"].grad.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=5e-4, atol=0)
    torch.testing.assert_close(out["text_features"].grad, exact_gradient, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_features_but_not_logits(name: str, device: torch.device) -> None:
    out = model_out(device)
    with torch.autocast(device.type, torch.bfloat16):
        value = ours_of(name)()(**out)
    value.backward()
    assert value.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in out.values())
    rounded = model_out(device, dtype=torch.bfloat16)
    torch.testing.assert_close(value, ours_of(name)()(**rounded), rtol=1e-6, atol=0)
    assert not torch.equal(value, ours_of(name)()(**out))
