"""A slice of the soak, which finds nothing wrong; and faults that it must find."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from soak import judged, long, ranked
from soak.meter import Held, growth, held
from soak.pool import Outcome
from soak.ranked import Case, Runner
from support.judge import PRECISIONS

from fastclip import loss


def of_steps(count: int) -> list[str]:
    return long.steps(0, count, math.inf, 1, None, print)


def test_steps() -> None:
    assert of_steps(60) == []


def test_cases_across_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among seven cases one rank dies, one brings NaN, and three misfit."""
    monkeypatch.setattr(ranked, "MOST_RANKS", 4)
    assert long.cases(0, 7, math.inf, 213, None, print) == []


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that repeats the step."""
    right = loss.info_nce
    monkeypatch.setattr(loss, "info_nce", lambda *t, **options: 1.001 * right(*t, **options))
    found = of_steps(20)
    assert any("loss: off by 1" in line for line in found)
    assert "python -m tests.soak steps --seed 1 --first" in found[0]


@pytest.mark.parametrize("value, wrong", [(0.0, 0), (0.01, 1), (math.nan, 1)])
def test_a_result_that_should_be_zero_is_judged(value: float, wrong: int) -> None:
    zero = SimpleNamespace(dx=np.zeros((2, 3)), largest_logit=1.0, conditions={"dx": 1.0})
    found, given = {"dx": torch.full((2, 3), value)}, {"x": np.ones((2, 3))}
    assert len(judged.mistakes(found, None, zero, PRECISIONS["float32"], given)) == wrong


def first_case(fault: str, accept: Callable[[Case], bool] = lambda case: True) -> Case:
    every = (ranked.draw(0, k) for k in range(2000))
    return next(c for c in every if c.fault == fault and len(c.spread.sizes) > 1 and accept(c))


def zeros_of(case: Case) -> dict[str, torch.Tensor]:
    return {f"d{k}": torch.zeros(()) for k in case.spread.case.leaves} | {"loss": torch.zeros(())}


OUTCOMES: dict[str, tuple[str, Outcome]] = {
    "a rank accepts what others refuse": ("another width", Outcome({}, "", 0.1)),
    "a rank waits instead of refusing": ("another dtype", Outcome(None, "RuntimeError: t/o", 9.0)),
    "a rank has a result without the dead one": ("dies before the forward", Outcome({}, "", 0.1)),
    "a rank notices a death too late": (
        "dies before the forward", Outcome(None, "RuntimeError: closed", 99.0)
    ),
    "a rank hangs": ("stalls before the backward", Outcome(None, "hangs", 9.0)),
    "a rank raises without a fault": ("none", Outcome(None, "ValueError: no", 0.1)),
    "a rank dies without a fault": ("none", Outcome(None, "died", 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("what", OUTCOMES)
def test_a_wrong_outcome_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, outcome = OUTCOMES[what]
    case = first_case(fault)
    right = {"refused": "ValueError: all ranks must have", "broken": "RuntimeError: closed"}
    other = Outcome(None, right.get(ranked.FAULTS[fault].expected, "ValueError: no"), 0.1)
    spoilt = (case.faulty + 1) % len(case.spread.sizes)
    every = [outcome if k == spoilt else other for k in range(len(case.spread.sizes))]
    runner = Runner()
    monkeypatch.setattr(runner, "_outcomes", lambda case: every)
    assert any(f"rank {spoilt}" in line for line in runner.run(case).wrong)


def test_numbers_in_place_of_nan_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = first_case("NaN", lambda case: case.spread.reduction == "mean")
    shapes: Any = ranked.faults.of_one_process(case.spread, case.faulty)
    assert shapes["loss"].isnan()
    runner, one = Runner(), case.spread

    def outcome(rank: int) -> Outcome:
        rows = one.part(rank)
        return Outcome({
            name: torch.zeros_like(t[rows] if name[1:] in ranked.spread.ROWS + ranked.spread.COLUMNS
                                   else t)
            for name, t in shapes.items()
        }, "", 0.1)  # fmt: skip

    monkeypatch.setattr(
        runner, "_outcomes", lambda case: [outcome(k) for k in range(len(one.sizes))]
    )
    assert "loss: a number in place of NaN" in runner.run(case).wrong


def test_growth_is_found() -> None:
    flat = [Held(100.0, 200.0 + 30 * (k < 5) + k % 3, 40, 8) for k in range(50)]
    assert growth(flat) == []
    for name in Held._fields:
        each = 1 if name == "rss" else 8  # measurements until one more
        leaking = [h._replace(**{name: getattr(h, name) + k // each}) for k, h in enumerate(flat)]
        assert len(growth(leaking)) == 1 and name in growth(leaking)[0]


def test_memory_that_is_held_is_measured() -> None:
    before = held()
    blocks = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
    after = held()
    assert 31 < after.allocated - before.allocated < 40 and after.rss - before.rss > 30
    del blocks
    assert held().allocated < before.allocated + 8
