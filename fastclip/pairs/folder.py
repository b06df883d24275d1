"""Rows of a folder of images, with a .txt of the same stem beside each."""

import os
from collections.abc import Iterator
from pathlib import Path

from .pair import LeftOut, Pair, Place

# The endings of files that count as images. Pillow reads more, but a PDF beside a text is no pair.
IMAGES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
)
NO_TEXT, NO_CAPTION, NOT_UTF_8 = "no .txt beside it", "no caption", "caption not in UTF-8"


def read_folder(folder: Path, left_out: LeftOut) -> Iterator[Pair]:
    """Yields a row for each image at any depth. Each line of its .txt is a caption."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(files)
        for file in sorted(files):
            stem, ending = os.path.splitext(file)
            if ending.lower() not in IMAGES or file.startswith("."):
                continue
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()
            if f"{stem}.txt" not in present:
                left_out.add(NO_TEXT, name)
                continue
            captions = captions_of(path.with_name(f"{stem}.txt").read_bytes())
            if captions:
                yield Pair(name, Place(os.fspath(path)), captions, name)
            else:
                left_out.add(NO_CAPTION if captions == () else NOT_UTF_8, name)


def captions_of(text: bytes) -> tuple[str, ...] | None:
    """Returns the lines of a text file that are not blank, or None if it is not UTF-8."""
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return None
    return tuple(line.strip() for line in lines if line.strip())
