"""The comparison of a model's two encodings of a micro-batch, which must be the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .outputs import Outputs

# Differences between the norms of rows up to these are rounding: a compiled tower, or another
# kernel of attention, may round otherwise without a graph.
_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 2e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# On GPUs convolutions take tf32 by default, and a model may enter autocast by itself.
_ON_GPUS = 5e-2


class _Differences(NamedTuple):
    """The norms of rows, and of the rows' differences, of each micro-batch: (m) each."""

    tolerance: float
    norms: list[Tensor]
    differences: list[Tensor]

    def excess(self, device: torch.device) -> Tensor:
        """Returns each row's difference as a multiple of what rounding explains, (N).

        It is relative to the row's norm or, for a row below the average, to the average norm. Rows
        that were not finite at first count as equal: the loss shows them.
        """
        norms, differences = (
            torch.cat([part.to(device) for part in parts])
            for parts in (self.norms, self.differences)
        )
        limits = torch.finfo(norms.dtype)
        average = norms.nan_to_num(0.0, 0.0, 0.0).mean()
        relative = differences / norms.maximum(average).clamp_min(limits.tiny)
        relative = relative.nan_to_num(nan=limits.max, posinf=limits.max)
        return torch.where(norms.isfinite(), relative, 0).float() / self.tolerance


class Comparison:
    """Collects differences on the devices of the outputs; they are read once, at the end.

    parameters: those of the model, whose dtype, or that of autocast, may be coarser than that of
    the features. device: that of the loss.
    """

    def __init__(self, parameters: list[Tensor], device: torch.device) -> None:
        self._device = device
        self._coarsest = max(
            (_TOLERANCES.get(p.dtype, 0.0) for p in parameters if p.is_floating_point()),
            default=0.0,
        )
        self._found: dict[str, _Differences] = {}

    @torch.no_grad()
    def add(self, first: Outputs, again: Outputs) -> None:
        """Compares the outputs of a micro-batch's two encodings."""
        if first.shapes() != again.shapes():
            raise ValueError(
                "the model must return the same entries and shapes both times, got "
                f"{first.shapes()}, then {again.shapes()}"
            )
        for index, (a, b) in enumerate(zip(first.values, again.values, strict=True)):
            if isinstance(a, Tensor) and a.is_floating_point():
                name = first.name_of(index)
                found = self._found.setdefault(name, _Differences(self._tolerance(a), [], []))
                a, b = map(_as_rows, (a, b))
                found.norms.append(a.norm(dim=1))
                found.differences.append((a - b).norm(dim=1))

    def largest_excess(self) -> Tensor:
        """Returns the largest difference over that which rounding explains, ()."""
        excesses = [found.excess(self._device) for found in self._found.values()]
        largest = [excess.amax() for excess in excesses if len(excess)]
        return torch.stack(largest).amax() if largest else torch.zeros((), device=self._device)

    def error(self) -> str:
        """Returns the message for a difference on this rank or another one."""
        worst, where = 1.0, "another rank"
        for name, found in self._found.items():
            excess = found.excess(self._device).tolist()
            if max(excess, default=0.0) > worst:
                worst = max(excess)
                row, micro_batch = excess.index(worst), 0
                while row >= len(found.norms[micro_batch]):
                    row, micro_batch = row - len(found.norms[micro_batch]), micro_batch + 1
                where = f"{name} of micro-batch {micro_batch}"
        size = "" if worst <= 1 else f" that is {worst:.3g} times as large as rounding explains"
        return (
            "cached_step encodes each micro-batch twice, and the model must return the same both "
            f"times, got a difference in {where}{size}. The usual reasons are augmentation with a "
            "random generator of its own (the global ones of torch, numpy and Python are "
            "replayed), a counter that advances, inputs that a forward changes in place, and "
            "statistics that a forward updates and uses, as some batch normalisations do. The "
            "gradients that this step added are wrong; check=False accepts them"
        )

    def _tolerance(self, x: Tensor) -> float:
        found = max(self._coarsest, _TOLERANCES.get(x.dtype, 0.0))
        if x.device.type != "cpu" and x.dtype != torch.float64:
            found = max(found, _ON_GPUS)
        if torch.is_autocast_enabled(x.device.type):
            found = max(found, _TOLERANCES.get(torch.get_autocast_dtype(x.device.type), 0.0))
        return found


def _as_rows(x: Tensor) -> Tensor:
    """Returns x as (m, k), in float32 at least; a number as one row."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.flatten(1) if x.dim() > 1 else x.reshape(1, 1)
