"""open_clip's conventions for values and gradients across ranks."""

from __future__ import annotations

from typing import NamedTuple


class GradientMode(NamedTuple):
    """The value that a rank returns, and the gradients that it gets.

    The defaults are exact: after DDP's mean over ranks all gradients are those of one process on
    the whole batch. The other combinations are open_clip's; `fastclip.distributed` has their table.
    """

    whole_value: bool = False  # True: the loss of all pairs; False: that of this rank's rows
    from_others: bool = True  # gradients include those of other ranks' losses
    ring: bool = False  # features travel around a ring instead of being gathered
