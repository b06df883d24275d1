"""Looks at the tensors that operators return."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorResults(TorchDispatchMode):
    """Calls `see` with the tensors that each operator has returned."""

    def see(self, tensors: list[Tensor]) -> None:
        raise NotImplementedError

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        self.see([one for one in tree_leaves(found) if isinstance(one, Tensor)])
        return found
