"""The losses on the GPU engines are at least as accurate as plain PyTorch.

The tests compare the value and every gradient with the oracle, over scales, features and dtypes,
normalised by the loss or before it, for the mean and for per-pair losses with upstream gradients.
"""

import zlib

import numpy as np
import pytest
import torch
from conftest import DEVICE
from support.hard_inputs import batch
from support.judge import PRECISIONS, QUANTITIES, allowance, assert_accurate, evaluate, plain, truth
from support.losses import LOSSES

from fastclip.loss import clip_loss

# One shift may overflow before the switch redoes the sweep: only the final result counts.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SCALES = (0.0, 1e-3, 1.0, 14.3, 100.0, 112.3, 1e4)
BATCH_NAMES = ("random", "separated", "duplicates", "cone", "negative", "dominating", "lengths")
BIAS = -3.0


def check(
    engine: str, loss: str, batch_name: str, precision: str, scale: float, n: int = 33, d: int = 24,
    reduction: str = "mean", normalize: bool = False, memory_budget: int = 0,
) -> None:  # fmt: skip
    p = PRECISIONS[precision]
    case = (*batch(batch_name, n, d), scale, BIAS, p)
    upstream = np.float64(1)
    if reduction == "none":  # of any sign, some zero
        upstream = np.random.default_rng(7).normal(size=n).astype(np.float32).astype(np.float64)
        upstream[::9] = 0
    options = {"normalize": normalize, "reduction": reduction, "upstream": upstream}
    exact = truth(loss, *case, **options)
    theirs = evaluate(plain(loss), *case, DEVICE, **options)
    extra = {"backend": engine, "memory_budget": memory_budget}
    ours = evaluate(LOSSES[loss], *case, DEVICE, **options, **extra)
    for name in QUANTITIES:
        eps = allowance(name, exact, p, ours[name].dtype)
        what = f"{name}, {batch_name}, {reduction}, {normalize=}"
        assert_accurate(ours[name], theirs[name], getattr(exact, name), eps, what)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_is_at_least_as_accurate_as_plain_torch(
    gpu_engine: str, loss: str, precision: str, scale: float
) -> None:
    """Each case takes other features, another reduction and normalisation, in turn."""
    turn = zlib.crc32(f"{loss} {precision} {scale}".encode())
    for step in range(2):
        check(
            gpu_engine, loss, BATCH_NAMES[(turn + 3 * step) % len(BATCH_NAMES)], precision, scale,
            reduction=("mean", "none")[(turn + step) % 2], normalize=(turn // 2 + step) % 2 == 0,
        )  # fmt: skip


@pytest.mark.parametrize("precision", ["mixed", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_towers_of_two_dtypes(gpu_engine: str, loss: str, precision: str) -> None:
    check(gpu_engine, loss, "random", precision, 14.3)


@pytest.mark.parametrize("n, d", [(1, 1), (2, 7), (32, 64), (65, 96)])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes(gpu_engine: str, loss: str, n: int, d: int) -> None:
    check(gpu_engine, loss, "random", "bfloat16", 14.3, n, d)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_budget_keeps_products_or_gradients(gpu_engine: str, loss: str) -> None:
    """SigLIP keeps gradients until the backward, CLIP reads products back: both are right."""
    for budget in (33 * 16 * 4, 1 << 20):
        check(gpu_engine, loss, "random", "bfloat16", 14.3, memory_budget=budget)


def test_learnt_pairs_keep_their_gradient(gpu_engine: str) -> None:
    """`softmax - 1` would cancel on well separated pairs."""
    check(gpu_engine, "clip", "separated", "float32", 14.3, n=64, d=64)


def test_fp16_weights_do_not_underflow(gpu_engine: str) -> None:
    """Rows that are nearly learnt have weights far below fp16's smallest number, 6e-8."""
    x, y = (torch.from_numpy(t).to(DEVICE).half() for t in batch("separated", 65, 64))
    inputs = [t.requires_grad_() for t in (x, y)]
    clip_loss(*inputs, 20.0, backend=gpu_engine, memory_budget=0, reduction="sum").backward()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    clip_loss(*wide, 20.0, backend="reference", reduction="sum").backward()
    for one, other in zip(inputs, wide, strict=True):
        error = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 1e-2
