"""Both encodings of `cached_step` must be the same: what is replayed, and what is detected."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip import cached_step
from fastclip.loss import clip_loss

N = 10


class Noisy(nn.Module):
    """Towers whose images are masked by `draw(shape)`, as an augmentation does."""

    def __init__(self, draw: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(6, 4).to(dtype), nn.Linear(6, 4).to(dtype)
        self.draw = draw

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
        mask = torch.as_tensor(self.draw(images.shape)).to(images.dtype)
        return self.image(images * mask), self.text(texts), 5.0


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images, texts = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(2))
    return images.to(dtype), texts.to(dtype)


def by_python(shape: tuple[int, int]) -> list[list[bool]]:
    return [[random.random() > 0.3 for _ in range(shape[1])] for _ in range(shape[0])]


GLOBAL = {
    "numpy": lambda shape: np.random.random(shape) > 0.3,
    "Python": by_python,
    "torch": lambda shape: torch.rand(shape) > 0.3,
}


def seed() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


@pytest.mark.parametrize("generator", GLOBAL)
def test_global_generators_are_replayed(generator: str) -> None:
    """In micro-batches of 4, with one graph and with two encodings."""
    model = Noisy(GLOBAL[generator])
    seed()
    parts = [model(*rows) for rows in zip(*(t.split(4) for t in data()), strict=True)]
    value = clip_loss(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), 5.0)
    exact = torch.autograd.grad(value, list(model.parameters()))
    following = GLOBAL[generator]((2, 6))
    seed()
    assert cached_step(model, clip_loss, *data(), micro_batch=4) == value
    for p, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-14)
    assert np.array_equal(GLOBAL[generator]((2, 6)), following)


def own_generator() -> Any:
    own = np.random.default_rng(4)
    return lambda shape: own.random(shape) > 0.3


def counter(step: float) -> Any:
    calls = [0]

    def draw(shape: tuple[int, int]) -> Tensor:
        calls[0] += 1
        return torch.full(shape, 1 + step * calls[0])

    return draw


@pytest.mark.parametrize("draw", [own_generator(), counter(0.01)], ids=["generator", "counter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_randomness_is_an_error(draw: Any, dtype: torch.dtype) -> None:
    model = Noisy(draw, dtype)
    with pytest.raises(RuntimeError, match="got a difference in output 0 of micro-batch") as error:
        cached_step(model, clip_loss, *data(dtype), micro_batch=4)
    for word in ("generator of its own", "counter", "batch normalisations", "check=False"):
        assert word in str(error.value)
    cached_step(model, clip_loss, *data(dtype), micro_batch=4, check=False)


@pytest.mark.parametrize(
    "dtype, step", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-3)]
)
def test_rounding_is_no_error(dtype: torch.dtype, step: float) -> None:
    cached_step(Noisy(counter(step), dtype), clip_loss, *data(dtype), micro_batch=4)


def test_under_autocast_the_rounding_is_that_of_its_dtype() -> None:
    """The features are float32, but made of products of bfloat16."""

    def normalised(images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        x, y, scale = noisy(images, texts)
        return x.float(), y.float(), scale

    noisy = Noisy(counter(2e-3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(normalised, clip_loss, *data(torch.float32), micro_batch=4)
    with pytest.raises(RuntimeError):
        cached_step(normalised, clip_loss, *data(torch.float32), micro_batch=4)


def test_the_rounding_of_half_precision_towers_is_no_error() -> None:
    """Their features are float32, but made with parameters of bfloat16."""
    noisy = Noisy(counter(2e-3), torch.bfloat16)

    def normalised(images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        x, y, scale = noisy(images, texts)
        return x.float(), y.float(), scale

    cached_step(normalised, clip_loss, *data(torch.bfloat16), micro_batch=4)


def test_one_row_is_enough() -> None:
    """The largest difference of a row counts, not the average."""
    calls = [0]

    def draw(shape: tuple[int, int]) -> Tensor:
        calls[0] += 1
        mask = torch.ones(shape)
        mask[1] += 1e-4 * calls[0]
        return mask

    big = torch.randn(2, 400, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="image_features of micro-batch 0"):
        cached_step(
            Noisy(draw), clip_loss, *big, micro_batch=400,
            outputs={"image_features": 0, "text_features": 1, "logit_scale": 2},
        )  # fmt: skip


def test_the_rounding_of_a_row_of_zeros_is_no_error() -> None:
    """It is relative to the average row."""
    model, (images, texts), calls = Noisy(lambda shape: torch.ones(shape)), data(), [0]
    model.image.bias.data.zero_()
    images[3] = 0

    def rounded(images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        calls[0] += 1
        x, y, scale = model(images, texts)
        return x + 1e-12 * calls[0], y, scale

    cached_step(rounded, clip_loss, images, texts, micro_batch=4)


def test_a_shared_value_that_differs_is_an_error() -> None:
    model, calls = Noisy(lambda shape: torch.ones(shape)), [0]

    def drifting(images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        calls[0] += 1
        return *model(images, texts)[:2], torch.tensor(5.0 + calls[0])

    with pytest.raises(RuntimeError, match="output 2 of micro-batch"):
        cached_step(drifting, clip_loss, *data(), micro_batch=4)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_comparison_is_read_once_at_the_end() -> None:
    """On a GPU, each reading of a number would wait for the device."""
    model = Noisy(lambda shape: torch.ones(shape))
    with Operators() as operators:
        cached_step(model, lambda x, y, s: (s * x @ y.T).logsumexp(1).mean(), *data(),
                    micro_batch=4)  # fmt: skip
    reads = [k for k, name in enumerate(operators.names) if "_local_scalar_dense" in name]
    assert len(reads) == 1 and reads[0] > len(operators.names) - 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_spoilt_and_zero_features_are_no_difference(value: float) -> None:
    """The loss shows them; a scaler then skips the step."""
    images, texts = data()
    images[3] = value
    model = Noisy(lambda shape: torch.ones(shape))
    model.image.bias.data.zero_()
    found = cached_step(model, lambda *o: clip_loss(*o, normalize=True), images, texts,
                        micro_batch=4)  # fmt: skip
    assert bool(found.isfinite()) == (value == 0)


def test_features_that_become_infinite_are_a_difference() -> None:
    calls = [0]

    def draw(shape: tuple[int, int]) -> Tensor:
        calls[0] += 1
        return torch.full(shape, 1.0 if calls[0] < 4 else float("inf"))

    with pytest.raises(RuntimeError, match="output 0"):
        cached_step(Noisy(draw), clip_loss, *data(), micro_batch=4)


@pytest.mark.parametrize("place, name", [(0, "image_features"), (1, "text_features")])
def test_a_tower_that_differs_is_named(place: int, name: str) -> None:
    draw, linear = counter(0.01), nn.Linear(6, 4).double()
    towers: list[Any] = [linear, linear]
    towers[place] = lambda x: linear(x * draw(x.shape))
    with pytest.raises(RuntimeError, match=f"a difference in {name} of micro-batch ."):
        cached_step(tuple(towers), clip_loss, *data(), micro_batch=4, shared=5.0)
