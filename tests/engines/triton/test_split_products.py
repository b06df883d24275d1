"""fp32 products made of bf16 products: parts are exact, and tensor cores do not spoil the sums.

Tensor cores truncate (`tensor_core.py`). The fixture `modelled` replaces the interpreter's sums by
theirs, so that the tests judge the kernels under a card's arithmetic; like every engine, they must
not exceed plain torch's errors in fp32. Kernels that sum everything on tensor cores fail the same
tests. A card needs no model: it runs the tests with its own tensor cores.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import tensor_core
from support.dense_block import make_block
from support.gpu_engine_case import check, check_in_one_go, small_chunks
from support.hard_inputs import batch
from support.judge import (
    PRECISIONS,
    QUANTITIES,
    allowance,
    assert_accurate,
    error,
    evaluate,
    plain,
    truth,
)
from support.losses import LOSSES
from support.pretended_card import backends
from support.triton_case import needs_engine

from fastclip.engine import arithmetic

CORES = {"hopper": tensor_core.HOPPER, "ampere": tensor_core.AMPERE}
SPECIAL = (
    0.0, -0.0, 1.0, 1 + 2**-23, 1 - 2**-24, -(2 - 2**-23), 3.4028234663852886e38,
    -3.4028234663852886e38, 3.3961775292304601e38, 2.0**-126, 2.0**-120 * (2 - 2**-23), 1e-39,
)  # fmt: skip


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits fp32 features into parts, and lets no block be small: all kernels are launched."""
    from fastclip.triton_kernels import plan

    monkeypatch.setattr(arithmetic, "fp32", lambda: "split")
    monkeypatch.setattr(plan, "SMALL_PAIRS", 0)


@pytest.fixture
def modelled(monkeypatch: pytest.MonkeyPatch) -> Callable[[tensor_core.Core], None]:
    """Makes the interpreter sum like given tensor cores."""
    if not backends.interpreted():
        return lambda core: None
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def install(core: tensor_core.Core) -> None:
        def create_dot(self, a, b, d, *_):
            total = tensor_core.multiply(a.data, b.data, d.data, core)
            return TensorHandle(total, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

    return install


@pytest.fixture
def all_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes tensor cores sum all steps."""
    if not backends.interpreted():
        pytest.skip("kernels that are compiled cannot be changed")
    from support.summed_on_tensor_cores import add_product

    from fastclip.triton_kernels.kernels import split_gradients, tile

    def install() -> None:
        monkeypatch.setattr(tile, "add_product", add_product)
        monkeypatch.setattr(split_gradients, "add_product", add_product)

    return install


def parts_of(x: torch.Tensor) -> torch.Tensor:
    """Returns the parts that the kernel makes, (3, M, D); checks that it pads them with zeros."""
    from fastclip.triton_kernels import launch
    from fastclip.triton_kernels.kernels import bf16_parts, split_product

    (m, d), width = x.shape, split_product.padded(x.shape[1])
    out = x.new_full((m, 3 * width), torch.nan, dtype=torch.bfloat16)
    launch.launch(bf16_parts.to_parts_kernel, -(-m // 16), x, out, m, d, x.stride(0), width, 16, 32)
    out = out.view(m, 3, width).transpose(0, 1)
    assert not out[..., d:].any()
    return out[..., :d]


@needs_engine
def test_parts_add_up(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(33, 40)) * 10.0 ** rng.integers(-30, 30, size=(33, 40))
    x[0, : len(SPECIAL)] = SPECIAL
    x = torch.from_numpy(x.astype(np.float32)).to(device)
    parts = parts_of(x).double()
    mistake = (parts.sum(0) - x.double()).abs()
    normal = x.abs() >= 2.0**-110
    assert not mistake[normal].any()
    # The interpreter has no subnormals of bf16.
    assert mistake.max() <= (2.0**-125 if backends.interpreted() else 2.0**-134)
    # Each part is the rounded rest of the parts before it.
    assert (parts[1].abs() <= 2.0**-7 * parts[0].abs())[normal].all()
    assert (parts[2].abs() <= 2.0**-7 * parts[1].abs())[normal].all()


@needs_engine
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_show_in_parts(value: float, device: torch.device) -> None:
    x = torch.ones(3, 8, device=device)
    x[1, 5] = value
    parts = parts_of(x)
    assert parts[:, 1, 5].isnan().any() and parts[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_model_truncates(core: tensor_core.Core, sign: float) -> None:
    """Sums that fit are exact; others are truncated towards zero, at every step."""
    a, b = np.full((1, 64), sign), np.full((64, 1), 2.0**-8)
    assert tensor_core.multiply(a, b, None, core) == sign / 4
    b[0] = 2.0**8  # its last place is 2^-15; before rounding, 2^-17
    assert tensor_core.multiply(a, b, None, core) == sign * (2.0**8 + 63 * 2.0**-8)
    b[1:] = 2.0**-18
    assert tensor_core.multiply(a, b, None, core) == sign * 2.0**8
    assert a @ b - sign * 2.0**8 == sign * 63 * 2.0**-18


def test_the_model_has_infinities() -> None:
    assert np.isposinf(tensor_core.multiply([[np.inf, 1.0]], [[1.0], [1.0]]))
    assert np.isnan(tensor_core.multiply([[np.nan]], [[1.0]]))


def gradient_product(w: torch.Tensor, x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Returns w @ x by the kernel, from weights in the layout of the second sweep."""
    from fastclip.triton_kernels import launch
    from fastclip.triton_kernels.kernels import split_gradients, split_product

    (k, d), width = x.shape, split_product.padded(x.shape[1])
    stride = -(-w.shape[1] // 16) * 16
    weights = w.new_full((len(w), 3, stride), torch.nan, dtype=torch.bfloat16)
    weights[..., : -(-w.shape[1] // 8) * 8] = 0
    weights[..., : w.shape[1]] = parts_of(w).transpose(0, 1)
    features = x.new_zeros(k, 3, width, dtype=torch.bfloat16)
    features[..., :d] = parts_of(x).transpose(0, 1)
    out = x.new_full((w.shape[1] if transposed else len(w), d), torch.nan)
    launch.launch(
        split_gradients.split_gradient_kernel, -(-len(out) // 32) * -(-d // 32), weights, features,
        out, len(out), k, stride, d, D=d, WIDTH=width, TRANSPOSED=transposed, BEGINS=True, BM=32,
        BN=32, BK=32, GROUP=2,
    )  # fmt: skip
    return out


@pytest.fixture
def long_sums(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights and features of one sign: truncation, which never changes its direction,
    shows most."""
    rng = np.random.default_rng(1)
    w = torch.from_numpy(rng.exponential(size=(5, 520)).astype(np.float32))
    x = torch.from_numpy((rng.normal(size=(520, 8)) + 2).astype(np.float32))
    return w.to(device), x.to(device)


def mistake_of(product: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> float:
    """Returns the error of a product of w and x."""
    return error(product, (w.double() @ x.double()).cpu().numpy())


@needs_engine
@pytest.mark.parametrize("core", CORES)
def test_long_sums_are_as_accurate_as_fp32(
    modelled: Callable[[tensor_core.Core], None], long_sums: tuple[torch.Tensor, torch.Tensor],
    core: str,
) -> None:  # fmt: skip
    w, x = long_sums
    theirs = mistake_of(w @ x, w, x)
    modelled(CORES[core])
    for transposed in (False, True):
        ours = gradient_product(w.T.contiguous() if transposed else w, x, transposed)
        assert mistake_of(ours, w, x) <= 1.5 * theirs


@needs_engine
def test_long_sums_on_tensor_cores_are_less_accurate(
    modelled: Callable[[tensor_core.Core], None], all_on_tensor_cores: Callable[[], None],
    long_sums: tuple[torch.Tensor, torch.Tensor],
) -> None:  # fmt: skip
    w, x = long_sums
    modelled(tensor_core.HOPPER)
    all_on_tensor_cores()
    assert mistake_of(gradient_product(w, x, False), w, x) > 5 * mistake_of(w @ x, w, x)


CASES = [
    ("clip", "random", 100.0), ("clip", "separated", 14.3), ("clip", "cone", 1.0),
    ("siglip", "separated", 100.0), ("siglip", "lengths", 1.0),
]  # fmt: skip


def mistakes_of(
    loss: str, batch_name: str, scale: float, n: int, d: int, device: torch.device
) -> dict[str, str]:
    """Returns the errors in value and gradients that exceed those of plain torch in fp32."""
    case, found = (*batch(batch_name, n, d), scale, -3.0, PRECISIONS["float32"]), {}
    exact = truth(loss, *case)
    theirs = evaluate(plain(loss), *case, device)
    engine = functools.partial(LOSSES[loss], backend="triton")
    ours = evaluate(engine, *case, device)
    for name in QUANTITIES:
        eps = allowance(name, exact, case[-1], ours[name].dtype)
        try:
            assert_accurate(ours[name], theirs[name], getattr(exact, name), eps, name)
        except AssertionError as mistake:
            found[name] = str(mistake)
    return found


@needs_engine
@pytest.mark.parametrize("loss, batch_name, scale", CASES)
@pytest.mark.usefixtures("split")
def test_losses_are_as_accurate_as_in_fp32(
    modelled: Callable[[tensor_core.Core], None], loss: str, batch_name: str, scale: float,
    device: torch.device,
) -> None:  # fmt: skip
    modelled(tensor_core.HOPPER)
    assert not mistakes_of(loss, batch_name, scale, 33, 96, device)


@needs_engine
@pytest.mark.usefixtures("split")
def test_losses_on_tensor_cores_are_less_accurate(
    modelled: Callable[[tensor_core.Core], None], all_on_tensor_cores: Callable[[], None],
    device: torch.device,
) -> None:  # fmt: skip
    modelled(tensor_core.HOPPER)
    all_on_tensor_cores()
    assert "dx" in mistakes_of("clip", "separated", 100.0, 32, 512, device)


BLOCKS = [
    ((66, 70, 40), {"kind": "softmax", "factors": (True, False)}),
    ((66, 40, 7), {"kind": "sigmoid"}),
    ((33, 64, 33), {"kind": "softmax", "offset": 3, "scale": 500.0}),
]


@needs_engine
@pytest.mark.parametrize("sizes, options", BLOCKS)
@pytest.mark.usefixtures("split", "on_the_device")
def test_both_sweeps_are_right(sizes: tuple[int, ...], options: dict) -> None:
    check("triton", make_block(*sizes, **options), projects=(True, False))


@needs_engine
@pytest.mark.usefixtures("split", "on_the_device")
def test_kept_rows_and_chunks_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_chunks("triton", monkeypatch):
        check("triton", make_block(66, 40, 24, kind="softmax", offset=-2), keep=48)
        check_in_one_go("triton", make_block(34, 40, 24, kind="sigmoid", factors=(True, True)))


@needs_engine
@pytest.mark.usefixtures("split", "on_the_device")
def test_small_blocks_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.triton_kernels import plan

    monkeypatch.setattr(plan, "SMALL_PAIRS", 1 << 23)
    check("triton", make_block(37, 20, 24, kind="softmax"))


@needs_engine
@pytest.mark.usefixtures("split", "on_the_device")
def test_rows_may_begin_anywhere() -> None:
    """Parts are copies, so the features' rows may begin anywhere."""
    block = make_block(33, 40, 9)
    wide = torch.zeros(33, 22)
    wide[:, 1:19:2] = block.x
    check("triton", block._replace(x=wide[:, 1:19:2]))


@needs_engine
@pytest.mark.parametrize("n", [2048, 65536])
def test_the_cost_of_split_products(n: int) -> None:
    """The cost is six passes for one, and six bytes a number; memory is within the bounds."""
    from support import triton_cost

    from fastclip.triton_kernels import plan
    from fastclip.triton_kernels.configurations import TABLE

    d, table = 768, TABLE["sm_90"]
    first = triton_cost.sweep_cost(n, n, d, table["sweep", "split", "wide"], 4, 1, products=6)
    second = triton_cost.weigh_cost(n, n, d, table["weigh", "split", "wide"], 4, products=6)
    assert (first + second).flops == 4 * 6 * 2 * n * n * d
    one = triton_cost.weigh_cost(n, n, d, table["weigh", "split", "wide"], 6)
    assert second.bytes - one.bytes == 10 * 2 * n * d
    assert second.work_space <= plan.WEIGHT_BYTES + (4 + 4 + 12) * n * d
    kept = triton_cost.sweep_cost(n, n, d, table["kept", "split", "wide"], 4, 1, n, products=6)
    assert kept.bytes - first.bytes >= 4 * n * n
    # H100: cuBLAS runs one fp32 product at 50 TFLOP/s, against six bf16 products at 500.
    assert second.bytes / 3.35e12 < 0.3 * second.flops / 500e12
