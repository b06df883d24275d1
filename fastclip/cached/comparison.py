"""The comparison of a model's two encodings of a micro-batch, which must be the same."""

from __future__ import annotations

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


class Comparison:
    """Collects differences on the device of the loss; they are read once, at the end.

    parameters: those of the model, whose dtype, or that of autocast, may be coarser than that of
    the features.
    """

    def __init__(self, parameters: list[Tensor], device: torch.device) -> None:
        self._device = device
        self._coarsest = max(
            (_TOLERANCES.get(p.dtype, 0.0) for p in parameters if p.is_floating_point()),
            default=0.0,
        )
        self._names: list[str] = []
        self._excesses: list[Tensor] = []

    def add(self, micro_batch: int, first: Outputs, again: Outputs) -> None:
        """Compares the outputs of a micro-batch's two encodings."""
        if first.shapes() != again.shapes():
            raise ValueError(
                "the model must return the same entries and shapes both times, got "
                f"{first.shapes()}, then {again.shapes()}"
            )
        for index, (a, b) in enumerate(zip(first.values, again.values, strict=True)):
            if isinstance(a, Tensor) and a.is_floating_point():
                self._names.append(f"{first.name_of(index)} of micro-batch {micro_batch}")
                self._excesses.append(_difference(a.detach(), b.detach()) / self._tolerance(a))

    def largest_excess(self) -> Tensor:
        """Returns the largest difference over that which rounding explains, ()."""
        if not self._excesses:
            return torch.zeros((), device=self._device)
        return torch.stack([excess.to(self._device) for excess in self._excesses]).amax()

    def error(self) -> str:
        """Returns the message for a difference on this rank or another one."""
        excesses = [float(excess) for excess in self._excesses]
        worst = max(excesses, default=0.0)
        where = "another rank" if worst <= 1 else self._names[excesses.index(worst)]
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


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Returns the largest norm of a row of a - b, relative to that row's norm in a or, for a row
    below the average, to the average norm; () in float32. Rows that are not finite in a
    count as equal: the loss shows them."""
    if not a.numel():
        return torch.zeros((), device=a.device)
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
    a, b = (t.reshape(t.shape[0] if t.dim() > 1 else 1, -1) for t in (a, b))
    norms = a.norm(dim=1)
    most = torch.finfo(norms.dtype)
    average = norms.nan_to_num(0.0, 0.0, 0.0).mean()
    relative = (a - b).norm(dim=1) / norms.maximum(average).clamp_min(most.tiny)
    relative = relative.nan_to_num(nan=most.max, posinf=most.max)
    return torch.where(norms.isfinite(), relative, 0).amax().float()
