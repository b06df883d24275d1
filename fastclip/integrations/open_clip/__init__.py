"""open_clip with fastclip's losses.

    from fastclip.integrations import open_clip
    open_clip.patch()

`python -m fastclip.patch open_clip_train.main ARGS` runs open_clip's trainer so patched.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

from torch import nn

from ...loss import open_clip as ours
from ..host import Host, disabled
from ..on_import import forget, on_import
from ..replacements import Replacements
from .metrics import MODULES, in_place_of

HOST = Host("open_clip", ("3.3", "4.2"))

NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")

_replacements = Replacements()


def patch() -> None:
    """Makes open_clip's `ClipLoss`, `CoCaLoss`, `DistillClipLoss` and `SigLipLoss` fastclip's, and
    the trainer's `get_clip_metrics`.

    Every name that these classes have in an imported module is replaced: in `open_clip`,
    `open_clip.loss` and `open_clip.factory`, for `create_loss` and the tasks of open_clip 4, and in
    the script that calls this. Losses that exist already stay open_clip's, as do its classes with
    `use_horovod=True`, which warn once.

    With FASTCLIP_DISABLE=1 nothing is patched. A second call does nothing.

    Raises:
        ImportError: open_clip is not installed, or is neither 3.3 nor 4.2.
    """
    if disabled() or _replacements:
        return
    HOST.load()
    from open_clip import loss as theirs

    made: dict[type, type] = {}
    for name in NAMES:  # a class after its base
        own = getattr(theirs, name)
        bases = [made[base] for base in own.__bases__ if base in made]
        made[own] = _in_place_of(own, getattr(ours, name), *bases)
    for own, fused in made.items():
        _replacements.replace_everywhere(own, fused)
    for name in MODULES:
        on_import(name, partial(_replace_metrics, name))


def unpatch() -> None:
    """Gives open_clip its own classes again. Losses made meanwhile stay fastclip's."""
    for name in MODULES:
        forget(name)
    _replacements.restore()


def _replace_metrics(name: str) -> None:
    own = getattr(sys.modules[name], "get_clip_metrics", None)
    if own is not None and own.__module__ == name:
        _replacements.replace_everywhere(own, in_place_of(own, HOST))


def _in_place_of(own: type, fused: type, *bases: type) -> type:
    """A class for calls that were meant for open_clip's own. bases: those in place of its bases."""
    parameters = inspect.signature(own)

    class Loss(fused, *bases):
        __doc__ = fused.__doc__

        def __new__(cls, *arguments: Any, **options: Any) -> nn.Module:
            theirs = {k: v for k, v in options.items() if k in parameters.parameters}
            given = parameters.bind_partial(*arguments, **theirs).arguments
            if cls is Loss and given.get("use_horovod"):
                HOST.falls_back("use_horovod=True")
                return own(*arguments, **options)
            return super().__new__(cls)

    # Under open_clip's name a pickled loss can be loaded where nothing is patched, as open_clip's.
    Loss.__name__, Loss.__qualname__, Loss.__module__ = own.__name__, own.__name__, own.__module__
    return Loss
