"""Rows of a folder of images, with a .txt of the same stem beside each."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..clip.open_image import ENDINGS
from .pair import LeftOut, Pair, Place

NO_TEXT, NO_CAPTION, NOT_UTF_8 = "no .txt beside it", "no caption", "caption not in UTF-8"
NO_IMAGE, UNREADABLE, CLOSED = (
    "no image beside it", "the .txt cannot be read", "the folder cannot be read",
)  # fmt: skip


def read_folder(folder: Path, left_out: LeftOut) -> Iterator[Pair]:
    """Yields a row for each image at any depth. Each line of its .txt is a caption."""

    def closed(error: OSError) -> None:
        left_out.add(CLOSED, os.path.relpath(error.filename, folder))

    for parent, files in _folders(folder, closed):
        stems = {stem for stem, ending in map(os.path.splitext, files) if ending.lower() in ENDINGS}
        present = set(files)
        for file in files:
            stem, ending = os.path.splitext(file)
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()
            if ending.lower() not in ENDINGS:
                if ending == ".txt" and stem not in stems:
                    left_out.add(NO_IMAGE, name)
                continue
            if f"{stem}.txt" not in present:
                left_out.add(NO_TEXT, name)
                continue
            try:
                captions = captions_of(path.with_name(f"{stem}.txt").read_bytes())
            except OSError:
                left_out.add(UNREADABLE, name)
                continue
            if captions:
                yield Pair(name, Place(os.fspath(path)), captions, name)
            else:
                left_out.add(NO_CAPTION if captions == () else NOT_UTF_8, name)


def any_image(folder: Path) -> str | None:
    """Returns the name of an image at any depth, or None."""
    for parent, files in _folders(folder):
        for file in files:
            if os.path.splitext(file)[1].lower() in ENDINGS:
                return Path(parent, file).relative_to(folder).as_posix()
    return None


def _folders(
    folder: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder with its files in order, without hidden ones.

    Links to folders are followed, the last ones in their folder. A folder is visited once: links
    may form a loop, and an image under two names could be both trained on and held out.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=onerror):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name),
        )
        yield parent, sorted(file for file in files if not file.startswith("."))


def captions_of(text: bytes) -> tuple[str, ...] | None:
    """Returns the lines of a text file that are not blank, or None if it is not UTF-8."""
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return None
    return tuple(line.strip() for line in lines if line.strip())
