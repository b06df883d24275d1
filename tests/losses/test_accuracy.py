"""Every engine is at least as accurate as plain PyTorch in the same dtype, on every hard input.

Compared are the value and every gradient, for the mean and for per-pair losses with their own
upstream gradients. On well separated pairs every engine is far more accurate than plain PyTorch.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.hard_inputs import BATCHES, batch
from support.judge import PRECISIONS, QUANTITIES, allowance, error, evaluate, plain, truth
from support.losses import LOSSES
from support.oracle import Truth
from torch import Tensor

SCALES = (0.0, 1e-3, 1.0, 14.3, 100.0, 112.3, 1e4, -14.3)
BIAS = -3.0
N, D = 131, 24  # several tiles in every direction, and a multiple of no tile size


@functools.cache
def arguments(batch_name: str, reduction: str) -> dict:
    upstream = np.float64(1)
    if reduction == "none":  # gradients of either sign, some of them zero
        upstream = np.random.default_rng(7).normal(size=N).astype(np.float32).astype(np.float64)
        upstream[::9] = 0
    return {"normalize": batch_name == "zero_rows", "reduction": reduction, "upstream": upstream}


@functools.cache
def judges(
    loss: str, batch_name: str, precision: str, scale: float, reduction: str, device: torch.device
) -> tuple[Truth, dict[str, Tensor]]:
    """Returns the truth and plain torch's result, which every engine is compared with."""
    case = (*batch(batch_name, N, D), scale, BIAS, PRECISIONS[precision])
    options = arguments(batch_name, reduction)
    return truth(loss, *case, **options), evaluate(plain(loss), *case, device, **options)


def zero(features: NDArray, name: str, batch_name: str) -> NDArray | None:
    """Returns the rows of a gradient that belong to zero features, or None without such rows."""
    return ~features.any(1) if batch_name == "zero_rows" and name in ("dx", "dy") else None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_is_at_least_as_accurate_as_plain_torch(
    loss: str,
    engine: str,
    precision: str,
    batch_name: str,
    scale: float,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    p = PRECISIONS[precision]
    x, y = batch(batch_name, N, D)
    for reduction in ("mean", "none"):
        exact, torchs = judges(loss, batch_name, precision, scale, reduction, device)
        options = arguments(batch_name, reduction)
        ours = evaluate(LOSSES[loss], x, y, scale, BIAS, p, device, backend=engine, **options)
        for name in QUANTITIES:
            result, zeros = ours[name], zero(y if name == "dy" else x, name, batch_name)
            # The gradients of zero rows are divided by the norm's epsilon. They are judged apart,
            # because in a common norm they would hide all other rows.
            for rows in (...,) if zeros is None else (zeros, ~zeros):
                if rows is zeros and result.dtype == torch.float16:
                    assert not result[rows].any(), f"{name}: a zero row's must be 0 in float16"
                    continue
                eps = allowance(name, exact, p, result.dtype, rows)
                right = getattr(exact, name)[rows]
                what = f"{name} ({reduction})"
                assert_accurate(result[rows], torchs[name][rows], right, eps, what)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "mixed", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_only_features_are_rounded_to_half_precision(
    loss: str, engine: str, precision: str, device: torch.device
) -> None:
    # Logits, loss and sums are accurate to float32. Plain torch rounds logits to half precision.
    p = PRECISIONS[precision]
    for batch_name in ("random", "cone", "separated", "lengths"):
        for scale in (1.0, 14.3, 100.0):
            exact, _ = judges(loss, batch_name, precision, scale, "mean", device)
            case = (*batch(batch_name, N, D), scale, BIAS, p)
            ours = evaluate(LOSSES[loss], *case, device, backend=engine)
            for name in ("loss", "dscale", "dbias"):
                eps = allowance(name, exact, p, ours[name].dtype)
                what = f"{name}, {batch_name}, {scale}"
                assert error(ours[name], getattr(exact, name)) <= eps, what


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_well_separated_pairs_are_accurate(
    loss: str, engine: str, device: torch.device
) -> None:
    # At scale 14.3 the form that cancels (softmax - 1) is off by 1e-4 in float32. The sigmoid has
    # no denominator: a bias of -7 separates its pairs.
    case = (*batch("separated", 512, 256), 14.3, -7.0, PRECISIONS["float32"])
    exact = truth(loss, *case)
    ours = evaluate(LOSSES[loss], *case, device, backend=engine)
    for name in QUANTITIES:
        assert error(ours[name], getattr(exact, name)) < 5e-6, name
    if loss == "clip":
        assert error(evaluate(plain(loss), *case, device)["dx"], exact.dx) > 3e-5
