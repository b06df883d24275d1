"""The losses that tests run by name, fused and dense: a new loss is added here."""

from collections.abc import Callable

from torch import Tensor

from fastclip import reference
from fastclip.loss import clip_loss, siglip_loss

LOSSES: dict[str, Callable[..., Tensor]] = {"clip": clip_loss, "siglip": siglip_loss}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "clip": reference.clip_loss,
    "siglip": reference.siglip_loss,
}
