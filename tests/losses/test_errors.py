"""Each wrong argument of a public loss raises an error that states the rule and what was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from support.losses import LOSSES
from torch import Tensor

import fastclip
from fastclip.loss import ClipLoss, SigLipLoss

# Returns the wrong arguments that replace those of a correct call on features x (4, 8). It is a
# function of x, because a failing device must fail single tests and not their collection.
Mistake = Callable[[Tensor], dict[str, Any]]
BOTH = "image_features and text_features"


def images(change: Callable[[Tensor], Any]) -> Mistake:
    return lambda x: {"image_features": change(x)}


def texts(change: Callable[[Tensor], Any]) -> Mistake:
    return lambda x: {"text_features": change(x)}


def both(change: Callable[[Tensor], Any]) -> Mistake:
    return lambda x: {"image_features": change(x), "text_features": change(x)}


def scale(make: Callable[[Tensor], Any]) -> Mistake:
    return lambda x: {"logit_scale": make(x)}


def option(**options: Any) -> Mistake:
    return lambda x: options


CASES: dict[str, tuple[Any, str, Mistake]] = {
    "image rank": (ValueError, r"image_features.*\(N, D\).*\(8,\)", images(lambda x: x[0])),
    "text rank": (ValueError, r"text_features.*\(N, D\).*\(1, 4, 8\)", texts(lambda x: x[None])),
    "scalar features": (
        ValueError, r"image_features.*\(N, D\)", images(lambda x: torch.tensor(1.0))
    ),
    "feature size": (ValueError, rf"{BOTH}.*\(4, 8\).*\(4, 7\)", texts(lambda x: x[:, :7])),
    "batch size": (ValueError, rf"{BOTH}.*\(4, 8\).*\(3, 8\)", texts(lambda x: x[:3])),
    "empty batch": (ValueError, r"empty.*\(0, 8\)", both(lambda x: x[:0])),
    "no features": (ValueError, r"\(4, 0\)", both(lambda x: x[:, :0])),
    "device": (
        ValueError, rf"{BOTH}.*device.*{DEVICE.type}.*meta", texts(lambda x: x.to("meta"))
    ),
    "integer image": (TypeError, r"image_features.*float.*torch.int64", images(Tensor.long)),
    "integer text": (TypeError, r"text_features.*float.*torch.int32", texts(Tensor.int)),
    "bool features": (TypeError, r"image_features.*float.*torch.bool", images(Tensor.bool)),
    "complex features": (TypeError, r"image_features.*float.*complex64", images(Tensor.cfloat)),
    "8-bit features": (
        TypeError, r"text_features.*float.*float8_e4m3fn",
        texts(lambda x: x.to(torch.float8_e4m3fn)),
    ),
    "list": (TypeError, r"image_features.*Tensor.*list", images(Tensor.tolist)),
    "array": (TypeError, r"text_features.*Tensor.*ndarray", texts(lambda x: x.cpu().numpy())),
    "none": (TypeError, r"image_features.*Tensor.*NoneType", images(lambda x: None)),
    "scale elements": (ValueError, r"logit_scale.*one element.*\(8,\)", scale(lambda x: x[0])),
    "empty scale": (ValueError, r"logit_scale.*one element.*\(0,\)", scale(lambda x: x[0, :0])),
    "scale device": (
        ValueError, rf"logit_scale.*{DEVICE.type}.*meta", scale(lambda x: x[0, 0].to("meta"))
    ),
    "scale type": (TypeError, r"logit_scale.*number.*str", option(logit_scale="14.3")),
    "no scale": (TypeError, r"logit_scale.*number.*NoneType", option(logit_scale=None)),
    "integer scale": (
        TypeError, r"logit_scale.*float.*int64", scale(lambda x: torch.tensor(3))
    ),
    "complex scale": (
        TypeError, r"logit_scale.*float.*complex", scale(lambda x: torch.tensor(1j))
    ),
    "bias elements": (
        ValueError, r"logit_bias.*one element.*\(8,\)", lambda x: {"logit_bias": x[0]}
    ),
    "bias type": (TypeError, r"logit_bias.*number.*list", option(logit_bias=[1.0])),
    "reduction": (
        ValueError, r"reduction.*none.*mean.*sum.*'median'", option(reduction="median")
    ),
    "no reduction": (ValueError, r"reduction.*none.*mean.*sum.*None", option(reduction=None)),
    "budget": (ValueError, r"memory_budget.*bytes.*-1", option(memory_budget=-1)),
    "budget type": ((TypeError, ValueError), r"memory_budget.*'1G'", option(memory_budget="1G")),
}  # fmt: skip


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.ones(4, 8, device=DEVICE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_wrong_argument_is_named_in_the_error(
    x: Tensor, loss: str, backend: str, name: str
) -> None:
    error, pattern, mistake = CASES[name]
    arguments = {"image_features": x, "text_features": x, "logit_scale": 1.0}
    with pytest.raises(error, match=pattern):
        LOSSES[loss](**arguments | mistake(x), backend=backend)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unknown_backend_raises_the_list_of_available_ones(
    x: Tensor, loss: str, backends: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"backend.*'gpu'") as raised:
        LOSSES[loss](x, x, 1.0, backend="gpu")
    for name in backends:
        assert name in str(raised.value)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unavailable_backend_raises_the_reason(x: Tensor, loss: str) -> None:
    reasons = {name: why for name, why in fastclip.backends().items() if why != "available"}
    if not reasons:
        pytest.skip("every backend is available here")
    for name, why in reasons.items():
        with pytest.raises(ValueError, match=rf"backend.*'{name}'") as raised:
            LOSSES[loss](x, x, 1.0, backend=name)
        text = str(raised.value)
        assert why in text and "available" in text
        assert "'torch'" in text and "'reference'" in text


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_dtensor_is_refused(x: Tensor, loss: str, which: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(x.clone(), init_device_mesh("cpu", (1,)))
        features = [x, x]
        features[which] = sharded
        name = ("image_features", "text_features")[which]
        with pytest.raises(TypeError, match=rf"{name}.*DTensor.*(to_local|full_tensor)"):
            LOSSES[loss](*features, 1.0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_several_processes_need_a_group(x: Tensor, module: type) -> None:
    with pytest.raises(RuntimeError, match=r"init_process_group first, got no initialised group"):
        module(world_size=2)(x, x, 1.0, None)


def test_horovod_is_refused() -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"use_horovod.*True"):
        ClipLoss(use_horovod=True)


def test_an_unknown_dist_impl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dist_impl.*bidir.*'star'"):
        SigLipLoss(dist_impl="star")


@pytest.mark.parametrize("loss", LOSSES)
def test_unusual_but_valid_arguments_are_accepted(x: Tensor, loss: str, backend: str) -> None:
    subclass = torch.nn.Parameter(x.clone())
    for scale in (2, 2.0, torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2.0).double()):
        value = LOSSES[loss](subclass, x, scale, backend=backend, memory_budget=0)
        assert value.dtype == torch.float32 and value.shape == ()
