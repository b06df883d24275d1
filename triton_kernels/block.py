"""A rectangular block of logits on the host: operands, their layout, and parts of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import card, configurations, parts, plan, split, weights
from .card import COLUMNS, ROWS, takes_split, takes_tf32
from .configurations import Config
from .epilogues import EPILOGUES
from .kept import Kept
from .plan import Chunk, cdiv


class Block:
    """A rectangular block of logits as the kernels take it."""

    def __init__(
        self, x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None,
        scale: Tensor, bias: Tensor | None, offset: int, loss: str,
    ) -> None:  # fmt: skip
        self.m, self.n, self.d = x.shape[0], y.shape[0], x.shape[1]
        self.loss, self.epilogue = loss, EPILOGUES[loss]
        self.tf32, self.split = takes_tf32(x), takes_split(x)
        self.x, self.y = (self._rows(t) for t in (x, y))
        # As products take them, `depth` features long.
        self.depth = split.padded(self.d) if self.split else self.d
        self.operands = (self.x, self.y)
        if self.split:
            self.operands = (self._parts(self.x), self._parts(self.y))
        self.factor_x, self.factor_y = (
            None if f is None else f.to(torch.float32).contiguous() for f in (factor_x, factor_y)
        )
        self.scale, self.bias = scale, bias if self.epilogue.uses_bias else None
        self.unit = self._unit()
        # Beyond the block every offset is alike; within 32 bits there is one kernel for all.
        self.offset = max(-self.m, min(offset, self.n))
        self.is_small = plan.is_small(self.m, self.n)

    def _rows(self, x: Tensor) -> Tensor:
        side_by_side = x.stride(1) == 1 or x.shape[1] == 1
        # Descriptors take no rows that overlap, such as one row expanded.
        apart = x.stride(0) >= x.shape[1] or x.shape[0] == 1
        x = x if side_by_side and apart else x.contiguous()
        if not self.tf32:
            return x
        rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        card.launch(
            weights.to_tf32_kernel, cdiv(x.shape[0], ROWS), x, rounded, *x.shape, x.stride(0),
            ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip
        return rounded

    def _parts(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), 3 * self.depth, dtype=torch.bfloat16, device=x.device)
        card.launch(
            parts.to_parts_kernel, cdiv(len(x), ROWS), x, out, *x.shape, x.stride(0),
            WIDTH=self.depth, ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip
        return out

    def _unit(self) -> int:
        """Elements in 16 bytes, if every row of both operands begins on 16 bytes, else 1."""
        unit = 16 // self.operands[0].element_size()
        for t in self.operands:
            if t.data_ptr() % 16 or t.shape[1] % unit or t.stride(0) % unit:
                return 1
        return unit

    def features(self, chunk: Chunk, config: Config | None = None) -> tuple[Any, Any]:
        """x and y of a chunk, which is a block of its own; as descriptors if a config is given and
        asks for them."""
        x, y = self.operands
        x, y = x[chunk.row_slice], y[chunk.column_slice]
        if config is None or not config.descriptors:
            return x, y
        return card.described(x, config.bm, config.bk), card.described(y, config.bn, config.bk)

    def affine(self, chunk: Chunk) -> tuple[Any, ...]:
        """What makes logits of the products of a chunk's features."""
        fx, fy = self.factor_x, self.factor_y
        return (
            None if fx is None else fx[chunk.row_slice],
            None if fy is None else fy[chunk.column_slice], self.scale, self.bias,
        )  # fmt: skip

    def offset_of(self, chunk: Chunk) -> int:
        """A chunk's offset, again within 32 bits."""
        offset = self.offset + chunk.start - chunk.column_start
        return max(-chunk.rows, min(offset, chunk.columns))

    def skipped(self, chunk: Chunk) -> int:
        """Tiles of each row of tiles that the edges' launch takes: all in a small block, which
        waits for launches."""
        if self.is_small:
            return chunk.columns // chunk.bn
        return chunk.skipped(self.offset_of(chunk))

    @property
    def width(self) -> int:
        """Features of an operand, in units."""
        return self.depth // self.unit

    @property
    def strides(self) -> tuple[int, int]:
        """Of rows, in units."""
        x, y = self.operands
        return x.stride(0) // self.unit, y.stride(0) // self.unit

    @property
    def precision(self) -> str:
        """Of the products."""
        return "tf32" if self.tf32 else "split" if self.split else "ieee"

    def tiles(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments of every kernel that makes tiles."""
        return {
            "BM": config.bm, "BN": config.bn, "BK": config.bk, "EVEN": self.depth % config.bk == 0,
            "PRECISION": self.precision, "UNIT": self.unit, "num_warps": config.warps,
            "num_stages": config.stages,
        }  # fmt: skip

    def plain_tiles(self, config: Config) -> dict[str, Any]:
        """And of one for plain tiles."""
        return {
            "D": self.width, "GROUP": config.group, "SLICES": config.slices,
            "DESCRIBED": config.descriptors, **self.tiles(config),
        }  # fmt: skip

    def programs(self, tiles: int, config: Config) -> int:
        """For so many plain tiles."""
        if not config.descriptors:
            return tiles
        return min(tiles, card.room(self.x.device, config, self.operands[0].element_size()))

    @property
    def kind_of_weights(self) -> str:
        """Configurations that the kernels have which make weights."""
        if self.is_small:
            return "small"
        return "weigh" if self.epilogue.is_light else "both"

    def config(self, kind: str, run: Callable[[Config], object] | None = None) -> Config:
        x = self.x
        return configurations.choose(
            x.device, x.dtype, self.tf32, self.d, self.unit, kind, run, self.split
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def kept(self, kept: Tensor) -> Kept:
        """The parts of what a first sweep has kept; a small one keeps nothing."""
        return Kept() if self.is_small else Kept.of(kept, self.m, self.n, self.x)

    def new_states(self) -> tuple[Tensor, Tensor]:
        positive = self.empty(self.m, dtype=torch.float64)
        if self.offset < 0 or self.m + self.offset > self.n:  # rows without a positive
            positive.fill_(torch.nan)
        return self.empty(2, self.m + self.n, dtype=torch.float64), positive
