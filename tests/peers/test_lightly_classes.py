"""Our classes of lightly: their values and gradients, with a bank and across ranks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from support.peers import Case, assert_same, find, peer
from support.ranks import lightly as steps
from support.ranks.processes import Ranks

from fastclip.integrations import lightly as ours

LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("NTXentLoss", {}), ("DCLLoss", {}), ("DCLLoss", {"weight_fn": steps.distances})
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("lightly.loss")


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_two_views(name: str, options: dict[str, Any], case: Case, theirs: ModuleType) -> None:
    if case.n == 1 and name == "DCLLoss":
        pytest.skip("their loss of one pair is -inf")
    assert_same(
        lambda x, y, t: getattr(ours, name)(1 / t, **options)(x, y),
        lambda x, y, t: getattr(theirs, name)(1 / t, **options)(x, y),
        case.leaves(2),
    )


@pytest.mark.parametrize("size", [1, 40])
def test_a_bank_of_negatives(size: int, case: Case, theirs: ModuleType) -> None:
    views, found = case.features(2, dtype=torch.float32), []
    for of in (ours, theirs):
        torch.manual_seed(0)  # of the bank's first features
        loss = of.NTXentLoss(1 / case.scale, memory_bank_size=(size, case.d))
        for _ in range(3):
            value = loss(*views)
        gradients = torch.autograd.grad(value, views)
        found.append([value.detach(), loss.memory_bank.bank, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-5)


def test_a_bank_is_not_updated_without_gradients(theirs: ModuleType) -> None:
    views = Case(7, 4, 2.0, "random").features(2, dtype=torch.float32)
    for of in (ours, theirs):
        loss = of.NTXentLoss(memory_bank_size=(16, 4))
        loss(*views)
        before = loss.memory_bank.bank.clone()
        with torch.no_grad():
            loss(*views)
        assert torch.equal(loss.memory_bank.bank, before)


def test_a_cross_entropy_of_the_callers(
    theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(type(ours.HOST), "falls_back", lambda host, reason: reasons.append(reason))
    views, values = Case(7, 4, 2.0, "random").features(2), []
    for of in (ours, theirs):
        loss = of.NTXentLoss()
        loss.cross_entropy = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2)
        values.append(loss(*views))
    assert values[0] == values[1] and len(reasons) == 1


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_two_ranks(name: str, options: dict[str, Any], two: Ranks) -> None:
    find("lightly")
    found, expected = (two.run(steps.step, who, name, options) for who in steps.MODULES)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    peer("lightly")
    whole = steps.step(0, 1, "theirs", name, options)
    torch.testing.assert_close(found[0][1], whole[1], rtol=1e-9, atol=1e-11)


def test_patch_and_disable(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before, views = theirs.NTXentLoss, [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    ours.patch()
    try:
        assert theirs.NTXentLoss is ours.NTXentLoss is not before
        assert issubclass(theirs.DCLWLoss, ours.DCLLoss)
        loss = theirs.NTXentLoss()
    finally:
        ours.unpatch()
    assert theirs.NTXentLoss is before and not issubclass(theirs.DCLWLoss, ours.DCLLoss)
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    assert loss(*views) == before()(*views)
