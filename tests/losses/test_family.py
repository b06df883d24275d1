"""Properties of every loss of the family: all shapes and reductions, frozen inputs, one backward
after another, compilation, transforms, and one value run after run.

Values and gradients are compared with the dense twin in float64, which
`test_family_accuracy.py` judges by formulas.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.family import CASES, Case, call, evaluate, given_options, of_batch, tensors
from support.gpu_engine_case import prepare
from support.judge import PRECISIONS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastclip
from fastclip import loss, reference

FLOAT64 = PRECISIONS["float64"]
D = 6


def inputs_of(case: Case, n: int, device: torch.device, precision: str = "float64") -> dict:
    return tensors(case, of_batch(case, "random", n, D, 3.0), PRECISIONS[precision], device)


def gradients(case: Case, t: dict[str, Tensor], value: Tensor, **options: Any) -> list:
    wanted = [t[name] for name in case.leaves]
    g = torch.linspace(-1, 2, value.numel()).to(value).reshape(value.shape)
    g = g if value.dim() else torch.ones_like(value)
    return list(torch.autograd.grad(value, wanted, g, allow_unused=True, **options))


def assert_same(ours: list, theirs: list, what: str, rtol: float = 1e-9) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            some = one if other is None else other
            assert some is None or not some.any(), what
        else:
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 10, msg=what)


@pytest.mark.parametrize("name", CASES)
def test_every_shape_and_reduction(name: str, engine: str, device: torch.device) -> None:
    case = CASES[name]
    options = itertools.product((1, 2, 3, 31), ("mean", "sum", "none"), (False, True))
    for n, reduction, normalize in options:
        given = of_batch(case, "random", n, D, 3.0)
        found = []
        for module, backend in ((loss, engine), (reference, None)):
            t = tensors(case, given, FLOAT64, device)
            value = call(case, module, t, reduction=reduction, normalize=normalize, backend=backend)
            assert value.shape == ((n,) if reduction == "none" else ())
            if case.option("decoupled") and not value.isfinite().all():
                # The dense gradient of a line without negatives is NaN.
                found.append([value.detach()])
                continue
            found.append([value.detach(), *gradients(case, t, value)])
        assert_same(*found, f"{n=}, {reduction}, {normalize=}")


@pytest.mark.parametrize("name", CASES)
def test_the_dense_backend(name: str, device: torch.device) -> None:
    """It equals the dense twin, up to the second derivative."""
    case, found = CASES[name], []
    given = of_batch(case, "random", 9, D, 3.0)
    for module, backend in ((loss, "reference"), (reference, None)):
        t = tensors(case, given, FLOAT64, device)
        value = call(case, module, t, backend=backend, normalize=True)
        first = gradients(case, t, value, create_graph=True)
        total = sum(g.square().sum() for g in first if g is not None)
        found.append([value, *first, *gradients(case, t, total)])
    assert_same(*found, "dense backend", 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_nothing_hides_a_nan(name: str, engine: str, device: torch.device) -> None:
    """The losses that are NaN in the dense twin are NaN; means may spread it to further lines."""
    case, found = CASES[name], []
    for side in ("x", "y") if "y" in case.leaves else ("x",):
        given = of_batch(case, "random", 11, D, 3.0)
        given[side] = given[side].copy()
        given[side][4, 1] = np.nan
        for module, backend in ((loss, engine), (reference, None)):
            t = tensors(case, given, FLOAT64, device)
            value = call(case, module, t, backend=backend, reduction="none")
            found.append(value.detach().isnan())
        ours, dense = found[-2:]
        assert dense.any()
        assert (ours | ~dense).all(), side
        if not case.option("label_smoothing"):
            assert torch.equal(ours, dense), side


@pytest.mark.parametrize("options", [{"hardness": 2.0}, {"label_smoothing": 0.1}], ids=str)
def test_a_key_that_is_taken_out(options: dict[str, float], device: torch.device) -> None:
    """Its query has an infinite loss, as in the dense form, and not NaN."""
    case = CASES["hardness"]._replace(options=options)
    t = inputs_of(case, 5, device)
    t["key_bias"] = t["key_bias"].detach().index_fill(0, torch.tensor(3, device=device), -torch.inf)
    ours, dense = (call(case, module, t, reduction="none").detach() for module in (loss, reference))
    assert dense[3] == torch.inf and dense.isinf().sum() == 1
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("name", ["distill", "distill, rows"])
def test_a_teacher_in_another_dtype(name: str, engine: str, device: torch.device) -> None:
    """It is not rounded to the student's dtype."""
    case, given = CASES[name], of_batch(CASES[name], "random", 31, D, 14.3)
    for precision, teacher in (("bfloat16", torch.float32), ("float32", torch.float64)):
        t = tensors(case, given, PRECISIONS[precision], device)
        t |= {k: torch.tensor(given[k], dtype=teacher, device=device)
              for k in ("teacher_x", "teacher_y")}  # fmt: skip
        wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()
                if v.is_floating_point()}  # fmt: skip
        value = call(case, loss, t, backend=engine)
        exact = call(case, reference, wide)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
        for key, one, other in zip(
            case.leaves, gradients(case, t, value), gradients(case, wide, exact), strict=True
        ):
            error = (one.double() - other).norm() / other.norm()
            assert error < 2 * torch.finfo(one.dtype).eps + 2e-6, f"{key}, {precision}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_frozen_inputs(name: str, engine: str, device: torch.device) -> None:
    """A frozen input changes no other's gradient; nothing is differentiated under no_grad."""
    case = CASES[name]
    t = inputs_of(case, 13, device)
    exact = dict(zip(case.leaves, gradients(case, t, call(case, loss, t)), strict=True))
    wanted = [(one,) for one in case.leaves] + [case.leaves[1:]]
    for alive in wanted:
        frozen = {
            key: value.detach().requires_grad_(key in alive) for key, value in t.items()
            if value.is_floating_point()
        }  # fmt: skip
        value = call(case, loss, {**t, **frozen}, backend=engine)
        assert value.requires_grad
        for key in alive:
            (gradient,) = torch.autograd.grad(
                value, frozen[key], retain_graph=True, allow_unused=True
            )
            assert_same([gradient], [exact[key]], f"{key} of {alive}")
    with torch.no_grad():
        quiet = call(case, loss, t, backend=engine)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, call(case, loss, t, backend=engine).detach())


@pytest.mark.parametrize("name", CASES)
def test_a_second_backward_but_no_second_derivative(
    name: str, engine: str, device: torch.device
) -> None:
    case = CASES[name]
    t = inputs_of(case, 13, device)
    value = call(case, loss, t, backend=engine)
    once, again = (gradients(case, t, value, retain_graph=True) for _ in range(2))
    assert_same(once, again, "second backward", 1e-14)
    first = gradients(case, t, value, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), t[case.leaves[0]])


@pytest.mark.parametrize("name", CASES)
def test_runs_are_bitwise_equal(name: str, engine: str, device: torch.device) -> None:
    case = CASES[name]
    for precision in ("float32", "bfloat16"):
        given = of_batch(case, "random", 131, 24)
        first, *others = (
            evaluate(case, loss, given, PRECISIONS[precision], device, backend=engine)
            for _ in range(3)
        )
        for other in others:
            for quantity, result in first.items():
                assert torch.equal(result, other[quantity]), f"{quantity}, {precision}"


@pytest.mark.parametrize("name", ["both ways", "margin", "hardness", "supcon", "distill"])
def test_scales_and_weights_of_any_dtype(name: str, engine: str, device: torch.device) -> None:
    """A scale in half precision is a number; only its gradient is rounded."""
    case = CASES[name]
    given = of_batch(case, "random", 31, D, 14.3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        t = tensors(case, given, PRECISIONS["float32"], device)
        half = {
            key: t[key].detach().to(dtype).requires_grad_()
            for key in ("scale", "weights") if key in case.leaves
        }  # fmt: skip
        half["scale"] = half["scale"].detach().reshape(1).requires_grad_()
        wide = {key: value.detach().double().requires_grad_() for key, value in half.items()}
        results = []
        for own, module, backend in ((half, loss, engine), (wide, reference, None)):
            u = {**t, **own}
            if module is reference:
                u = {k: v.double() if v.is_floating_point() else v for k, v in u.items()}
                u = {k: v.detach().requires_grad_(k in case.leaves) for k, v in u.items()}
            value = call(case, module, u, backend=backend)
            results.append([value.detach().double(), *gradients(case, u, value)])
        for key, one, other in zip(("loss", *case.leaves), *results, strict=True):
            own = t.get(key, value) if key not in half else half[key]
            rough = 2 * torch.finfo(own.dtype).eps if key in half else 0.0
            error = (one.double() - other).norm() / other.norm().clamp_min(1e-12)
            assert error < 2e-5 + rough, f"{key}, {dtype}: {error:.1e}"


# The Python compiler alone: engines' own graphs are compiled in `tests/contrast`.
@pytest.mark.parametrize("name", ["hardness", "labels", "supcon", "nt_xent", "ranking", "distill"])
def test_one_graph_serves_all_batch_sizes(name: str, device: torch.device) -> None:
    case = CASES[name]
    torch._dynamo.reset()

    def function(t: dict[str, Tensor]) -> Tensor:
        return call(case, loss, t)

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for n in (7, 12):
        t = inputs_of(case, n, device)
        ours, eager = (
            [value.detach(), *gradients(case, t, value)]
            for value in (compiled(t), function(t))
        )  # fmt: skip
        assert_same(ours, eager, f"{n=}", 1e-12)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("name", CASES)
def test_functional_gradients(name: str, engine: str, device: torch.device) -> None:
    case = CASES[name]
    t = inputs_of(case, 9, device)

    def function(*leaves: Tensor) -> Tensor:
        return call(
            case, loss, {**t, **dict(zip(case.leaves, leaves, strict=True))}, backend=engine
        )

    leaves = [t[key].detach() for key in case.leaves]
    every = tuple(range(len(leaves)))
    found = torch.func.grad(function, argnums=every)(*leaves)
    assert_same(list(found), gradients(case, t, call(case, loss, t)), "grad", 1e-12)
    batched = [torch.stack((leaf, 0.5 * leaf)) for leaf in leaves]
    # One input without samples.
    shared = [leaves[0], *batched[1:]]
    in_dims = (None, *(0 for _ in every[1:]))
    per_sample = torch.func.vmap(torch.func.grad(function, argnums=every), in_dims)(*shared)
    for k in range(2):
        own = torch.func.grad(function, argnums=every)(
            leaves[0], *(leaf[k] for leaf in batched[1:])
        )
        assert_same([one[k] for one in per_sample], list(own), "vmap of grad, shared", 1e-12)
    values = torch.func.vmap(function)(*batched)
    alone = torch.stack([function(*(leaf[k] for leaf in batched)) for k in range(2)])
    torch.testing.assert_close(values, alone)
    per_sample = torch.func.vmap(torch.func.grad(function, argnums=every))(*batched)
    for k in range(2):
        alone = torch.func.grad(function, argnums=every)(*(leaf[k] for leaf in batched))
        assert_same([one[k] for one in per_sample], list(alone), "vmap of grad", 1e-12)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(5, D) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (tower(t) for tower, t in zip(self.towers, (images, texts), strict=True))
        return x, y, self.scale.exp()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.more_keys])
def test_cached_step(name: str, device: torch.device) -> None:
    """The loss is called once, on the batch, so any loss has the gradients of a whole step."""
    case, n = CASES[name], 13
    t = inputs_of(case, n, device)
    given = {k: v for k, v in given_options(case, t).items() if k != "weights"}
    model = Towers().double().to(device)
    images, texts = torch.randn(2, n, 5, dtype=torch.float64, device=device)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        own = {**t, "x": x, "y": y, "scale": scale}
        if "y" not in case.leaves:
            twice = {name: t[name].repeat(2) for name in ("classes", "weights")}
            own |= {"x": torch.cat((x, y)), **twice}
        return call(case, loss, own, **given)

    whole = step(*model(images, texts))
    exact = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    value = fastclip.cached_step(model, step, images, texts, micro_batch=5)
    torch.testing.assert_close(value, whole.detach())
    assert_same([p.grad for p in model.parameters()], list(exact), "cached step")


def test_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted without a GPU, on one case of each loss that it serves."""
    prepare("triton", device, monkeypatch)
    names = "both ways", "labels", "hardness", "positives by id", "supcon", "nt_xent", "ranking"
    for name in (*names, "distill", "siglip, positives"):
        case = CASES[name]
        given = of_batch(case, "random", 9, D, 3.0)
        ours = evaluate(
            case, loss, given, PRECISIONS["float32"], device, backend="triton", normalize=True
        )
        exact = evaluate(case, reference, given, FLOAT64, device, normalize=True)
        for quantity, right in exact.items():
            error = np.linalg.norm((ours[quantity].double() - right).cpu())
            limit = 1e-5 * max(1e-2, np.linalg.norm(right.cpu()))
            assert error < limit, f"{name}, {quantity}: {error:.1e}"
