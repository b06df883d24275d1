"""What ranks need, imported once by the server that they are forked from: nothing is run here."""

import contextlib

from ..losses import LOSSES
from ..methods.registry import Unavailable
from . import methods, rank  # noqa: F401 -- for those that are forked

for loss in LOSSES:
    for method in methods.of(loss):
        with contextlib.suppress(Unavailable, ImportError):
            methods.make(loss, method, 0, 1)
