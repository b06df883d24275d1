"""The second encoding of `cached_step`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .comparison import Comparison
from .gradients import Gradients, leaves_of, surrogate
from .outputs import FEATURES, Outputs
from .random_state import RandomState
from .towers import Towers
from .wrappers import without_exchange


class SecondPass:
    """Encodes the micro-batches again, with graphs, and sends their gradients into the model."""

    def __init__(
        self, towers: Towers, states: list[list[RandomState]], whole: Outputs,
        gradients: Gradients, backward: Callable[[Tensor], Any] | None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:  # fmt: skip
        self.towers = towers
        self.states = states
        self.whole = whole
        self.gradients = gradients
        self.backward = backward or Tensor.backward
        self.no_sync = no_sync
        self.divisor: Tensor | None = None
        self.comparison: Comparison | None = None
        # These get their gradients once, with the last micro-batch.
        once = list(gradients.of_leaves)
        if towers.is_pair:
            once += zip(towers.shared_values(), gradients.of_outputs[2:], strict=True)
        self.once = [(t, g) for t, g in once if g is not None and t.requires_grad]
        # Lightning's backward exchanges gradients with every micro-batch unless there is a no_sync,
        # and DDP then expects one of every parameter.
        self.has_all_parameters = backward is not None

        # A tower whose features get no gradient is not encoded again.
        self.jobs = [
            (place, index)
            for place, tower in enumerate(towers.parts)
            for index in range(len(tower.sizes))
            if not towers.is_pair or gradients.of_outputs[place] is not None
        ] or [None]

    def jobs_before_exchange(self, in_step: bool) -> int:
        """Returns the number of first jobs in which no rank waits for another one. in_step: the
        forward of a wrapper exchanges."""
        own_backward = self.has_all_parameters
        if in_step or (own_backward and self.no_sync is None):
            return 0
        if own_backward or any(tower.wrappers for tower in self.towers.parts):
            return 0 if self.jobs[0] is None else len(self.towers.parts[self.jobs[0][0]].sizes) - 1
        return len(self.jobs)

    def run(self, jobs: slice) -> None:
        for job in self.jobs[jobs]:
            if job is None:
                self._send(self.once)
            else:
                self._encode(*job, is_last=job == self.jobs[-1])

    def _encode(self, place: int, index: int, is_last: bool) -> None:
        tower = self.towers.parts[place]
        self.states[place][index].set()
        is_last_of_tower = index == len(tower.sizes) - 1
        with nullcontext() if is_last_of_tower else without_exchange(tower.wrappers, self.no_sync):
            with torch.enable_grad():
                again = tower.encode(index)
            outputs = slice(place, place + 1) if self.towers.is_pair else slice(None)
            gradients = self.gradients.of_outputs[outputs]
            names = FEATURES[outputs] if self.towers.is_pair else self.whole.names
            first = Outputs(self.whole.values[outputs], names)
            rows = tower.rows(index)
            if self.comparison is not None:
                self.comparison.add(first.of_rows(rows), again)
            found = [
                (value, gradient[rows] if again.has_rows(i) else gradient)
                for i, (value, gradient) in enumerate(zip(again.values, gradients, strict=True))
                if gradient is not None and value.requires_grad
            ]
            of_rows = [(t, g) for t, g in found if t.dim() > 1]
            of_batch = [(t, g) for t, g in found if t.dim() < 2] + self.once
            if is_last:
                self._send(of_rows + of_batch)
            elif self.has_all_parameters:
                self._send(of_rows + _zeros(of_batch))
            else:
                self._send(of_rows)

    def _send(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            self.backward(surrogate(self.gradients.value, tensors, gradients, self.divisor))


def _zeros(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Returns the leaves behind these tensors, whose graphs serve one backward, with gradients of
    zero."""
    leaves = [x for t, _ in pairs for x in ([t] if t.is_leaf else leaves_of(t))]
    return [(x, torch.zeros_like(x)) for x in leaves]
