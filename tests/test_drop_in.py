"""open_clip's contract, line by line, with open_clip's real classes as the other side."""

import copy
import inspect
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from open_clip_import import import_open_clip
from torch import Tensor, nn

import fastclip.loss
from fastclip.loss import ClipLoss, SigLipLoss

N, D = 19, 16
NAMES = ("ClipLoss", "SigLipLoss")


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return import_open_clip().loss


def ours_of(name: str) -> type[nn.Module]:
    return getattr(fastclip.loss, name)


def model_out(
    device: torch.device, scale_shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What an open_clip model returns: normalised features, exponentiated scale, bias."""
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
    """Same value, same gradients of everything."""
    found = []
    for module in (one, other):
        value = module(**out)
        found.append((value, *torch.autograd.grad(value, list(out.values()), allow_unused=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Constructor and call


@pytest.mark.parametrize("name", NAMES)
def test_constructors_and_forwards_have_open_clips_parameters(
    name: str, theirs: ModuleType
) -> None:
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        ours = inspect.signature(getattr(ours_of(name), method)).parameters.values()
        wanted = inspect.signature(getattr(getattr(theirs, name), method)).parameters.values()
        described = [(p.name, p.kind, p.default) for p in ours]
        expected = [(p.name, p.kind, p.default) for p in wanted]
        assert described[: len(expected)] == expected, method
        # What newer versions added must be optional.
        assert all(
            default is not inspect.Parameter.empty for *_, default in described[len(expected) :]
        )


def test_constructor_arguments_become_attributes(theirs: ModuleType) -> None:
    cases = [
        ("ClipLoss", (True, True, True, 0, 1, False), {}),
        ("ClipLoss", (), {"local_loss": True, "rank": 0, "world_size": 1, "cache_labels": True}),
        ("SigLipLoss", (True, 0, 1, "gather"), {}),
        ("SigLipLoss", (), {"dist_impl": "shift", "cache_labels": True}),
        ("SigLipLoss", (), {"dist_impl": None}),
    ]
    for name, positional, keywords in cases:
        ours = ours_of(name)(*positional, **keywords)
        for attribute, value in vars(getattr(theirs, name)(*positional, **keywords)).items():
            if not attribute.startswith("_"):
                assert getattr(ours, attribute) == value, attribute


def test_siglip_accepts_the_newer_chunk_size(device: torch.device) -> None:
    compare(SigLipLoss(), SigLipLoss(chunk_size=8), model_out(device))


def test_open_clips_factory_builds_it(monkeypatch: pytest.MonkeyPatch, theirs: ModuleType) -> None:
    from open_clip import factory

    arguments = Namespace(
        distill=False, model="ViT-B-32", siglip=False, local_loss=True, gather_with_grad=True,
        rank=0, world_size=1, horovod=False, loss_dist_impl=None,
    )  # fmt: skip
    for name in NAMES:
        monkeypatch.setattr(factory, name, ours_of(name))
    assert type(factory.create_loss(arguments)) is ClipLoss
    arguments.siglip = True
    assert type(factory.create_loss(arguments)) is SigLipLoss


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_open_clips(
    name: str, device: torch.device, theirs: ModuleType
) -> None:
    out = model_out(device)
    compare(ours_of(name)(), getattr(theirs, name)(), out)
    # As they come: features are not normalised again.
    out["image_features"] = (3 * out["image_features"]).detach().requires_grad_()
    compare(ours_of(name)(), getattr(theirs, name)(), out)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_called_as_trainers_call_it(name: str, device: torch.device) -> None:
    out, loss = model_out(device), ours_of(name)()
    value = loss(**out)
    assert value.shape == ()
    as_dict = loss(**out, output_dict=True)
    assert list(as_dict) == ["contrastive_loss"]
    torch.testing.assert_close(sum(as_dict.values()), value)
    positional = tuple(out.values())
    torch.testing.assert_close(loss(*positional), value)
    torch.testing.assert_close(loss(*positional, True)["contrastive_loss"], value)
    assert loss(*positional, output_dict=False).shape == ()


def test_clip_takes_models_without_a_bias(device: torch.device, theirs: ModuleType) -> None:
    out = model_out(device)
    del out["logit_bias"]
    compare(ClipLoss(), theirs.ClipLoss(), out)
    assert list(ClipLoss()(**out, output_dict=True)) == ["contrastive_loss"]
    torch.testing.assert_close(ClipLoss()(*out.values()), ClipLoss()(**out, logit_bias=None))


def test_siglip_takes_a_bias_that_is_none(device: torch.device, theirs: ModuleType) -> None:
    x, y, scale, _ = model_out(device).values()
    torch.testing.assert_close(
        SigLipLoss()(x, y, scale, None), theirs.SigLipLoss()(x, y, scale, None)
    )


# State


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_no_state(name: str, device: torch.device) -> None:
    loss = ours_of(name)(cache_labels=True)
    loss(**model_out(device))
    assert loss.state_dict() == {}
    assert not list(loss.parameters()) and not list(loss.buffers())
    loss.load_state_dict({}, strict=True)
    holder = nn.Sequential(nn.Linear(2, 2), loss)
    holder.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict(), strict=True)
    assert loss.to(device).half().eval().train() is loss


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_pickled_and_copied(name: str, device: torch.device) -> None:
    loss = ours_of(name)(cache_labels=True)
    out = model_out(device)
    value = loss(**out)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), copy.copy(loss)):
        assert type(other) is type(loss) and other.cache_labels
        assert torch.equal(other(**out), value)


# What subclasses rely on


def test_dense_logits_and_labels_are_open_clips(device: torch.device, theirs: ModuleType) -> None:
    x, y, scale, bias = model_out(device).values()
    for given in (None, bias):
        ours = ClipLoss().get_logits(x, y, scale, given)
        dense = theirs.ClipLoss().get_logits(x, y, scale, given)
        for one, other in zip(ours, dense, strict=True):
            torch.testing.assert_close(one, other)
        ours = SigLipLoss().get_logits(x, y, scale, logit_bias=given)
        torch.testing.assert_close(
            ours, theirs.SigLipLoss().get_logits(x, y, scale, logit_bias=given)
        )
    labels = ClipLoss().get_ground_truth(device, N)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, theirs.ClipLoss().get_ground_truth(device, N))
    for dtype in (torch.float32, torch.bfloat16):
        for negative_only in (False, True):
            arguments = (device, dtype, N, negative_only)
            signs = SigLipLoss().get_ground_truth(*arguments)
            assert signs.dtype == dtype
            assert torch.equal(signs, theirs.SigLipLoss().get_ground_truth(*arguments))


def test_labels_are_cached_when_asked_for(device: torch.device) -> None:
    loss = ClipLoss()
    assert loss.labels == {} and loss.prev_num_logits == 0
    loss.get_ground_truth(device, N)
    assert loss.labels == {} and loss.prev_num_logits == 0
    loss = ClipLoss(cache_labels=True)
    first = loss.get_ground_truth(device, N)
    assert loss.get_ground_truth(device, N) is first
    assert loss.labels[device] is first and loss.prev_num_logits == N
    for n in (5, N, 5):
        assert torch.equal(loss.get_ground_truth(device, n), torch.arange(n, device=device))
        assert loss.prev_num_logits == n


def rebased(theirs: ModuleType, name: str) -> type[nn.Module]:
    """open_clip's own subclass, its source run with our class as the base."""
    namespace = vars(theirs) | {"ClipLoss": ClipLoss}
    exec(inspect.getsource(getattr(theirs, name)), namespace)
    return namespace[name]


def test_coca_loss_works_on_top(device: torch.device, theirs: ModuleType) -> None:
    x, y, scale, _ = model_out(device).values()
    logits = torch.randn(N, 6, 30, device=device)
    labels = torch.randint(0, 30, (N, 6), device=device)
    for clip_weight in (0.5, 0):
        arguments = {
            "caption_loss_weight": 2.0,
            "clip_loss_weight": clip_weight,
            "cache_labels": True,
        }
        found = [
            kind(**arguments)(x, y, logits, labels, scale, output_dict=True)
            for kind in (rebased(theirs, "CoCaLoss"), theirs.CoCaLoss)
        ]
        assert list(found[0]) == list(found[1])
        for one, other in zip(*(f.values() for f in found), strict=True):
            torch.testing.assert_close(one, other)


def test_distillation_loss_works_on_top(device: torch.device, theirs: ModuleType) -> None:
    x, y, scale, _ = model_out(device).values()
    teacher = (torch.randn(N, 5, device=device), torch.randn(N, 5, device=device), 3.0)
    gradients = []
    for kind in (rebased(theirs, "DistillClipLoss"), theirs.DistillClipLoss):
        loss = kind(cache_labels=True)
        total = sum(loss(x, y, scale, *teacher, output_dict=True).values())
        gradients.append((total, *torch.autograd.grad(total, (x, y, scale))))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Numbers


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
def test_a_number_will_do_for_scale_and_bias(
    name: str, device: torch.device, theirs: ModuleType
) -> None:
    x, y, *_ = model_out(device).values()
    for scale in (14.25, 14, torch.tensor(14.25, device=device)):
        for bias in (-3.0, 0):
            value = ours_of(name)()(x, y, scale, bias)
            torch.testing.assert_close(value, getattr(theirs, name)()(x, y, scale, bias))
            assert all(g.any() for g in torch.autograd.grad(value, (x, y)))


def test_clips_bias_has_a_gradient_of_exactly_zero(device: torch.device) -> None:
    for requested in ("all", "bias alone"):
        out = model_out(device)
        if requested == "bias alone":
            out = {n: t.detach().requires_grad_(n == "logit_bias") for n, t in out.items()}
        ClipLoss()(**out).backward()
        gradient = out["logit_bias"].grad
        assert gradient is not None and torch.equal(gradient, torch.zeros_like(gradient))


def test_siglips_bias_has_a_real_gradient(device: torch.device, theirs: ModuleType) -> None:
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
def test_the_loss_is_float32_whatever_the_features(
    name: str, dtype: torch.dtype, expected: torch.dtype, device: torch.device
) -> None:
    out = model_out(device, dtype=dtype)
    value = ours_of(name)()(**out)
    assert value.dtype == expected and value.device.type == device.type
    value.backward()
    assert out["image_features"].grad.dtype == out["text_features"].grad.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_get_their_own_gradients(name: str, device: torch.device) -> None:
    out = model_out(device)
    exact = ours_of(name)()(**out)
    exact_gradient = torch.autograd.grad(exact, out["text_features"])[0]
    out["image_features"] = out["image_features"].detach().bfloat16().requires_grad_()
    value = ours_of(name)()(**out)
    value.backward()
    assert out["image_features"].grad.dtype == torch.bfloat16
    assert out["text_features"].grad.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out["text_features"].grad, exact_gradient, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_takes_features_in_its_dtype_and_logits_in_float32(
    name: str, device: torch.device
) -> None:
    out = model_out(device)
    with torch.autocast(device.type, torch.bfloat16):
        value = ours_of(name)()(**out)
    value.backward()
    assert value.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in out.values())
    rounded = model_out(device, dtype=torch.bfloat16)
    torch.testing.assert_close(value, ours_of(name)()(**rounded), rtol=1e-6, atol=0)
    assert not torch.equal(value, ours_of(name)()(**out))


# Import


ALONE = """
import sys, warnings
import torch
sys.modules["triton"] = None
sys.modules["fastclip._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastclip
    from fastclip.loss import clip_loss
    x = torch.ones(4, 3, requires_grad=True)
    for _ in range(3):
        clip_loss(x, x, 1.0).backward()
assert not torch.cuda.is_initialized()
assert fastclip.backends()["cpu"] != "available", fastclip.backends()
about_us = [str(w.message) for w in caught if "fastclip" in str(w.message)]
assert len(about_us) == 1, about_us
"""


def test_it_imports_and_runs_without_compiled_module_triton_or_cuda(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_subclass_with_logits_of_its_own_gets_their_loss() -> None:
    class Doubled(ClipLoss):
        def get_logits(self, *arguments: Tensor | float) -> tuple[Tensor, Tensor]:
            per_image, per_text = super().get_logits(*arguments)
            return 2 * per_image, 2 * per_text

    x, y = F.normalize(torch.randn(2, 6, 5), dim=-1)
    torch.testing.assert_close(Doubled()(x, y, 3.0), ClipLoss()(x, y, 6.0))
