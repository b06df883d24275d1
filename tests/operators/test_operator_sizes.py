"""The operators refuse arguments that do not fit together, naming them, before they read memory.

These errors are raised only when calling operators directly: the losses pass arguments that fit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.block_operators import make_weights, operator, sweep
from support.dense_block import Block, Weights, make_block

from fastclip.engine.kept import rows_to_keep

pytestmark = pytest.mark.usefixtures("on_the_device")

M, N = 9, 7
FACTORS = r"factor_x must be \(M\), factor_y \(N\)"
STATES = r"state must be \(2, M \+ N\).*coefficients \(M \+ N\), positive and positive_weight \(M\)"
KEPT = r"kept must come from a sweep of the same features"
LEVELS = r"levels must be \(M \+ N\) float64 for a kind with levels, got"
POSITIVES = r"a kind with levels must have no positives by id, got 'hinge'"
FEATURES = r"x and y must be non-empty \(M, D\) and \(N, D\) of one dtype"
LINES = r"state must be \(2, L\) and positive \(P\), P a divisor of L"


class Call:
    """Calls the operators on one block; the test changes one of their arguments."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.block = make_block(M, N, 5, factors=(True, True))
        keep = rows_to_keep(M, N, 4, 1 << 20) if engine == "cpu" else 0
        self.state, self.positive, self.kept = sweep(engine, self.block, keep)
        self.weights: Weights = make_weights(self.state, M)

    def _block(self, changes: dict[str, Any]) -> Block:
        return self.block._replace(
            **{name: changes[name] for name in Block._fields if name in changes}
        )

    def sweep(self, **changes: Any) -> object:
        return sweep(self.engine, self._block(changes), levels=changes.get("levels"))

    def weigh(self, **changes: Any) -> object:
        block = self._block(changes)
        given = {
            "state": self.state, "positive": self.positive, "kept": self.kept,
            "coefficients": self.weights.coefficients,
            "positive_weight": self.weights.positive_weight, "gain": self.weights.gain,
        }  # fmt: skip
        given |= {name: value for name, value in changes.items() if name in given}
        return operator("weigh", self.engine)(
            *block.arguments, *given.values(), True, True, False, False, torch.float32,
            torch.float32,
        )  # fmt: skip

    def in_one_go(self, **changes: Any) -> object:
        block = self._block({"kind": "sigmoid"} | changes)
        return operator("sweep_and_weigh", self.engine)(
            *block.arguments, self.weights.gain, True, True, False
        )

    def finish(self, **changes: Any) -> object:
        given = {
            "state": self.state[:, :M].contiguous(), "positive": self.positive,
            "scale": self.block.scale, "bias": None, "kind": "softmax",
        }  # fmt: skip
        return operator("finish", self.engine)(*(given | changes).values())


def vectors(name: str, right: int, *operators: str) -> dict[str, tuple]:
    """Vectors too short, too long, and of one element, which plain PyTorch would broadcast."""
    pattern = FACTORS if name.startswith("factor") else STATES
    return {
        f"{operator}: {name} of {count}": (
            operator, pattern, lambda count=count: {name: torch.ones(count, dtype=torch.float64)},
        )
        for operator in operators
        for count in (right - 1, right + 1, 1)
    }  # fmt: skip


def states(lines: int, rows: int = 2, dtype: torch.dtype = torch.float64) -> Callable[[], dict]:
    return lambda: {"state": torch.ones(rows, lines, dtype=dtype)}


def levels(count: int | None, kind: str = "hinge", dtype: torch.dtype = torch.float64) -> Callable:
    return lambda: {
        "levels": None if count is None else torch.zeros(count, dtype=dtype), "kind": kind
    }  # fmt: skip


def kept(count: int, dtype: torch.dtype = torch.float32, step: int = 1) -> Callable[[], dict]:
    return lambda: {"kept": torch.zeros(count * step, dtype=dtype)[::step]}


def positives_by_id() -> dict[str, Any]:
    ids = {"ids_x": torch.zeros(M, dtype=torch.int32), "ids_y": torch.zeros(N, dtype=torch.int32)}
    return {"kind": "hinge", "same_id_positive": True, **ids}


# By name: the operator, a pattern of the error, and the changed argument.
MISFITS = {
    **vectors("factor_x", M, "sweep", "weigh", "in_one_go"),
    **vectors("factor_y", N, "sweep", "weigh", "in_one_go"),
    **vectors("coefficients", M + N, "weigh"),
    **vectors("positive", M, "weigh"),
    **vectors("positive_weight", M, "weigh"),
    "weigh: state too short": ("weigh", STATES, states(M + N - 1)),
    "weigh: state too long": ("weigh", STATES, states(M + N + 1)),
    "weigh: state of one row": ("weigh", STATES, states(M + N, rows=1)),
    "weigh: state of float32": ("weigh", STATES, states(M + N, dtype=torch.float32)),
    "sweep: levels too short": ("sweep", LEVELS, levels(M + N - 1)),
    "sweep: one level": ("sweep", LEVELS, levels(1)),
    "sweep: levels of float32": ("sweep", LEVELS, levels(M + N, dtype=torch.float32)),
    "sweep: levels of no use": ("sweep", "levels must be None", levels(M + N, "softmax")),
    "sweep: levels and positives by id": ("sweep", POSITIVES, positives_by_id),
    "weigh: levels and positives by id": ("weigh", POSITIVES, positives_by_id),
    "finish: levels": (
        "finish", "levels must not be finished, got 'hinge'", lambda: {"kind": "hinge"},
    ),
    "weigh: kept of float64": ("weigh", KEPT, kept(16 * N, torch.float64)),
    "weigh: kept of no whole rows": ("weigh", KEPT, kept(16 * N - 1)),
    "weigh: kept with strides": ("weigh", KEPT, kept(16 * N, step=2)),
    "finish: state of one row": ("finish", LINES, states(M, rows=1)),
    "finish: state of three rows": ("finish", LINES, states(M, rows=3)),
    "finish: positive that is no divisor": (
        "finish", LINES, lambda: {"positive": torch.ones(4, dtype=torch.float64)},
    ),
    "finish: no positive": (
        "finish", LINES, lambda: {"positive": torch.ones(0, dtype=torch.float64)},
    ),
}  # fmt: skip

SPOILT = {
    "widths": (RuntimeError, FEATURES, lambda b: {"y": b.y[:, :4]}),
    "rank": (RuntimeError, FEATURES, lambda b: {"x": b.x[None]}),
    "dtypes": (RuntimeError, FEATURES, lambda b: {"y": b.y.half()}),
    "no rows": (RuntimeError, FEATURES, lambda b: {"x": b.x[:0]}),
    "no columns": (RuntimeError, FEATURES, lambda b: {"y": b.y[:0]}),
    "integers": (
        TypeError, r"float64, float32, bfloat16 or float16",
        lambda b: {"x": b.x.int(), "y": b.y.int()},
    ),
    "kind": (ValueError, r"'softmax', 'sigmoid', 'hinge', got 'none'", lambda b: {"kind": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_arguments_of_another_size_are_refused(engine: str, name: str) -> None:
    called, pattern, change = MISFITS[name]
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        getattr(Call(engine), called)(**change())


@pytest.mark.parametrize("name", SPOILT)
def test_invalid_blocks_are_refused(engine: str, name: str) -> None:
    error, pattern, spoil = SPOILT[name]
    call = Call(engine)
    for called in (call.sweep, call.weigh, call.in_one_go):
        with pytest.raises(error, match=pattern):
            called(**spoil(call.block))


@pytest.mark.parametrize("name", ["scale", "bias", "gain"])
def test_scalars_must_have_one_element(engine: str, name: str) -> None:
    call = Call(engine)
    two = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"{name} must have one element"):
        call.weigh(kind="sigmoid", **{name: two})


def test_a_kind_with_levels_needs_them(engine: str) -> None:
    block = make_block(M, N, 5, kind="hinge")
    with pytest.raises(RuntimeError, match=f"{LEVELS} None"):
        operator("sweep", engine)(*block.arguments, None, None, None, 0)


def test_arguments_that_fit_are_accepted(engine: str) -> None:
    call = Call(engine)
    for called in (call.sweep, call.weigh, call.in_one_go, call.finish):
        called()
    # Each positive belongs to two lines: a row and a column of a square block.
    call.finish(state=torch.ones(2, 2 * M, dtype=torch.float64))
