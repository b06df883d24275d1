"""Pictures as a model takes them: found, read, resized, normalised.

Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020: the shorter
side is resized with a bicubic filter, then the centre is cut out. SigLIP, arXiv 2303.15343, resizes
both sides.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .config import CLIPConfig
from .open_image import ENDINGS, open_image


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the files, and the pictures (by their endings) in folders and below, sorted. Hidden
    files and folders are left out unless named; a file is returned once.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        for file in inside(path) if path.is_dir() else [path]:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def inside(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def resized(image: Image.Image, config: CLIPConfig) -> Image.Image:
    """Returns a square with a side of `image_size`."""
    size, way = config.image_size, Image.Resampling[config.image_interpolation.upper()]
    if config.image_resize == "squash":
        return image.resize((size, size), way)
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    image = image.resize((width, height), way)
    # torchvision's rule, hence OpenAI's and open_clip's: halves are rounded to even numbers.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def read(path: str | Path, config: CLIPConfig) -> Tensor:
    """Returns a picture, (3, image_size, image_size) float32, normalised as in training.

    Raises:
        Exception: of many kinds, as Pillow's decoders do; the file is no readable picture.
    """
    square = resized(open_image(path), config)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    colours = pixels.reshape(config.image_size, config.image_size, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    return (colours - mean) / std
