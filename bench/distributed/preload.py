"""Imports the modules that ranks need, once, in the server that they are forked from."""

import contextlib

from ..losses import LOSSES
from ..methods.registry import Unavailable
from . import methods, rank  # noqa: F401 -- for the forked processes

for loss in LOSSES:
    for method in methods.names_of(loss):
        with contextlib.suppress(Unavailable, ImportError):
            methods.make(loss, method, 0, 1)
