"""Finds out in which form pairs are given, and reads their names and captions."""

from pathlib import Path

from ..clip.open_image import ENDINGS
from .folder import any_image, read_folder
from .pair import LeftOut, Pair, merged
from .shards import read_shards, shard_paths
from .table import TABLES, read_table


def read_pairs(
    source: str, left_out: LeftOut, image_column: str | None = None,
    caption_column: str | None = None,
) -> list[Pair]:  # fmt: skip
    """Returns the pairs of a table, a folder of images, or WebDataset tars, in the order of their
    names; `left_out` gets the rows that are none. No image is opened.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ModuleNotFoundError: there is no webdataset for tars.
        ValueError: the source has none of these forms, or two of them.
    """
    path = Path(source)
    tars = sorted(path.glob("*.tar")) if path.is_dir() else []
    image = any_image(path) if tars else None
    if image is not None:
        raise ValueError(
            f"pairs must be tars or a folder of images, got both in {source}: {tars[0].name} and "
            f"{image}"
        )
    if path.suffix == ".tar" or tars:
        return merged(read_shards(shard_paths(source), left_out))
    if path.is_dir():
        return merged(read_folder(path, left_out))
    if not path.exists():
        raise FileNotFoundError(
            f"pairs must be a file or a folder, got no such file or folder: {source}"
        )
    if path.suffix.lower() not in TABLES:
        raise ValueError(
            f"pairs must be a {', '.join(TABLES)} or .tar file or a folder of "
            f"{', '.join(sorted(ENDINGS))} or .tar files, got {source}"
        )
    return merged(read_table(path, left_out, image_column, caption_column))
