"""Each mistake at the public door gets one error that says rule, expected and got."""

from typing import Any

import pytest
import torch
from conftest import DEVICE

import fastclip
from fastclip.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
X = torch.ones(4, 8, device=DEVICE)


def case(
    error: type[Exception], pattern: str, x: Any = X, y: Any = X, scale: Any = 1.0, **rest: Any
) -> tuple:
    return error, pattern, (x, y, scale), rest


def cases() -> dict[str, tuple]:
    meta = X.to("meta")
    both = r"image_features and text_features"
    return {
        "image rank": case(ValueError, r"image_features.*\(N, D\).*\(8,\)", x=X[0]),
        "text rank": case(ValueError, r"text_features.*\(N, D\).*\(1, 4, 8\)", y=X[None]),
        "scalar features": case(ValueError, r"image_features.*\(N, D\)", x=torch.tensor(1.0)),
        "feature size": case(ValueError, rf"{both}.*\(4, 8\).*\(4, 7\)", y=X[:, :7]),
        "batch size": case(ValueError, rf"{both}.*\(4, 8\).*\(3, 8\)", y=X[:3]),
        "empty batch": case(ValueError, r"empty.*\(0, 8\)", x=X[:0], y=X[:0]),
        "no features": case(ValueError, r"\(4, 0\)", x=X[:, :0], y=X[:, :0]),
        "device": case(ValueError, rf"{both}.*device.*cpu.*meta", y=meta),
        "integer image": case(TypeError, r"image_features.*float.*torch.int64", x=X.long()),
        "integer text": case(TypeError, r"text_features.*float.*torch.int32", y=X.int()),
        "bool features": case(TypeError, r"image_features.*float.*torch.bool", x=X.bool()),
        "complex features": case(TypeError, r"image_features.*float.*complex64", x=X.cfloat()),
        "8-bit features": case(
            TypeError, r"text_features.*float.*float8_e4m3fn", y=X.to(torch.float8_e4m3fn)
        ),
        "list": case(TypeError, r"image_features.*Tensor.*list", x=[[1.0]]),
        "array": case(TypeError, r"text_features.*Tensor.*ndarray", y=X.numpy()),
        "none": case(TypeError, r"image_features.*Tensor.*NoneType", x=None),
        "scale elements": case(ValueError, r"logit_scale.*one element.*\(8,\)", scale=X[0]),
        "empty scale": case(ValueError, r"logit_scale.*one element.*\(0,\)", scale=torch.ones(0)),
        "scale device": case(ValueError, r"logit_scale.*cpu.*meta", scale=meta[0, 0]),
        "scale type": case(TypeError, r"logit_scale.*number.*str", scale="14.3"),
        "no scale": case(TypeError, r"logit_scale.*number.*NoneType", scale=None),
        "integer scale": case(TypeError, r"logit_scale.*float.*int64", scale=torch.tensor(3)),
        "complex scale": case(TypeError, r"logit_scale.*float.*complex", scale=torch.tensor(1j)),
        "bias elements": case(ValueError, r"logit_bias.*one element.*\(8,\)", logit_bias=X[0]),
        "bias type": case(TypeError, r"logit_bias.*number.*list", logit_bias=[1.0]),
        "reduction": case(ValueError, r"reduction.*none.*mean.*sum.*'median'", reduction="median"),
        "no reduction": case(ValueError, r"reduction.*none.*mean.*sum.*None", reduction=None),
        "budget": case(ValueError, r"memory_budget.*bytes.*-1", memory_budget=-1),
        "budget type": case((TypeError, ValueError), r"memory_budget.*'1G'", memory_budget="1G"),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mistake_is_named(loss: str, backend: str, name: str) -> None:
    error, pattern, arguments, keywords = cases()[name]
    with pytest.raises(error, match=pattern):
        LOSSES[loss](*arguments, **keywords, backend=backend)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unknown_backend_is_answered_with_the_available_ones(
    loss: str, backends: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"backend.*'gpu'") as raised:
        LOSSES[loss](X, X, 1.0, backend="gpu")
    for name in backends:
        assert name in str(raised.value)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unavailable_backend_is_answered_with_the_reason(loss: str) -> None:
    reasons = {name: why for name, why in fastclip.backends().items() if why != "available"}
    if not reasons:
        pytest.skip("every backend is available here")
    for name, why in reasons.items():
        with pytest.raises(ValueError, match=rf"backend.*'{name}'") as raised:
            LOSSES[loss](X, X, 1.0, backend=name)
        text = str(raised.value)
        assert why in text and "available" in text
        assert "'torch'" in text and "'reference'" in text


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_dtensor_is_refused(loss: str, which: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(X.clone(), init_device_mesh("cpu", (1,)))
        features = [X, X]
        features[which] = sharded
        name = ("image_features", "text_features")[which]
        with pytest.raises(TypeError, match=rf"{name}.*DTensor.*(to_local|full_tensor)"):
            LOSSES[loss](*features, 1.0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_several_processes_need_a_group(module: type) -> None:
    with pytest.raises(RuntimeError, match=r"init_process_group first, got no initialised group"):
        module(world_size=2)(X, X, 1.0, None)


def test_horovod_is_refused() -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"use_horovod.*True"):
        ClipLoss(use_horovod=True)


def test_an_unknown_dist_impl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dist_impl.*bidir.*'star'"):
        SigLipLoss(dist_impl="star")


@pytest.mark.parametrize("loss", LOSSES)
def test_what_looks_odd_but_is_meant_is_accepted(loss: str, backend: str) -> None:
    subclass = torch.nn.Parameter(X.clone())
    for scale in (2, 2.0, torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2.0).double()):
        value = LOSSES[loss](subclass, X, scale, backend=backend, memory_budget=0)
        assert value.dtype == torch.float32 and value.shape == ()
