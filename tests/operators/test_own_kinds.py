"""A user can add a kind of statistic, and a loss on it, without changing fastclip."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip import contrast, kinds
from fastclip.engine import operators

# The kind of docs/adding-a-loss.md.
MODULE = '''
import torch.nn.functional as F

from fastclip import contrast
from fastclip.kinds import LN2, Kind, register


@register
class SquaredHinge(Kind):
    """The sum of the squares of how far negatives' logits lie above -1."""

    name = "squared_hinge"
    negates_positives = True

    @staticmethod
    def fold(logit, shift):
        return F.relu(logit * LN2 + 1).square()

    @staticmethod
    def activation(logit, shift):
        return 2 * F.relu(logit * LN2 + 1)


def squared_hinge_loss(x, y, logit_scale, logit_bias, **options):
    c = contrast(x, y, logit_scale, logit_bias, kind="squared_hinge", **options)
    return (c.rows + F.relu(1 - c.positives).square()).mean()
'''


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "own_kind.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("own_kind", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_kind"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_kind"], kinds.KINDS["squared_hinge"]


def leaves(device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, y = torch.randn(2, 30, 6, dtype=dtype).to(device).unbind()
    scalars = (torch.tensor(t, dtype=dtype, device=device) for t in (0.7, -0.4))
    return [t.clone().requires_grad_() for t in (x, y, *scalars)]


def dense(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    s = scale * x @ y.T + bias
    sign = 2 * torch.eye(len(s), dtype=s.dtype, device=s.device) - 1
    return torch.relu(1 - sign * s).square().sum() / len(s)


def test_a_loss_on_a_users_kind(module: ModuleType, device: torch.device) -> None:
    inputs = leaves(device)
    for backend in (None, "torch", "reference"):
        value = module.squared_hinge_loss(*inputs, backend=backend)
        expected = dense(*inputs)
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value, inputs)
        for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_a_users_loss_takes_every_option(module: ModuleType, device: torch.device) -> None:
    inputs = leaves(device)
    ids = tuple(torch.randint(0, 8, (30,)).to(device) for _ in range(2))
    bias = torch.randn(30, dtype=torch.float64).to(device).requires_grad_()
    found = []
    for backend in (None, "reference"):
        c = contrast(
            *inputs, ids=ids, same_id="positive", key_bias=bias, false_negative_margin=0.3,
            kind="squared_hinge", backend=backend,
        )  # fmt: skip
        given = [t for t in c if t is not None]
        loss = sum(t.square().sum() for t in given)
        found.append((*given, *torch.autograd.grad(loss, (*inputs, bias))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_engine_without_the_kind_is_refused(module: ModuleType) -> None:
    x, y, scale, bias = leaves(torch.device("cpu"), torch.float32)
    if fastclip.backends()["cpu"] == "available":
        with pytest.raises(ValueError, match="must be one that backend 'cpu' has"):
            contrast(x, y, scale, bias, kind="squared_hinge", backend="cpu")
    state = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="squared_hinge"):
        operators.finish("torch", state, state[0], scale, bias, "squared_hinge")


def test_a_kinds_name_can_be_registered_once(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="a kind's name must be its own, got 'softmax'"):

        @kinds.register
        class Softmax(kinds.Kind):
            name = "softmax"


def test_a_kind_with_a_shift_may_not_negate_positives() -> None:
    class Negating(kinds.Softmax):
        name = "negating"
        negates_positives = True

    with pytest.raises(ValueError, match="with a shift must not negate positives, got 'negating'"):
        kinds.register(Negating)
    assert "negating" not in kinds.KINDS


@pytest.mark.parametrize("trait", ["has_shift", "negates_positives", "is_linear"])
def test_a_kind_with_levels_has_no_other_trait(trait: str) -> None:
    two = type("Two", (kinds.Hinge,), {"name": "two", trait: True})
    with pytest.raises(ValueError, match=f"levels must have {trait} = False, got True for 'two'"):
        kinds.register(two)
    assert "two" not in kinds.KINDS


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"kind must be one of 'softmax', 'sigmoid', 'hinge', got 'cubic'"
    ):
        kinds.kind_of("cubic")
