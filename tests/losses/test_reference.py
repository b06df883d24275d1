"""The oracle that judges all tests is right, and so is the dense reference.

The oracle is compared with finite differences and closed forms, the reference with the oracle.
"""

import inspect
import itertools

import numpy as np
import pytest
import torch
from support.hard_inputs import batch
from support.judge import PRECISIONS, QUANTITIES, allowance, error, evaluate, truth
from support.losses import REFERENCES
from support.oracle import DTYPES, TRUTHS, rounded

import fastclip.loss

REDUCTIONS = {"mean": 1.7, "sum": -0.3, "none": np.linspace(-1, 2, 9)}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", TRUTHS)
def test_oracle_gradients_equal_finite_differences(
    loss: str, reduction: str, normalize: bool
) -> None:
    x, y = (t.astype(np.longdouble) for t in batch("lengths", 9, 3))
    inputs = {"x": x, "y": y, "scale": np.longdouble(2.3), "bias": np.longdouble(-0.7)}
    options = {"normalize": normalize, "reduction": reduction, "precision": np.longdouble}
    upstream = REDUCTIONS[reduction]

    def objective(name: str, value: np.longdouble) -> np.longdouble:
        return (TRUTHS[loss](**(inputs | {name: value}), **options).loss * upstream).sum()

    exact = TRUTHS[loss](**inputs, **options, upstream=upstream)
    for name, value in inputs.items():
        gradient, measured = getattr(exact, f"d{name}"), np.zeros_like(value)
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-5
            slope = (objective(name, value + step) - objective(name, value - step)) / 2e-5
            measured[index] = slope
        np.testing.assert_allclose(measured.astype(float), gradient.astype(float), 1e-7, 1e-8)


def test_oracle_on_two_orthogonal_pairs_equals_the_closed_form() -> None:
    # x = y = identity: each pair's loss is softplus(-s), down to losses t too small for 1 + t.
    one = np.eye(2)
    for scale in (1e-3, 1.0, 14.3, 50.0, 700.0):
        exact = TRUTHS["clip"](one, one, scale)
        np.testing.assert_allclose(exact.loss, np.log1p(np.exp(-scale)), rtol=1e-14)
        weight = np.exp(-scale) / (1 + np.exp(-scale))
        np.testing.assert_allclose(exact.dscale, -weight, rtol=1e-14)
        np.testing.assert_allclose(exact.dx, scale * weight / 2 * (1 - 2 * one), rtol=1e-14)
        exact = TRUTHS["siglip"](one, one, scale, -scale / 2)
        np.testing.assert_allclose(exact.loss, 2 * np.log1p(np.exp(-scale / 2)), rtol=1e-14)


def test_oracle_at_scale_zero_and_on_a_single_pair() -> None:
    x, y = batch("random", 7, 5)
    np.testing.assert_allclose(TRUTHS["clip"](x, y, 0.0).loss, np.log(7), rtol=1e-15)
    np.testing.assert_allclose(TRUTHS["siglip"](x, y, 0.0).loss, 7 * np.log(2), rtol=1e-15)
    alone = TRUTHS["clip"](x[:1], y[:1], 14.3)
    assert alone.loss == 0 and not alone.dx.any() and not alone.dy.any() and alone.dscale == 0


def test_oracle_stays_finite_and_exact_at_any_scale() -> None:
    for scale, batch_name in itertools.product((-1e4, 1e4), ("random", "separated", "dominating")):
        x, y = batch(batch_name, 23, 6)
        for loss in TRUTHS:
            narrow = TRUTHS[loss](x, y, scale, -3.0)
            wide = TRUTHS[loss](x, y, scale, -3.0, precision=np.longdouble)
            for name in QUANTITIES:
                np.testing.assert_allclose(
                    getattr(narrow, name), getattr(wide, name).astype(float), 2e-10, 1e-300
                )


def test_oracle_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32).astype(np.float64)
    for name in DTYPES:
        tensor = torch.from_numpy(values).float().to(getattr(torch, name))
        np.testing.assert_array_equal(rounded(values, name), tensor.double().numpy())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, -14.3])
@pytest.mark.parametrize("loss", REFERENCES)
def test_reference_agrees_with_the_oracle_in_float64(
    loss: str, scale: float, normalize: bool, reduction: str, device: torch.device
) -> None:
    upstream = np.resize(REDUCTIONS[reduction], 31 if reduction == "none" else ())
    options = {"normalize": normalize, "reduction": reduction, "upstream": upstream}
    for batch_name in ("random", "peaked", "duplicates", "cone", "negative", "lengths"):
        case = (*batch(batch_name, 31, 12), scale, -3.0, PRECISIONS["float64"])
        exact = truth(loss, *case, **options)
        ours = evaluate(REFERENCES[loss], *case, device, **options)
        for name in QUANTITIES:
            assert error(ours[name], getattr(exact, name)) < 5e-13, f"{name}, {batch_name}"


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "float64"])
@pytest.mark.parametrize("loss", REFERENCES)
def test_reference_computes_in_float32_whatever_the_inputs(
    loss: str, precision: str, device: torch.device
) -> None:
    p = PRECISIONS[precision]
    for batch_name, scale in (("random", 14.3), ("random", 100.0), ("cone", 14.3)):
        case = (*batch(batch_name, 61, 24), scale, -3.0, p)
        exact = truth(loss, *case)
        ours = evaluate(REFERENCES[loss], *case, device)
        for name in QUANTITIES:
            result = ours[name]
            wanted = {"dx": p.x, "dy": p.y}.get(name, torch.float32)
            assert result.dtype == wanted
            # Unlike the engines, the reference cancels; but only its result is rounded to half.
            stored = p.autocast if p.autocast and name in ("dx", "dy") else result.dtype
            eps = 4 * allowance(name, exact, PRECISIONS["float32"], stored)
            assert error(result, getattr(exact, name)) <= eps, f"{name}, {batch_name}, {scale}"


@pytest.mark.parametrize("loss", REFERENCES)
def test_reference_can_be_differentiated_twice(loss: str, device: torch.device) -> None:
    x, y = (torch.tensor(t, device=device, requires_grad=True) for t in batch("random", 4, 3))
    scale, bias = (torch.tensor(t, device=device).double().requires_grad_() for t in (2.0, -1.0))
    assert torch.autograd.gradgradcheck(REFERENCES[loss], (x, y, scale, bias))


@pytest.mark.parametrize("loss", REFERENCES)
def test_reference_has_the_signature_of_the_fused_loss(loss: str) -> None:
    ours = inspect.signature(REFERENCES[loss]).parameters.values()
    fused = inspect.signature(getattr(fastclip.loss, f"{loss}_loss")).parameters.values()
    # `live` has no dense form: its value and gradients are not those of one dense loss.
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in fused if p.name != "live"
    ]


@pytest.mark.parametrize("loss", REFERENCES)
def test_reference_refuses_an_unknown_reduction(loss: str) -> None:
    with pytest.raises(ValueError, match=r"reduction.*'median'"):
        REFERENCES[loss](torch.ones(2, 3), torch.ones(2, 3), 1.0, reduction="median")
