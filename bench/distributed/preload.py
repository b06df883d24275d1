"""What ranks need, imported once by the server that they are forked from: nothing is run here."""

import contextlib

from ..baselines import Unavailable
from . import methods, rank  # noqa: F401 -- for those that are forked

for method in methods.of("clip"):
    with contextlib.suppress(Unavailable, ImportError):
        methods.make("clip", method, 0, 1)
