"""The engines that are the defaults here."""

from __future__ import annotations

import torch

from ..engine import backends


def defaults() -> dict[str, str]:
    """The engine that `backend=None` takes on each device type, or the error that it raises."""
    found = {}
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
            found[kind] = backends.choose(None, device, torch.bfloat16, 1 << 20, 512)
        except ValueError as error:
            found[kind] = str(error)
    return found
