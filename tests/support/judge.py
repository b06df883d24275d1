"""Judges results by their errors against the truth, and by those of plain PyTorch.

`evaluate` runs a loss forward and backward, `plain` is the loss as users write it with PyTorch, and
`allowance` is the error that no computation in the given arithmetic can avoid. The module does not
depend on any engine.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from support.oracle import TRUTHS, Truth, rounded
from torch import Tensor

QUANTITIES = ("loss", "dx", "dy", "dscale", "dbias")


@dataclass(frozen=True)
class Precision:
    """The dtypes of both towers in a test case, and of autocast if it is on."""

    x: torch.dtype
    y: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def scalars(self) -> torch.dtype:
        """The dtype of the loss, the scale and the bias."""
        return torch.float64 if torch.float64 in (self.x, self.y) else torch.float32

    @property
    def product(self) -> torch.dtype:
        """The dtype in which the towers are multiplied."""
        return self.autocast or torch.promote_types(self.x, self.y)

    def context(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()


PRECISIONS = {
    "float64": Precision(torch.float64, torch.float64),
    "float32": Precision(torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "float16": Precision(torch.float16, torch.float16),
    "mixed": Precision(torch.bfloat16, torch.float32),
    "autocast": Precision(torch.float32, torch.float32, autocast=torch.bfloat16),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def truth(
    loss: str,
    x: NDArray,
    y: NDArray,
    scale: float,
    bias: float,
    precision: Precision,
    **arguments: object,
) -> Truth:
    """Returns the oracle's result for the inputs as rounded to this precision."""
    x, y = rounded(x, name_of(precision.x)), rounded(y, name_of(precision.y))
    if precision.autocast:
        x, y = (rounded(t, name_of(precision.autocast)) for t in (x, y))
    scale, bias = (float(rounded(t, name_of(precision.scalars))) for t in (scale, bias))
    # Float64 results need a truth in a longer type.
    wide = np.longdouble if precision.scalars == torch.float64 else np.float64
    return TRUTHS[loss](x, y, scale, bias, precision=wide, **arguments)


def evaluate(
    loss: Callable[..., Tensor],
    x: NDArray,
    y: NDArray,
    scale: float,
    bias: float,
    precision: Precision,
    device: torch.device,
    upstream: ArrayLike = 1.0,
    **arguments: object,
) -> dict[str, Tensor]:
    """Returns the loss and its gradients, by the names in QUANTITIES."""

    def leaf(value: ArrayLike, dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(np.asarray(value, np.float64), dtype=dtype, device=device)
        return tensor.requires_grad_()

    inputs = (
        leaf(x, precision.x),
        leaf(y, precision.y),
        leaf(scale, precision.scalars),
        leaf(bias, precision.scalars),
    )
    with precision.context(device):
        value = loss(*inputs, **arguments)
    g = torch.as_tensor(np.asarray(upstream, np.float64)).to(value).expand(value.shape)
    value.backward(g)
    return dict(zip(QUANTITIES, (value.detach(), *(t.grad for t in inputs)), strict=True))


def _plain_clip(logits: Tensor) -> Tensor:
    """Returns (N), the loss of each pair."""
    labels = torch.arange(len(logits), device=logits.device)
    rows = F.cross_entropy(logits, labels, reduction="none")
    return (rows + F.cross_entropy(logits.T, labels, reduction="none")) / 2


def _plain_siglip(logits: Tensor) -> Tensor:
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    pairs = -F.logsigmoid(labels * logits)
    return (pairs.sum(0) + pairs.sum(1)) / 2


PLAIN = {"clip": _plain_clip, "siglip": _plain_siglip}


def plain(loss: str) -> Callable[..., Tensor]:
    """Returns the dense loss as open_clip and its users write it, with all of torch's roundings."""
    of_pairs = PLAIN[loss]

    def plain_loss(
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        normalize: bool = False,
        reduction: str = "mean",
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        losses = of_pairs(scale * x @ y.T + bias)
        return {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}[reduction](losses)

    return plain_loss


def numbers(result: Tensor | NDArray) -> NDArray:
    return np.asarray(result.detach().double().cpu() if isinstance(result, Tensor) else result)


def error(result: Tensor | NDArray, exact: NDArray) -> float:
    """Returns the relative error in the Frobenius norm; inf if the result is not finite."""
    result = numbers(result)
    assert result.shape == exact.shape, f"shape {result.shape} instead of {exact.shape}"
    if not np.isfinite(result).all():
        return float("inf")
    difference, size = np.linalg.norm((result - exact).astype(float).ravel()), _size(exact)
    return float(difference / size) if size else (0.0 if difference == 0 else float("inf"))


def allowance(
    name: str, exact: Truth, precision: Precision, dtype: torch.dtype, rows: Any = ...
) -> float:
    """Returns the relative error of a careful computation.

    It is the sum of the errors of rounded logits, of rounded weights if these enter a
    half-precision product, and of the result's rounding to `dtype`.
    """
    # If one row is far longer than the others, the largest logit describes only that row.
    arithmetic = min(4 * roundoff(precision.scalars) * (1 + exact.largest_logit), 3e-3)
    # Most errors of a sum's many weights cancel; only products take weights in half precision.
    weights = roundoff(precision.product) if name in ("dx", "dy") else 0.0
    final = getattr(exact, name)[rows]
    storage = error(rounded(final, name_of(dtype)), final)
    return exact.conditions[name] * (arithmetic + weights) + storage


def assert_accurate(
    ours: Tensor, torch_same_dtype: Tensor, exact: NDArray, eps: float, what: str = "result"
) -> None:
    """Asserts `err(ours) <= err(torch) + eps`; an err(torch) of 0.1 or more counts as 0."""
    mistake, theirs = error(ours, exact), error(torch_same_dtype, exact)
    limit = eps + (theirs if theirs < 0.1 else 0.0)
    assert mistake <= limit, (
        f"{what}: relative error {mistake:.3e}, allowed {limit:.3e} (plain torch {theirs:.3e})"
    )


def _size(values: NDArray) -> float:
    return float(np.linalg.norm(np.asarray(values, float).ravel()))
