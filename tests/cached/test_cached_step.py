"""`cached_step`: the whole batch's gradients from micro-batches, dropout and all."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.open_clip_import import import_open_clip
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastclip import cached_step
from fastclip.loss import ClipLoss, DistillClipLoss, clip_loss, siglip_loss

N, WIDTH = 23, 12


class Model(nn.Module):
    """Two towers with dropout; `as_dict` returns a dictionary, as open_clip's models do."""

    def __init__(self, as_dict: bool = False, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (
            nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.as_dict = as_dict
        self.largest = 0

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        self.largest = max(self.largest, len(images))
        x, y = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        scale = self.logit_scale.exp()
        if self.as_dict:
            return {"image_features": x, "text_features": y, "logit_scale": scale}
        return x, y, scale


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(2, N, WIDTH, generator=generator, dtype=torch.float64)
    return images, texts


def in_one_graph(model: nn.Module, loss: Any, micro_batch: int) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of the same micro-batches with the same dropout, in one graph."""
    torch.manual_seed(7)
    parts = [model(*rows) for rows in zip(*(t.split(micro_batch) for t in data()), strict=True)]
    parts = [tuple(p.values()) if isinstance(p, dict) else p for p in parts]
    x, y = (torch.cat([p[index] for p in parts]) for index in (0, 1))
    value = loss(x, y, parts[-1][2])
    return value.detach(), list(torch.autograd.grad(value, list(model.parameters())))


def cached(model: nn.Module, loss: Any, micro_batch: int, **options: Any) -> tuple:
    torch.manual_seed(7)
    value = cached_step(model, loss, *data(), micro_batch=micro_batch, **options)
    return value, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 5, 23, 100])
@pytest.mark.parametrize("as_dict", [False, True], ids=["tuple", "dict"])
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss, ClipLoss()])
def test_gradients_are_those_of_the_batch(loss: Any, as_dict: bool, micro_batch: int) -> None:
    model = Model(as_dict).double()
    exact, gradients = in_one_graph(model, loss, micro_batch)
    value, found = cached(model, loss, micro_batch)
    assert value == exact and not value.requires_grad
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-13, atol=1e-14)


def test_no_more_than_a_micro_batch_is_encoded_at_once() -> None:
    model = Model().double()
    cached(model, clip_loss, 5)
    assert model.largest == 5


def test_random_numbers_go_on_as_after_one_encoding() -> None:
    model = Model().double()
    in_one_graph(model, clip_loss, 5)
    expected = torch.rand(3)
    cached(model, clip_loss, 5)
    assert torch.equal(torch.rand(3), expected)


def test_gradients_are_added_to() -> None:
    model = Model(dropout=0.0).double()
    _, once = cached(model, clip_loss, 5)
    once = [g.clone() for g in once]
    _, twice = cached(model, clip_loss, 5)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=2e-12, atol=1e-15)


def test_a_frozen_tower_gets_nothing() -> None:
    model = Model().double()
    model.text.requires_grad_(False)
    torch.manual_seed(7)
    cached_step(model, clip_loss, *data(), micro_batch=5)
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.image.parameters())


def test_a_tower_that_the_loss_ignores_gets_nothing() -> None:
    model = Model().double()
    cached_step(model, lambda x, y, scale: x.square().sum() * scale, *data(), micro_batch=5)
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.image.parameters())


def test_a_scaler_scales_once() -> None:
    model = Model(dropout=0.0).double()
    _, plain = cached(model, clip_loss, 5)
    plain = [g.clone() for g in plain]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    value, scaled = cached(model, clip_loss, 5, scaler=scaler)
    assert value < 10
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(1024 * one, other)


def test_within_autocast() -> None:
    model = Model(dropout=0.0)
    rows = [t.float() for t in data()]
    with torch.autocast("cpu", torch.bfloat16):
        clip_loss(*model(*rows)).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(model, clip_loss, *rows, micro_batch=5)
    for p, gradient in zip(model.parameters(), exact, strict=True):
        assert (p.grad - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.parametrize("kind", ["compiled", "checkpointed"])
def test_around_other_towers(kind: str) -> None:
    """Activation checkpointing replays dropout itself, within the second encoding."""
    model = Model(dropout=0.3 if kind == "checkpointed" else 0.0).double()
    exact, gradients = in_one_graph(model, clip_loss, 5)
    towers = nn.ModuleList((model.image, model.text))
    if kind == "compiled":
        model.image, model.text = (torch.compile(tower, backend="eager") for tower in towers)
    else:
        for tower in towers:
            tower.forward = functools.partial(checkpoint, tower.forward, use_reentrant=False)
    value, found = cached(model, clip_loss, 5)
    torch.testing.assert_close(value, exact)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_returns_the_value(mode: Any) -> None:
    model = Model().double()
    exact, _ = in_one_graph(model, clip_loss, 5)
    with mode():
        value, found = cached(model, clip_loss, 5)
    assert value == exact and all(g is None for g in found) and model.largest == 5


def test_without_gradients_inputs_may_have_a_graph() -> None:
    model, (images, texts) = Model(dropout=0.0).double(), data()
    exact = clip_loss(*model(images, texts)).detach()
    images = images.requires_grad_() * 1
    with torch.no_grad():
        value = cached_step(model, clip_loss, images, texts, micro_batch=5)
    torch.testing.assert_close(value, exact)


def test_a_loss_that_draws_goes_on_drawing() -> None:
    """The generators go on after the loss, not from the second encoding's start."""
    model, drawn = Model(dropout=0.0).double(), []

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        drawn.append(float(torch.rand(())))
        return clip_loss(x, y, scale)

    cached(model, loss, 5)
    cached_step(model, loss, *data(), micro_batch=5)
    torch.manual_seed(7)
    assert drawn == torch.rand(2).tolist()


def test_parameters_of_the_loss_get_gradients() -> None:
    model, weight = Model().double(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    own = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"a": weight * clip_loss(x, y, scale * own.exp()), "b": weight.square()}

    value = cached_step(model, loss, *data(), micro_batch=5)
    assert value > 0.49 and weight.grad > 1.4
    torch.testing.assert_close(own.grad, model.logit_scale.grad)


def test_around_an_open_clip_model() -> None:
    open_clip = import_open_clip()
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, text, output_dict=True).double()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    texts = torch.randint(1, 64, (7, 8))
    ClipLoss()(**model(images, texts)).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cached_step(model, ClipLoss(), images, texts, micro_batch=3)
    for name, gradient in exact.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-12, atol=2e-14)


def test_a_teacher_has_features_of_its_own() -> None:
    """open_clip's distillation: five outputs, of which four have a row for each pair."""
    student, teacher = (Model(as_dict, dropout=0.0).double() for as_dict in (False, True))
    teacher.requires_grad_(False)
    teacher.image[0].weight.mul_(2)

    def model(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        x, y, scale = student(images, texts)
        taught = {f"dist_{name}": value for name, value in teacher(images, texts).items()}
        return {"image_features": x, "text_features": y, "logit_scale": scale, **taught}

    def loss(**outputs: Tensor) -> Tensor:
        return sum(DistillClipLoss()(**outputs))

    exact = loss(**model(*data()))
    gradients = torch.autograd.grad(exact, list(student.parameters()))
    value = cached_step(model, loss, *data(), micro_batch=5)
    torch.testing.assert_close(value, exact.detach())
    for p, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-14)


def test_errors() -> None:
    model, (images, texts) = Model().double(), data()

    def refused(message: str, *inputs: Any, own: Any = model, loss: Any = clip_loss) -> None:
        with pytest.raises(ValueError, match=message):
            cached_step(own, loss, *(inputs or (images, texts)), micro_batch=4)
        assert all(p.grad is None for p in model.parameters())

    for wrong in (0, -1, 2.0, True, (2, 6)):
        with pytest.raises(ValueError, match=r"micro_batch must be at least 1, .* got "):
            cached_step(model, clip_loss, images, texts, micro_batch=wrong)
    refused(r"one number of rows, got inputs\[0\]: 23, inputs\[1\]: 22", images, texts[1:])
    refused("inputs must have tensors with a row for each pair, .* got none", 3)
    refused(r"got inputs\[1\] with MulBackward0", images, texts.requires_grad_() * 1)
    refused("one number such as logit_scale, got output 3 of shape \\(4,\\)",
            own=lambda x, y: (*model(x, y), torch.ones(len(x))))  # fmt: skip
    refused("a row for each of the 4 rows of a micro-batch, got output 0 of shape \\(1, 8\\)",
            own=lambda x, y: (model.image(x[:1]), *model(x, y)[1:]))  # fmt: skip
    refused("must return image_features and text_features, .* got dict with features",
            own=lambda x, y: {"features": x})  # fmt: skip
    refused(
        "must return a tensor, a tuple or a dictionary, .* got str", own=lambda x, y: "features"
    )
    refused("must return features .*, got tuple of a tensor of shape \\(\\)",
            own=lambda x, y: (torch.ones(()),))  # fmt: skip
    refused("must not be nested, got output 2, dict with a", own=lambda x, y: (x, y, {"a": x}))
    refused("the loss must return one number .*, got shape \\(23,\\)",
            loss=lambda x, y, s: clip_loss(x, y, s, reduction="none"))  # fmt: skip
    refused("the loss must depend on the model's outputs", loss=lambda x, y, s: torch.ones(()))
    refused("the same entries for every micro-batch", own=lambda x, y: model(x, y)[: len(x) - 1])
