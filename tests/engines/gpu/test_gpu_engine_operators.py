"""The GPU engines' operators under the compiler, autograd and autocast, and their errors.

A card runs `test_operators.py` for these engines, too. These tests take a few small cases.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import Block, make_block
from support.gpu_engine_case import enlarged
from torch import Tensor

from fastclip.loss import clip_loss, siglip_loss

on_the_device = pytest.mark.usefixtures("on_the_device")


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_they_are_operators_to_the_compiler(
    gpu_engine: str, loss: Callable[..., Tensor], device: torch.device
) -> None:
    """A compiled step is one graph without breaks, and has the same gradients."""

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return loss(x, y, scale, -1.0, backend=gpu_engine, memory_budget=0)

    with device:  # the compiler must not run in this context: it would trace it
        block = make_block(*enlarged(33, 33), 8)
    results = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (block.x, block.y, block.scale)]
        value = f(*leaves)
        value.backward()
        results.append([value.detach(), *(t.grad for t in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@on_the_device
def test_they_agree_with_their_fakes(gpu_engine: str) -> None:
    block = make_block(33, 33, 8)
    gain = torch.ones((), dtype=torch.float64)
    state, positive, kept = sweep(gpu_engine, block, 16)
    arguments = {
        "sweep": (*block.arguments, None, None, None, 16),
        "finish": (state, positive, block.scale, None, "softmax"),
        "weigh": (
            *block.arguments, state, positive, kept, state[1].reciprocal(), positive, gain, True,
            True, False, False, torch.float32, torch.bfloat16,
        ),
        "sweep_and_weigh": (*block._replace(kind="sigmoid").arguments, gain, True, False, False),
    }  # fmt: skip
    for name, values in arguments.items():
        torch.library.opcheck(
            operator(name, gpu_engine), values, test_utils=("test_schema", "test_faketensor")
        )


@on_the_device
def test_they_have_no_derivative(gpu_engine: str) -> None:
    block = make_block(9, 7, 4)
    block.x.requires_grad_()
    state, _, _ = sweep(gpu_engine, block)
    with pytest.raises(RuntimeError, match="derivative"):
        state.sum().backward()


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_does_not_reach_into_them(gpu_engine: str, dtype: torch.dtype) -> None:
    m, n = enlarged(33, 40)
    block = make_block(m, n, 24, dtype)

    def results() -> list[Tensor]:
        state, positive, _ = sweep(gpu_engine, block)
        return [state, positive, *weigh(gpu_engine, block, state, positive, weights)]

    weights = make_weights(sweep(gpu_engine, block)[0], m)
    outside = results()
    with torch.autocast(block.x.device.type, torch.bfloat16):
        inside = results()
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scalars_have_any_dtype_and_either_shape(gpu_engine: str, dtype: torch.dtype) -> None:
    """The values are exact in every dtype."""
    block = make_block(20, 24, 8, kind="sigmoid", scale=4.5, bias=-3.0)
    expected = sweep(gpu_engine, block)
    for shape in ((), (1,), (1, 1)):
        scale, bias = (t.to(dtype).reshape(shape) for t in (block.scale, block.bias))
        bound = torch.ones(shape, dtype=dtype)
        for result, truth in zip(
            sweep(gpu_engine, block._replace(scale=scale, bias=bias), bound=bound),
            expected, strict=True,
        ):  # fmt: skip
            assert torch.equal(result, truth)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Block], Any]]] = {
    "features that do not fit": (
        RuntimeError, r"non-empty \(M, D\) and \(N, D\) of one dtype, got",
        lambda b: {"y": b.y[:, :3]},
    ),
    "no rows": (RuntimeError, r"non-empty \(M, D\)", lambda b: {"x": b.x[:0]}),
    "two dtypes": (RuntimeError, "of one dtype", lambda b: {"x": b.x.half()}),
    "a factor too short": (
        RuntimeError, r"factor_x must be \(M\), factor_y \(N\)", lambda b: {"factor_x": b.y[:2, 0]},
    ),
    "two scales": (
        RuntimeError, "scale must have one element, got", lambda b: {"scale": b.x[0, :2]}
    ),
    "a kind of another name": (
        ValueError, "kind must be one of 'softmax', 'sigmoid', 'hinge', got 'none'",
        lambda b: {"kind": "none"},
    ),
    "integers": (
        TypeError, "features must be float64, float32, bfloat16 or float16",
        lambda b: {"x": b.x.int(), "y": b.y.int()},
    ),
}  # fmt: skip


@on_the_device
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(gpu_engine: str, mistake: str) -> None:
    error, pattern, change = MISTAKES[mistake]
    block = make_block(9, 7, 4)
    with pytest.raises(error, match=pattern):
        sweep(gpu_engine, block._replace(**change(block)))


@on_the_device
def test_mistakes_between_the_sweeps_are_named(gpu_engine: str) -> None:
    block = make_block(9, 7, 4)
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, 9)
    with pytest.raises(RuntimeError, match=r"state must be \(2, M \+ N\).*float64"):
        weigh(gpu_engine, block, state[:, :5], positive, weights)
    with pytest.raises(RuntimeError, match="kept must come from a sweep of the same features"):
        weigh(gpu_engine, block, state, positive, weights, kept=torch.zeros(5))
    with pytest.raises(RuntimeError, match=r"state must be \(2, L\) and positive \(P\), P a div"):
        operator("finish", gpu_engine)(state, positive[:3], block.scale, None, "softmax")
    with pytest.raises(ValueError, match="swept and weighed in one go"):
        operator("sweep_and_weigh", gpu_engine)(*block.arguments, weights.gain, True, True, False)
    with pytest.raises(RuntimeError, match="keep must be a number of rows >= 0, got -1"):
        sweep(gpu_engine, block, keep=-1)
