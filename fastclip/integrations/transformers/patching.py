"""Fuses all models of transformers' known classes."""

from __future__ import annotations

import functools

from ..host import disabled
from ..on_import import forget, on_import
from ..replacements import Replacements
from .families import FAMILIES
from .family import Family
from .forms import other_form
from .forward import HOST, Options, fused_forward, own_forward

_REPLACED = Replacements()


def patch(*, keep_logits: bool = False, across_ranks: bool = True, uneven: bool = True) -> None:
    """Fuses the loss of every model of the known classes in this process, new ones and those that
    exist already. `fuse` says what changes; a second call sets the options anew. Files of models
    that are not imported yet are patched when they are.

    Classes that this version of transformers does not have are left out. A class whose forward has
    an unknown form keeps it, with a warning. FASTCLIP_DISABLE=1 leaves transformers as it is.

    Raises:
        ImportError: transformers is not installed, or of a version that is not known.
    """
    if disabled():
        return
    version = HOST.load().__version__
    unpatch()
    options = Options(keep_logits, across_ranks, uneven)
    for family in FAMILIES:
        on_import(family.path, functools.partial(_fuse_class, family, options, version))


def _fuse_class(family: Family, options: Options, version: str) -> None:
    known = family.find()
    if known is None:
        return
    reason = other_form(known, family)
    if reason is not None:
        HOST.falls_back(f"{family.name}.forward of {version} has an unknown form, {reason}")
        return
    _REPLACED.replace(known, "forward", fused_forward(own_forward(known), family, options))


def unpatch() -> None:
    """Gives the classes their own forward again. Models that `fuse` fused remain so, and models
    whose forward Accelerate has wrapped in the meantime, for mixed precision or devices."""
    for family in FAMILIES:
        forget(family.path)
    _REPLACED.restore()
