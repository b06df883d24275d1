"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`: passes of 2 M N D.

The counter's module imports Triton, so it is not imported here. The formulas are registered by the
first call of an operator after some other code has imported the counter.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from .block import Block, Side, SweepResults, Wanted
from .kept import Products, Weights
from .namespace import OPS


def _pass(block: Block) -> int:
    m, n = block.sizes()
    return 2 * m * n * block.x.features.shape[1]


def _target_pass(block: Block) -> int:
    if block.x.target is None:
        return 0
    return _pass(block._replace(x=Side(block.x.target), y=Side(block.y.target)))


def _sweep(*arguments: Any, **_: Any) -> int:
    block, _ = Block.of(arguments)
    return _pass(block) + _target_pass(block)


def _weigh(*arguments: Any, **_: Any) -> int:
    block, rest = Block.of(arguments)
    kept = SweepResults(*rest[: len(SweepResults._fields)]).kept
    wanted = Wanted(*rest[-len(Wanted._fields) :])
    kept_as = Weights if kept.dtype == torch.uint8 else Products
    x, y = block.x.features, block.y.features
    spared = 2 * kept_as.pairs(x, y, kept) * x.shape[1]
    made = _pass(block) * (1 + int(wanted.x) + int(wanted.y)) + _target_pass(block)
    return made - spared


def _sweep_and_weigh(*arguments: Any, **_: Any) -> int:
    block, (_, needs_x, needs_y, _) = Block.of(arguments)
    return _pass(block) * (1 + int(needs_x) + int(needs_y))


def _finish(*arguments: Any, **_: Any) -> int:
    return 0


def register_formulas() -> None:
    """Registers the formulas if the counter's module has been imported. Counters that are already
    active get them, too."""
    if "torch.utils.flop_counter" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    formulas = {
        getattr(OPS, name): formula
        for name, formula in {
            "sweep": _sweep, "weigh": _weigh, "sweep_and_weigh": _sweep_and_weigh,
            "finish": _finish,
        }.items()
    }  # fmt: skip
    for operator, formula in formulas.items():
        flop_counter.register_flop_formula(operator, get_raw=True)(formula)
    # A counter copies the formulas when it is constructed.
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            counter.flop_registry.update(formulas)
