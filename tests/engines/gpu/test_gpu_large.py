"""On a card, large batches, many chunks, strided rows and offsets beyond 32 bits are right."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from support.card_steps import FUSED, MIB, inputs, on_each, step
from support.dense_block import DTYPES
from support.gpu_engine_case import small_chunks
from support.judge import roundoff
from support.losses import LOSSES
from support.streamed_truth import truth
from torch import Tensor

from fastclip.engine import operators
from fastclip.engine.block import Block, Side, SweepResults, Upstream, Wanted

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or not FUSED, reason="needs a CUDA device and a fused engine for it"
)


class Large(NamedTuple):
    """A large batch. With normalize, the features also have two lengths."""

    loss: str
    dtype: str
    d: int
    scale: float
    normalize: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, self[:4])) + " raw" * self.normalize

    def leaves(self, n: int) -> list[Tensor]:
        leaves = inputs(n, self.d, DTYPES[self.dtype])
        with torch.no_grad():
            leaves[2].fill_(self.scale)
            if self.normalize:
                for tower in leaves[:2]:
                    tower *= 2 ** tower[:, :1].sign() * 1.5
        return leaves


LARGE = [
    Large("clip", "bfloat16", 128, 14.3),
    Large("clip", "bfloat16", 1000, 100.0, normalize=True),
    Large("clip", "bfloat16", 768, 500.0),  # one shift is not enough
    Large("clip", "float16", 520, 100.0),
    Large("clip", "float16", 1001, 14.3, normalize=True),
    Large("clip", "float32", 96, 100.0, normalize=True),
    Large("clip", "float32", 520, 14.3),
    Large("siglip", "bfloat16", 1001, 14.3, normalize=True),
    Large("siglip", "bfloat16", 520, 100.0),
    Large("siglip", "float16", 1000, 100.0, normalize=True),
    Large("siglip", "float32", 96, 14.3),
    Large("siglip", "float32", 1001, 100.0, normalize=True),
]


FP16_AT_500 = Large("clip", "float16", 520, 500.0)


def assert_is_right(case: Large, n: int, engine: str, **options: object) -> None:
    """Checks a batch with the tolerance that the arithmetic of its dtype needs."""
    # The tolerance is one half-precision weight's rounding: the errors of many do not add up.
    dtype = DTYPES[case.dtype]
    weights = roundoff(dtype) / 2 if dtype.itemsize == 2 else 0.0
    if engine == "triton" and dtype == torch.float16 and options.get("memory_budget"):
        weights += roundoff(torch.bfloat16) / 2  # kept weights are bf16
    assert_near(case.loss, case.leaves(n), weights, engine, normalize=case.normalize, **options)


def logits_error(leaves: list[Tensor]) -> float:
    """Returns the error of tensor cores in the largest logit of random unit features, which is six
    deviations from 0: they cut off half a unit in the last place of t for each 16 products (arXiv
    2403.00232). The CUDA engine's sweep with running maxima multiplies without tensor cores."""
    x, _, scale, _ = leaves
    if x.dtype.itemsize > 2:
        return 0.0
    d = x.shape[1]
    return 6 / d**0.5 * scale.item() * d / 16 * 2**-25


def assert_near(
    loss: str, leaves: list[Tensor], weights: float, engine: str, normalize: bool = False,
    **options: object,
) -> None:  # fmt: skip
    """Checks loss and gradients against float64. weights: the error of dx and dy that the rounding
    of weights may cause."""
    value, *results = step(loss, leaves, engine, normalize=normalize, **options)
    exact, *gradients = truth(loss, *leaves, normalize=normalize)
    assert (value - exact).abs() <= 4e-6 * exact
    logits = logits_error(leaves)
    for name, result, right in zip(("dx", "dy", "dscale"), results, gradients, strict=False):
        # The error of the exact gradient in this dtype. fp16 has fewer digits below 6e-5.
        stored = (right.to(result.dtype) - right).norm() / right.norm()
        error = (result.double() - right).norm() / right.norm()
        assert error <= stored + (logits if name == "dscale" else weights) + 2e-5, (
            f"{name} is off by {error:.1e}, stored {stored:.1e}"
        )
    if loss == "clip":
        assert not results[3]
    else:
        assert (results[3] - gradients[3]).abs() <= 2e-5 * gradients[3].abs()


@on_each
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_batches_are_right(case: Large, fused: str) -> None:
    """The batches have several chunks of weights, of the engine's own size."""
    assert_is_right(case, 12345, fused)


@on_each
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("budget", [0, 64 * MIB])
@pytest.mark.parametrize("case", [*LARGE[1:4], FP16_AT_500, LARGE[7]], ids=str)
def test_many_chunks_are_right(
    case: Large, budget: int, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are also right if some rows are kept, and if what was kept is of no use."""
    with small_chunks(fused, monkeypatch, 1024, 2048):
        assert_is_right(case, 7001, fused, memory_budget=budget)


def one_row(t: Tensor) -> Tensor:
    """Returns the first row, expanded: its stride is 0."""
    return t[:1].expand(t.shape)


def of_wider_rows(t: Tensor) -> Tensor:
    """Returns the same rows within a wider tensor, between NaNs that would spoil every result."""
    wide = t.new_full((len(t), t.shape[1] + 128), torch.nan)
    wide[:, 64:-64] = t
    return wide[:, 64:-64]


@on_each
@pytest.mark.parametrize("budget", [0, 2 * MIB])
@pytest.mark.parametrize("laid", [one_row, of_wider_rows])
@pytest.mark.parametrize("loss", LOSSES)
def test_plain_tiles_of_strided_rows(
    loss: str, laid: Callable[[Tensor], Tensor], budget: int, fused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Kernels for whole tiles find the rows of either tower by the strides of a descriptor."""
    if fused == "triton":
        from fastclip.triton_kernels import plan

        monkeypatch.setattr(plan, "SMALL_PAIRS", 0)
    for tower in (0, 1):
        leaves = Large(loss, "bfloat16", 520, 14.3).leaves(1500)
        leaves[tower] = laid(leaves[tower].detach()).requires_grad_()
        assert leaves[tower].stride() == ((0, 1) if laid is one_row else (648, 1))
        # Weights of equal rows round alike: their errors add up, and their sums less 1 cancel.
        assert_near(loss, leaves, 4 * roundoff(torch.bfloat16), fused, memory_budget=budget)


@on_each
def test_offsets_beyond_32_bits(fused: str) -> None:
    """If features have more than 2^31 numbers, the last rows have the same results as alone."""
    m, n, d, last = 4_200_000, 64, 512, 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.empty(m, d, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    y = torch.randn(n, d, device=DEVICE, generator=generator).to(torch.bfloat16)
    scale, gain = torch.tensor(0.1, device=DEVICE), torch.ones((), device=DEVICE)
    block = Block(Side(x), Side(y), scale)
    state, positive, kept = operators.sweep(fused, block)
    alone, _, _ = operators.sweep(fused, block._replace(x=Side(x[-last:]), offset=-last))
    rows = state[1, m - last : m].log2() + state[0, m - last : m]
    torch.testing.assert_close(rows, alone[1, :last].log2() + alone[0, :last], rtol=0, atol=1e-4)

    # The coefficients give weights of order 1 / N in every row.
    a = state[1].reciprocal()
    p = torch.zeros(m, dtype=torch.float64, device=DEVICE)
    wanted = Wanted(True, False, False, False, x.dtype, y.dtype)

    def gradient(rows: slice) -> Tensor:
        every = torch.arange(m + n, device=DEVICE)
        lines = torch.cat((every[:m][rows], every[m:]))
        return operators.weigh(
            fused, block._replace(x=Side(x[rows]), offset=-m),
            SweepResults(state[:, lines].contiguous(), positive[rows], kept),
            Upstream(a[lines], p[rows], gain), wanted,
        ).x  # fmt: skip

    whole, alone = gradient(slice(None))[-last:].double(), gradient(slice(m - last, m)).double()
    # The library may choose another kernel for another size: the last digit in bf16 may differ.
    assert alone.norm() > 1
    assert (whole - alone).norm() <= 2**-8 * alone.norm()
