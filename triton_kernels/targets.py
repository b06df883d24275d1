"""The host's view of a block's targets: their operands, and their logits' arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..engine.block import Block
from .configurations import Config
from .plan import Chunk


class Targets:
    """The targets of a block as the kernels take them. A guide has no scale."""

    # owner is a LogitBlock, whose module imports this one.
    def __init__(self, owner: Any, block: Block) -> None:
        x, y = (owner.rows_of(side.target) for side in (block.x, block.y))
        self.depth = owner.depth_of(x.shape[1])
        self.x, self.y = (owner.operand_of(t, self.depth) for t in (x, y))
        self.unit = owner.unit_of((self.x, self.y))
        self.factor_x, self.factor_y = (
            None if side.target_factor is None else side.target_factor.float().contiguous()
            for side in (block.x, block.y)
        )
        self.scale = block.target_scale

    def arguments(self, chunk: Chunk) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
        """Returns a chunk's TARGETS and TARGET_LOGITS (`kernels/targets.py`)."""
        rows, columns = chunk.row_slice, chunk.column_slice
        factors = (
            None if self.factor_x is None else self.factor_x[rows],
            None if self.factor_y is None else self.factor_y[columns],
        )
        strides = self.x.stride(0) // self.unit, self.y.stride(0) // self.unit
        operands = (self.x[rows], self.y[columns], *strides, self.depth // self.unit)
        return operands, (*factors, self.scale, *(None,) * 7)

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments of the kernels that take targets."""
        return {"TARGET_EVEN": self.depth % config.bk == 0, "TARGET_UNIT": self.unit}


# The arguments of a block without targets.
ABSENT = (None, None)
ABSENT_CONSTANTS = {"TARGET_EVEN": True, "TARGET_UNIT": 1}
