"""The memory budget decides what a forward keeps.

Sweeps are replaced, so that batches may be large.
"""

from typing import Any

import pytest
import torch
from support.block_cases import compiled_only
from torch import Tensor

from fastclip.engine import operators
from fastclip.loss import clip_loss, siglip_loss


class Swept(Exception):
    """The operator that a forward calls first, and the rows that it may keep."""


@pytest.fixture(autouse=True)
def sweeps_that_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sweep", "sweep_and_weigh"):

        def tell(*arguments: Any, name: str = name, **options: Any) -> None:
            raise Swept(name, options.get("keep"))

        monkeypatch.setattr(operators, name, tell)


def first_call(loss: Any, x: Tensor, **options: Any) -> tuple[str, int | None]:
    with pytest.raises(Swept) as found:
        loss(x, x.detach().clone().requires_grad_(), 1.0, **options)
    return found.value.args


@compiled_only
def test_the_default_budget_is_256_mib() -> None:
    """It holds 4,096 of 16,384 rows of products."""
    x = torch.zeros(16384, 2, requires_grad=True)
    assert first_call(clip_loss, x, backend="cpu") == ("sweep", 4096)
    assert first_call(clip_loss, x, backend="cpu", memory_budget=256 << 20) == ("sweep", 4096)
    assert first_call(clip_loss, x, backend="cpu", memory_budget=0) == ("sweep", 0)


@compiled_only
@pytest.mark.parametrize("short, operator", [(0, "sweep_and_weigh"), (1, "sweep")])
def test_gradients_wait_only_within_the_budget(short: int, operator: str) -> None:
    """Those of two towers take 4 bytes a number if the features have another dtype."""
    x = torch.zeros(512, 64, dtype=torch.bfloat16, requires_grad=True)
    budget = 2 * 4 * 512 * 64 - short
    found = first_call(siglip_loss, x, backend="cpu", memory_budget=budget)
    assert found[0] == operator
