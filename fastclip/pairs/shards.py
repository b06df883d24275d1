"""Rows of WebDataset tars: files with the same name but for their endings are a sample.

`webdataset` expands the names of the tars and groups their files into samples. A training needs
any image at any time, which a stream does not give, so that the tars' own headers are read once,
by Python's `tarfile`, and images later from their place in the tar.
"""

import os
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..clip.open_image import ENDINGS
from .folder import NO_CAPTION, NOT_UTF_8, captions_of
from .pair import LeftOut, Pair, Place

NO_IMAGE, NO_TEXT, TWICE = "no image", "no .txt", "two files of one ending"
DOTTED = "the first dot of a name begins its ending in a tar"


def shard_paths(source: str) -> list[Path]:
    """Returns the tars of a folder, of a path with braces such as `shards/{000..009}.tar`, or of
    the path of a tar.

    Raises:
        ModuleNotFoundError: there is no webdataset.
        FileNotFoundError: a tar is missing.
    """
    expand_urls = _webdataset("shardlists").expand_urls
    folder = Path(source)
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if path.suffix == ".tar")
    paths = [folder] if folder.is_file() else [Path(path) for path in expand_urls(source)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"tars must be files on this machine, missing: {missing[0]}{more}")
    return paths


def read_shards(paths: list[Path], left_out: LeftOut) -> Iterator[Pair]:
    """Yields a row for each sample with an image and a .txt, whose lines are its captions.

    Raises:
        ValueError: a file is no uncompressed tar.
    """
    group_by_keys = _webdataset("tariterators").group_by_keys
    for path in paths:
        try:
            # Modes with compression would make every read one of the whole tar.
            with tarfile.open(path, "r:") as tar:

                def note(error: Exception, shard: str = path.name) -> bool:
                    left_out.add(TWICE, f"{shard} {error.args[0].partition(':')[0]}")
                    return True

                for sample in group_by_keys(_files(tar, path), handler=note):
                    yield from _row(sample, tar, path, left_out)
        except tarfile.TarError as error:
            raise ValueError(f"{path} must be an uncompressed tar: {error}") from None


def _files(tar: tarfile.TarFile, path: Path) -> Iterator[dict[str, Any]]:
    """Yields the files as group_by_keys takes them, with a header in place of the content."""
    for header in tar:
        if header.isreg():
            yield {"fname": header.name.removeprefix("./"), "data": header, "__url__": str(path)}
        tar.members = []  # tarfile keeps every header otherwise


def _row(
    sample: dict[str, Any], tar: tarfile.TarFile, path: Path, left_out: LeftOut
) -> Iterator[Pair]:
    key = sample["__key__"]
    origin = f"{path.name} {key}"
    ending = next((e for e in sample if f".{e}" in ENDINGS), None)
    dotted = [e for e in sample if os.path.splitext(e)[1] in ENDINGS]
    if ending is None and dotted:
        for file in dotted:
            left_out.add(DOTTED, f"{path.name} {sample[file].name}")
        return
    if ending is None or "txt" not in sample:
        left_out.add(NO_IMAGE if ending is None else NO_TEXT, origin)
        return
    image, text = sample[ending], tar.extractfile(sample["txt"])
    captions = captions_of(text.read() if text else b"")
    if captions:
        place = Place(os.fspath(path), image.offset_data, image.size)
        yield Pair(f"{key}.{ending}", place, captions, origin)
    else:
        left_out.add(NO_CAPTION if captions == () else NOT_UTF_8, origin)


def _webdataset(module: str) -> ModuleType:
    try:
        return import_module(f"webdataset.{module}")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tars need the package webdataset: pip install webdataset", name="webdataset"
        ) from None
