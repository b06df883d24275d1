"""`DistillClipLoss` and `CoCaLoss` are open_clip's."""

import inspect
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.peers import Case, assert_same, peer
from torch import Tensor

import fastclip.loss
from fastclip.loss import CoCaLoss, DistillClipLoss, distill_loss


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("open_clip.loss")


@pytest.mark.parametrize("name", ["DistillClipLoss", "CoCaLoss"])
def test_parameters(name: str, theirs: ModuleType) -> None:
    ours, wanted = (
        [(p.name, p.kind, p.default) for p in inspect.signature(kind.forward).parameters.values()]
        for kind in (getattr(m, name) for m in (fastclip.loss, theirs))
    )
    assert ours[: len(wanted)] == wanted
    assert all(default is not inspect.Parameter.empty for *_, default in ours[len(wanted) :])


@pytest.mark.parametrize("name", ["DistillClipLoss", "CoCaLoss"])
def test_constructor_arguments_become_attributes(name: str, theirs: ModuleType) -> None:
    names = list(inspect.signature(getattr(theirs, name)).parameters)
    values = [*(2.0, 0.5, 7)[: len(names) - 6], True, True, True, 0, 1, False]
    for arguments, keywords in ((values, {}), ((), dict(zip(names, values, strict=True)))):
        ours, wanted = (getattr(m, name)(*arguments, **keywords) for m in (fastclip.loss, theirs))
        for attribute, value in vars(wanted).items():
            if not attribute.startswith("_"):
                assert getattr(ours, attribute) == value, attribute
        if name == "CoCaLoss":
            assert ours.caption_loss.ignore_index == wanted.caption_loss.ignore_index


def total(losses: tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    """Returns a sum in which the parts have different weights."""
    parts = losses.values() if isinstance(losses, dict) else losses
    return sum(weight * part for weight, part in zip((1.0, 0.6), parts, strict=True))


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("teacher_scale", [0.0, 20.0, 100.0])
def test_distillation(
    teacher_scale: float, as_dict: bool, case: Case,
    theirs: ModuleType,
) -> None:  # fmt: skip
    teacher = [F.normalize(t.detach()) for t in case.features(2, d=case.d + 3)]

    def evaluate(loss: torch.nn.Module, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        x, y = F.normalize(x), F.normalize(y)
        return total(loss(x, y, t, *teacher, teacher_scale, output_dict=as_dict))

    ours, wanted = DistillClipLoss(), theirs.DistillClipLoss()
    assert_same(
        lambda *given: evaluate(ours, *given), lambda *given: evaluate(wanted, *given),
        case.leaves(2),
    )  # fmt: skip


def test_names_of_the_distilled_losses(theirs: ModuleType) -> None:
    x, y, *teacher = Case(5, 3, 2.0, "close").features(4)
    ours = DistillClipLoss()(x, y, 2.0, *teacher, 3.0, output_dict=True)
    wanted = theirs.DistillClipLoss()(x, y, 2.0, *teacher, 3.0, output_dict=True)
    assert list(ours) == list(wanted)


def test_the_function_is_the_second_part(case: Case, theirs: ModuleType) -> None:
    teacher = [t.detach() for t in case.features(2, d=case.d + 3)]
    assert_same(
        lambda x, y, t: distill_loss(x, y, t, *teacher, 20.0),
        lambda x, y, t: theirs.DistillClipLoss()(x, y, t, *teacher, 20.0)[1],
        case.leaves(2),
    )


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("clip_weight", [0, 1.0, 0.3])
@pytest.mark.parametrize("pad", [0, 7])
def test_captions(
    pad: int, clip_weight: float, as_dict: bool, case: Case, theirs: ModuleType
) -> None:
    n = case.n
    logits = torch.randn(n, 6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (n, 6))
    labels[:, 4:], labels[:, 0] = pad, 3

    def evaluate(loss: torch.nn.Module, x: Tensor, y: Tensor, t: Tensor, logits: Tensor) -> Tensor:
        return total(loss(x, y, logits, labels, t, output_dict=as_dict))

    arguments = {"caption_loss_weight": 2.0, "clip_loss_weight": clip_weight, "pad_id": pad}
    ours, wanted = CoCaLoss(**arguments), theirs.CoCaLoss(**arguments)
    assert_same(
        lambda *given: evaluate(ours, *given), lambda *given: evaluate(wanted, *given),
        [*case.leaves(2), logits],
    )  # fmt: skip


def test_names_of_the_losses_with_captions(theirs: ModuleType) -> None:
    x, y = Case(5, 3, 2.0, "close").features(2)
    given = (x, y, torch.randn(5, 4, 9), torch.randint(9, (5, 4)), 2.0)
    for weight in (0, 1.0):
        ours, wanted = (m.CoCaLoss(2.0, weight)(*given, True) for m in (fastclip.loss, theirs))
        assert list(ours) == list(wanted)
        assert [t.shape for t in ours.values()] == [t.shape for t in wanted.values()]
