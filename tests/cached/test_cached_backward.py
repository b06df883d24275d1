"""`cached_step` with a trainer's own backward, and with a scaler."""

import pytest
import torch
from torch import Tensor, nn

from fastclip import cached_step
from fastclip.cached.gradients import surrogate
from fastclip.loss import clip_loss

N = 11


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(6, 4).to(dtype), nn.Linear(6, 4).to(dtype)
        self.logit_scale = nn.Parameter(torch.tensor(1.0).to(dtype))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.logit_scale.exp()


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.randn(2, N, 6, generator=torch.Generator().manual_seed(2)).to(dtype))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_it_is_called_once_for_each_micro_batch_with_the_loss() -> None:
    """A factor of the backward, such as 1 / accumulation steps, enters once everywhere."""
    model, seen = Model(), []
    value = cached_step(model, clip_loss, *data(), micro_batch=4)
    plain = gradients(model)
    model.zero_grad()

    def backward(scalar: Tensor) -> None:
        seen.append(scalar.detach())
        (scalar / 3).backward()

    assert cached_step(model, clip_loss, *data(), micro_batch=4, backward=backward) == value
    assert len(seen) == 3 and all(s == value and s.dim() == 0 for s in seen)
    for found, once in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(3 * found, once, rtol=1e-12, atol=0)


def test_parameters_of_the_loss_go_through_it() -> None:
    model, weight = Model(), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def loss(*outputs: Tensor) -> Tensor:
        return weight * clip_loss(*outputs)

    value = cached_step(model, loss, *data(), micro_batch=4,
                        backward=lambda scalar: (scalar / 4).backward())  # fmt: skip
    torch.testing.assert_close(weight.grad, value / weight.detach() / 4)


def test_two_towers_call_it_for_each() -> None:
    towers, seen = (nn.Linear(6, 4).double(), nn.Linear(6, 4).double()), []

    def backward(scalar: Tensor) -> None:
        seen.append(float(scalar.detach()))
        scalar.backward()

    cached_step(towers, clip_loss, *data(), micro_batch=(4, 6), shared=5.0, backward=backward)
    assert len(seen) == 3 + 2


def test_the_factor_is_not_rounded_to_half() -> None:
    x, gradient = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    x = x.clone().requires_grad_()
    (surrogate(torch.tensor(2.0), [x], [gradient], None) / 3).backward()
    assert torch.equal(x.grad, (gradient.float() * torch.tensor(1 / 3)).bfloat16())


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_scaler_keeps_gradients_of_fp16_features(with_scaler: bool) -> None:
    """Accelerate's backward scales the surrogate. The gradient of fp16 features is made before, and
    underflows without the scaler: here it is 6e-9 for a loss of this size."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model = Model(torch.float16)
    images, texts = data(torch.float16)

    def loss(*outputs: Tensor) -> Tensor:
        return 1e-7 * clip_loss(*outputs)

    exact = Model(torch.float64)
    exact.load_state_dict(model.state_dict())
    loss(*exact(images.double(), texts.double())).backward()
    cached_step(
        model, loss, images, texts, micro_batch=4, scaler=scaler if with_scaler else None,
        backward=lambda scalar: scaler.scale(scalar).backward(),
    )  # fmt: skip
    found, right = model.image.weight.grad.double() / 2**16, exact.image.weight.grad
    error = (found - right).norm() / right.norm()
    assert error < 0.01 if with_scaler else error > 0.5


def test_no_sync_is_entered_for_all_but_the_last() -> None:
    events: list[str] = []

    class Context:
        def __enter__(self) -> None:
            events.append("enter")

        def __exit__(self, *error: object) -> None:
            events.append("exit")

    def backward(scalar: Tensor) -> None:
        events.append("backward")
        scalar.backward()

    cached_step(Model(), clip_loss, *data(), micro_batch=4, backward=backward, no_sync=Context)
    assert events == ["enter", "backward", "exit"] * 2 + ["backward"]
