"""`cached_step`: the gradients of a batch that the towers cannot hold at once."""

from .step import cached_step

__all__ = ["cached_step"]
