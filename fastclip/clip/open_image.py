"""Opens an image file as colours on white, upright, with 8 bits: the same for training and use."""

import os
from typing import BinaryIO

from PIL import Image, ImageOps

# The endings of files that count as images in a folder. Pillow reads more, such as PDF.
ENDINGS = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def open_image(
    file: str | os.PathLike[str] | BinaryIO, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """Returns the image in the mode RGB, turned as its EXIF data says. Transparent pixels show
    white. An image of 16 bits keeps the upper 8.

    Args:
        at_least: width and height that suffice. A JPEG decoder can shrink by 2, 4 or 8 at a
            fraction of the time; None: never.

    Raises:
        ValueError: the pixels have 32 bits, whose range is unknown.
        Exception: of many kinds, as Pillow's decoders do.
    """
    with Image.open(file) as opened:
        if at_least is not None:
            opened.draft("RGB", at_least)
        image = _eight_bits(ImageOps.exif_transpose(opened), opened.format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, form: str | None) -> Image.Image:
    """Returns an image whose conversion to RGB keeps its brightness."""
    # Pillow holds 16 bits of a PGM, and of a PNG before Pillow 11.3, in the mode I, scaled.
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        # convert("L") alone cuts off at 255 instead of scaling.
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels must have 8 or 16 bits, got 32 (Pillow's mode {image.mode})")
    return image
