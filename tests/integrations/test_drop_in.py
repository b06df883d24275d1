"""Our losses behave as open_clip's classes do."""

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
from support.drop_in import NAMES, N, compare, model_out, ours_of
from torch import Tensor, nn

from fastclip.engine.checks import scalar
from fastclip.loss import ClipLoss, SigLipLoss

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
        # Parameters that newer versions added must be optional.
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
    # Features are used as given: they are not normalised again.
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


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript, and warns of shape checks
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_has_gradients(name: str, device: torch.device) -> None:
    """A TorchScript graph serves every batch size, as those of open_clip's classes do."""
    out, loss = model_out(device), ours_of(name)()
    traced = torch.jit.trace(loss, tuple(out.values()))
    x, y = (F.normalize(torch.randn(2 * N, 5, device=device), dim=-1) for _ in range(2))
    inputs = [x.requires_grad_(), y.requires_grad_(), *list(out.values())[2:]]
    found = [
        (value, *torch.autograd.grad(value, inputs[:3]))
        for value in (traced(*inputs), loss(*inputs))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


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


# Methods that subclasses use


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
    """Returns open_clip's own subclass, with our class as its base."""
    namespace = vars(theirs) | {"ClipLoss": ClipLoss}
    exec(inspect.getsource(getattr(theirs, name)), namespace)
    return namespace[name]


def test_coca_loss_works_on_our_class(device: torch.device, theirs: ModuleType) -> None:
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
            loss_class(**arguments)(x, y, logits, labels, scale, output_dict=True)
            for loss_class in (rebased(theirs, "CoCaLoss"), theirs.CoCaLoss)
        ]
        assert list(found[0]) == list(found[1])
        for one, other in zip(*(f.values() for f in found), strict=True):
            torch.testing.assert_close(one, other)


def test_distillation_loss_works_on_our_class(device: torch.device, theirs: ModuleType) -> None:
    x, y, scale, _ = model_out(device).values()
    teacher = (torch.randn(N, 5, device=device), torch.randn(N, 5, device=device), 3.0)
    gradients = []
    for loss_class in (rebased(theirs, "DistillClipLoss"), theirs.DistillClipLoss):
        loss = loss_class(cache_labels=True)
        total = sum(loss(x, y, scale, *teacher, output_dict=True).values())
        gradients.append((total, *torch.autograd.grad(total, (x, y, scale))))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


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


def test_a_subclass_may_replace_the_logits() -> None:
    class Doubled(ClipLoss):
        def get_logits(self, *arguments: Tensor | float) -> tuple[Tensor, Tensor]:
            per_image, per_text = super().get_logits(*arguments)
            return 2 * per_image, 2 * per_text

    x, y = F.normalize(torch.randn(2, 6, 5), dim=-1)
    torch.testing.assert_close(Doubled()(x, y, 3.0), ClipLoss()(x, y, 6.0))


def test_a_sigmoid_subclass_may_replace_labels_or_logits() -> None:
    class Doubled(SigLipLoss):
        def get_logits(self, *arguments: Tensor | float) -> Tensor:
            return 2 * super().get_logits(*arguments)

    class Reversed(SigLipLoss):
        def get_ground_truth(self, *arguments: object, **options: object) -> Tensor:
            return -super().get_ground_truth(*arguments, **options)

    x, y = F.normalize(torch.randn(2, 6, 5), dim=-1)
    torch.testing.assert_close(Doubled()(x, y, 3.0, -2.0), SigLipLoss()(x, y, 6.0, -4.0))
    logits = 3.0 * x @ y.T - 2.0
    labels = 1 - 2 * torch.eye(6)
    torch.testing.assert_close(
        Reversed()(x, y, 3.0, -2.0), -F.logsigmoid(labels * logits).sum() / 6
    )


def test_a_scalar_on_the_cpu_is_moved_to_the_features_device() -> None:
    """torch's operators accept such a scalar, too, and reject one of shape [1]."""
    features = torch.empty(4, 3, device="meta")
    scale = torch.tensor(3.0, requires_grad=True)
    taken = scalar("logit_scale", scale, features)
    assert taken.device == features.device and taken.requires_grad
    with pytest.raises(ValueError, match="logit_scale must be on the features' device meta"):
        scalar("logit_scale", scale.reshape(1), features)
