"""Properties of the operators: schemas, fakes, no derivative, no effect of autocast.

Code that traces, exports or composes the operators relies on these; the losses are one caller.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.block_operators import levels_of, make_weights, operator, relative_to, sweep
from support.dense_block import DENSE_KINDS, DTYPES, FINISHED, KINDS, Block, make_block
from support.judge import error, numbers
from support.losses import LOSSES
from support.masked_block import make_masked_block, occupied
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastclip.engine import operators
from fastclip.engine.kept import rows_to_keep

# The schemas in full, because changing one breaks exported programs.
BLOCK = (
    "Tensor x, Tensor? factor_x, Tensor? ids_x, Tensor? threshold_x, Tensor? target_x,"
    " Tensor? target_factor_x, Tensor y, Tensor? factor_y, Tensor? ids_y, Tensor? threshold_y,"
    " Tensor? target_y, Tensor? target_factor_y, Tensor scale, Tensor? bias, Tensor? key_bias,"
    " Tensor? target_scale, int offset, str kind, bool same_id_positive, bool guided"
)
IN_BLOCK = re.findall(r"(\w+)(?:,|$)", BLOCK)
SCHEMAS = {
    "sweep": (
        f"({BLOCK}, Tensor? bound, Tensor? occupied, Tensor? levels, SymInt keep)"
        " -> (Tensor state, Tensor positive, Tensor kept)"
    ),
    "finish": (
        "(Tensor state, Tensor positive, Tensor scale, Tensor? bias, str kind)"
        " -> (Tensor losses, Tensor coefficients, Tensor weights)"
    ),
    "weigh": (
        f"({BLOCK}, Tensor state, Tensor positive, Tensor kept, Tensor coefficients,"
        " Tensor positive_weight, Tensor gain, bool needs_x, bool needs_y, bool needs_key_bias,"
        " bool project, ScalarType dtype_x, ScalarType dtype_y)"
        " -> (Tensor dx, Tensor dy, Tensor dbias_dscale, Tensor dkey_bias)"
    ),
    "sweep_and_weigh": (
        f"({BLOCK}, Tensor gain, bool needs_x, bool needs_y, bool project)"
        " -> (Tensor state, Tensor positive, Tensor dx, Tensor dy, Tensor dbias_dscale)"
    ),
}
every_operator = pytest.mark.parametrize("name", SCHEMAS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


pytestmark = pytest.mark.usefixtures("on_the_device")


def samples(name: str, engine: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Yields arguments of one operator; together they use every value of every option.

    The first block contains all its rows' positives, so its results have no NaN. All products are
    kept, because the unused end of a larger buffer is uninitialised memory.
    """
    for kind in KINDS:
        if name == "sweep_and_weigh" and not DENSE_KINDS[kind].is_linear:
            continue
        if name == "finish" and kind not in FINISHED:
            continue
        for m, n, offset in ((20, 33, 4), (33, 20, -7), (6, 6, 100)):
            for factors in ((False, False), (True, False), (True, True)):
                block = make_block(
                    m, n, 5, dtype, kind=kind, offset=offset, factors=factors,
                    bias=None if factors[1] else -2.0,
                )  # fmt: skip
                what = f"{kind}, {m} x {n}, {offset=}, {factors=}"
                yield what, arguments(name, engine, block, factors)
    if name in ("sweep", "weigh"):
        for kind in KINDS:
            for same_id_positive in (False, True)[: 1 if DENSE_KINDS[kind].has_levels else 2]:
                block = make_masked_block(
                    20, 33, 5, dtype, kind=kind, offset=4, ids=6, margin=-0.2, key_bias=1.0,
                    same_id_positive=same_id_positive,
                )  # fmt: skip
                what = f"{kind}, masked, {same_id_positive=}"
                yield what, arguments(name, engine, block, (True, False))


def arguments(name: str, engine: str, block: Block, needs: tuple[bool, bool]) -> tuple:
    m, n = len(block.x), len(block.y)
    keep = rows_to_keep(m, n, 8, 1 << 30) if engine == "cpu" else 0
    if name == "sweep":
        bound = torch.tensor(40.0, dtype=torch.float64) if needs[0] else None
        return *block.arguments, bound, occupied(block), levels_of(block), keep
    state, positive, kept = sweep(engine, block, keep if needs[0] else 0)
    weights = make_weights(state, m)
    if name == "finish":
        return state[:, :m].contiguous(), positive, block.scale, block.bias, block.kind
    if name == "weigh":
        state = relative_to(levels_of(block), state)
        return (
            *block.arguments, state, positive, kept, weights.coefficients, weights.positive_weight,
            weights.gain, *needs, block.key_bias is not None, needs[1], torch.bfloat16,
            torch.float32,
        )  # fmt: skip
    return *block.arguments, weights.gain, *needs, needs[1]


def assert_same(results: tuple[Tensor, ...], others: tuple[Tensor, ...], what: str) -> None:
    for one, other in zip(results, others, strict=True):
        assert one.dtype == other.dtype, what
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), what


# ---- the dispatcher ------------------------------------------------------------------------------


@every_operator
def test_schema(name: str, engine: str) -> None:
    assert str(operator(name, engine)._schema) == f"fastclip::{name}.{engine}{SCHEMAS[name]}"


@every_operator
def test_one_overload_for_each_engine(name: str) -> None:
    """Engines that are not available here have overloads, too, so that programs can be loaded."""
    assert set(getattr(torch.ops.fastclip, name).overloads()) == set(operators.ENGINES)


@every_operator
def test_the_documentation_names_the_arguments_and_results_of_the_schema(name: str) -> None:
    documented = re.search(rf"`{name}\(([^)]*)\)\s*->\s*([^`]*)`", operators.__doc__)
    schema = operator(name, "torch")._schema
    assert all(re.search(rf"\b{part}\b", operators.__doc__) for part in IN_BLOCK)
    for part, named in zip(documented.groups(), (schema.arguments, schema.returns), strict=True):
        assert re.findall(r"\w+", part.replace("BLOCK", ", ".join(IN_BLOCK))) == [
            entry.name for entry in named
        ]


@every_operator
@in_every_dtype
def test_fakes_agree_in_shape_and_dtype(name: str, engine: str, dtype: str) -> None:
    for what, sample in samples(name, engine, DTYPES[dtype]):
        real = operator(name, engine)(*sample)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample]
            fake = operator(name, engine)(*fakes)
        for one, other in zip(real, fake, strict=True):
            for attribute in ("shape", "dtype", "device"):
                found = getattr(one, attribute), getattr(other, attribute)
                assert found[0] == found[1], f"{what}: {attribute} {found}"
            assert one.stride() == other.stride(), what


@every_operator
def test_opcheck(name: str, engine: str) -> None:
    """Checks the schema (nothing mutated or aliased), registration, fakes, and dynamic shapes."""
    for what, sample in samples(name, engine, torch.bfloat16):
        # Rows without their positive are NaN, which opcheck takes for a difference.
        if "20 x 33" in what and "(False, False)" not in what:
            torch.library.opcheck(operator(name, engine), sample)


# ---- autograd and autocast -----------------------------------------------------------------------


@every_operator
def test_a_backward_through_an_operator_is_refused(name: str, engine: str) -> None:
    """A missing gradient would be a wrong one. Forwards run, with and without gradient mode."""
    for _, sample in samples(name, engine, torch.float64):
        expected = operator(name, engine)(*sample)
        sources = [t.clone().requires_grad_() if _floating(t) else t for t in sample]
        results = operator(name, engine)(*sources)
        assert_same(tuple(t.detach() for t in results), expected, name)
        for result in results:
            if result.numel() and result.requires_grad:
                with pytest.raises(
                    RuntimeError, match=r"fastclip.*derivative|derivative.*fastclip"
                ):
                    result.sum().backward(retain_graph=True)
        assert any(result.requires_grad for result in results)
        assert all(t.grad is None for t in sources if isinstance(t, Tensor))
        with torch.no_grad():
            assert not any(t.requires_grad for t in operator(name, engine)(*sources))
        with torch.inference_mode():
            assert_same(operator(name, engine)(*sources), expected, name)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@every_operator
@in_every_dtype
@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_autocast_does_not_change_the_operators(
    name: str, engine: str, dtype: str, autocast: str, device: torch.device
) -> None:
    for what, sample in samples(name, engine, DTYPES[dtype]):
        expected = operator(name, engine)(*sample)
        with torch.autocast(device.type, DTYPES[autocast]):
            results = operator(name, engine)(*sample)
            assert torch.is_autocast_enabled(device.type)
        assert_same(results, expected, what)


# ---- the precision of float32 products -----------------------------------------------------------


@pytest.fixture
def set_precision() -> Iterator[Callable[[str], None]]:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def change(value: str) -> None:
        settings.fp32_precision = value

    yield change
    settings.fp32_precision = before


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_products_are_used_if_the_user_allows_them(
    loss: str,
    engine: str,
    normalize: bool,
    set_precision: Callable[[str], None],
    device: torch.device,
) -> None:
    """Errors grow to those of bf16 products, no farther; gradients are not rounded to bf16."""
    if device.type != "cpu":
        pytest.skip("the setting is oneDNN's")
    block = make_block(150, 150, 40)

    def evaluate(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, y = (t.to(dtype, copy=True).requires_grad_() for t in (block.x, block.y))
        value = LOSSES[loss](x, y, 14.3, -2.0, normalize=normalize, backend=backend)
        value.backward()
        assert x.grad.dtype == y.grad.dtype == value.dtype == dtype
        return [value.detach(), x.grad, y.grad]

    truth = [numbers(t) for t in evaluate(torch.float64, "reference")]
    full = [
        error(t, exact) for t, exact in zip(evaluate(torch.float32, engine), truth, strict=True)
    ]
    set_precision("bf16")
    results = evaluate(torch.float32, engine)
    coarse = [error(t, exact) for t, exact in zip(results, truth, strict=True)]
    set_precision("ieee")
    again = [
        error(t, exact) for t, exact in zip(evaluate(torch.float32, engine), truth, strict=True)
    ]
    assert max(full) < 1e-5 and full == again
    assert min(coarse[1:]) > 20 * max(full)  # the loss alone may be accurate by chance
    assert max(coarse) < 0.05
    for gradient in results[1:]:  # rounded operands, not a rounded result
        assert not torch.equal(gradient, gradient.bfloat16().float())
