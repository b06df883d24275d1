"""Decodes images to the model's size, in worker processes.

An image is turned as its EXIF data says, put on white where it is transparent, and a square of it
is resized: the largest one in the middle for an evaluation, a random box of about its size for a
training.
"""

import io
import math
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..clip.open_image import open_image
from .pair import Place

RATIO = 4 / 3  # of the sides of a training crop at most
CHUNK = 64  # images that a process decodes at a time
Box = tuple[float, float, float, float]
Crop = Callable[[int, int], tuple[Box, bool]]


class Augmentation(NamedTuple):
    """The training crops of images.

    smallest: the least area of a crop, as a share of the area of the largest square; 1 with no
        change of the sides' ratio.
    flip: whether half of the images are mirrored, at random.
    """

    smallest: float = 0.8
    flip: bool = False

    def crop(self, key: str) -> Crop:
        """Returns the crop that the key determines."""
        chance = random.Random(key)

        def box(width: int, height: int) -> tuple[Box, bool]:
            side = min(width, height) * math.sqrt(chance.uniform(self.smallest, 1))
            # A crop of the largest area is the square itself.
            most = min(math.log(RATIO), -math.log(self.smallest)) / 2
            stretch = math.exp(chance.uniform(-most, most))
            w, h = min(side * stretch, width), min(side / stretch, height)
            left, top = chance.uniform(0, width - w), chance.uniform(0, height - h)
            return (left, top, left + w, top + h), self.flip and chance.random() < 0.5

        return box


def middle(width: int, height: int) -> tuple[Box, bool]:
    """Returns the largest square in the middle of an image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side), False


def decode(data: bytes, side: int, crop: Crop = middle) -> Tensor:
    """Returns an image file's pixels, (3, side, side) uint8.

    Raises:
        Exception: of many kinds, as Pillow's decoders do.
    """
    # Resizing needs some pixels to average. A crop's side was 27.7 % of the image's shorter one at
    # least, at --crop 0.1.
    image = open_image(io.BytesIO(data), (3 * side, 3 * side))
    box, mirrored = crop(*image.size)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if mirrored:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def as_input(pixels: Tensor) -> Tensor:
    """Returns pixels, uint8, as the model takes them: in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def load_image(path: str | os.PathLike[str], side: int) -> Tensor:
    """Returns an image file as the model takes it, (3, side, side) in [-1, 1]."""
    return as_input(decode(Place(os.fspath(path)).read(), side))


class Images(Dataset):
    """Images at places: `images[number, crop key]` are pixels, (3, side, side) uint8. A key of ""
    is the middle."""

    def __init__(
        self, places: Sequence[Place], side: int, augmentation: Augmentation | None = None
    ) -> None:
        self.places, self.side, self.augmentation = places, side, augmentation

    def __getitem__(self, wanted: tuple[int, str]) -> Tensor:
        number, key = wanted
        crop = self.augmentation.crop(key) if self.augmentation and key else middle
        return decode(self.places[number].read(), self.side, crop)


def in_processes(
    dataset: Dataset, batches: Iterable[list[Any]], processes: int, ahead: int = 2
) -> Iterator[Tensor]:
    """Yields the stacked items of each batch of keys, in order, computed by worker processes (0:
    by this one). `ahead` batches are computed for each process in advance."""
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=processes, worker_init_fn=_prepare_process,
        prefetch_factor=ahead if processes else None, generator=torch.Generator(),
    )  # fmt: skip
    return iter(loader)


def _prepare_process(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal. The training one finishes its step, and needs
    this one for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_pillow()


def quiet_pillow() -> None:
    """Turns off Pillow's warnings of large images and broken EXIF data, which it reads anyway:
    they would come in every epoch."""
    warnings.filterwarnings("ignore", module="PIL")


def chunks(count: int, size: int = CHUNK) -> Iterator[range]:
    """Yields the numbers below `count` in ranges of at most `size`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
