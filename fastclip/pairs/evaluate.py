"""Retrieval on held-out pairs: features that all ranks compute together, and their scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..clip.model import CLIP
from ..demo.workers import Workers
from ..retrieval import Ranks, ranks
from ..retrieval.metrics import as_metrics
from .chance import KS, chance
from .images import Images, as_input, chunks, in_processes
from .pair import Pair

Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Pairs to evaluate with.

    texts: their different captions. Images with an equal caption are all right answers to it.
    owns: (P, 2) int64, the numbers of an image and of a text that belong together.
    """

    images: Images
    texts: tuple[str, ...]
    owns: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Pair], side: int) -> "HeldOut":
        numbers: dict[str, int] = {}
        owns = [
            (image, numbers.setdefault(caption, len(numbers)))
            for image, pair in enumerate(pairs)
            for caption in pair.captions
        ]
        images = Images([pair.place for pair in pairs], side)
        return cls(images, tuple(numbers), torch.tensor(owns))

    def pixels(self, workers: Workers, processes: int) -> Iterator[Tensor]:
        """Yields this rank's part of the images in chunks, (b, 3, side, side) uint8."""
        own = own_part(len(self.images.places), workers)
        keys = [[(own[place], "") for place in chunk] for chunk in chunks(len(own))]
        return in_processes(self.images, keys, processes)

    def scores(self, features: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Returns the scores of features of all images and texts."""
        return as_metrics(self.ranks(features), "image", "text", KS)

    def ranks(self, features: tuple[Tensor, Tensor]) -> Ranks:
        # A model that has diverged gives all inputs the same features, whose scores are chance.
        images, texts = (side.nan_to_num(0, 0, 0) for side in features)
        return ranks(images, texts, pairs=self.owns.to(images.device))

    def chance(self) -> dict[str, float]:
        return chance(self.owns)


def own_part(count: int, workers: Workers) -> range:
    """Returns this rank's part of the numbers below `count`; the last ranks may have fewer."""
    each = -(-count // workers.size)
    return range(min(workers.rank * each, count), min((workers.rank + 1) * each, count))


@torch.no_grad()
def features(
    model: CLIP, held_out: HeldOut, pixels: Iterable[Tensor], encode: Encode, workers: Workers
) -> tuple[Tensor, Tensor]:
    """Returns the features of all held-out images (M, D) and texts (N, D), on every rank.

    pixels: from `HeldOut.pixels`.
    """
    training = model.training
    model.eval()
    device = model.logit_scale.device
    empty = torch.zeros(0, model.config.embed_dim, device=device)
    images = [model.encode_image(as_input(part.to(device))) for part in pixels]
    own = own_part(len(held_out.texts), workers)
    texts = [
        model.encode_text(encode(held_out.texts[own[part[0]] : own[part[-1]] + 1]))
        for part in chunks(len(own), 256)
    ]
    model.train(training)
    counts = len(held_out.images.places), len(held_out.texts)
    return tuple(
        _of_all_ranks(torch.cat([empty, *parts]), count, workers)
        for parts, count in zip((images, texts), counts, strict=True)
    )


def _of_all_ranks(own: Tensor, count: int, workers: Workers) -> Tensor:
    if workers.size == 1:
        return own
    padded = own.new_zeros(-(-count // workers.size), own.shape[1])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(workers.size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count]  # the parts before the last ones are full
