"""Rebuilds the emoji data set from the two packages of drawings that it was made from.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m fastclip.demo.emoji.rebuild GOOGLE.tgz TWITTER.tgz

It reads the single 64-pixel images and not the sheets, in which another vendor's images fill gaps.
It leaves out skin tones: the swatches, and the variants of other emoji. It writes google.png,
twitter.png, concepts.json and tokenizer.json. The vocabulary is learnt from the captions of the
trained concepts alone. Only a rebuild needs these packages.
"""

import argparse
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...clip.tokenizer import Tokenizer
from . import FOLDER, SIZE, VENDORS, Concept, write_sheet
from .split import split

VERSION = "16.0.0"
VOCABULARY = 1536

ReadFile = Callable[[str], bytes]


def open_package(path: Path) -> ReadFile:
    """Returns a function that reads a file of a package: a .tgz or the folder unpacked from it.

    Raises:
        FileNotFoundError: there is no such package.
    """
    if path.is_dir():
        return lambda name: (path / name).read_bytes()
    with tarfile.open(path) as archive:
        files = {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive
            if member.isfile() and ("/64/" in member.name or member.name.endswith(".json"))
        }
    return lambda name: files[name]


def shrink(image: bytes) -> np.ndarray:  # -> (4, SIZE, SIZE) uint8
    """Resizes a PNG. Colours are weighted by opacity, or invisible ones would bleed into edges."""
    with Image.open(io.BytesIO(image)) as opened:
        rgba = np.asarray(opened.convert("RGBA"), np.float32).transpose(2, 0, 1)
    opacity = rgba[3:] / 255
    weighted = [
        np.asarray(Image.fromarray(plane).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        for plane in (*(rgba[:3] * opacity), rgba[3])
    ]
    alpha = np.clip(weighted[3], 0, 255).round()
    colour = np.stack(weighted[:3]) * 255 / np.maximum(weighted[3], 1e-6)
    colour = np.where(alpha > 0, colour.clip(0, 255).round(), 0)
    return np.concatenate([colour, alpha[None]]).astype(np.uint8)


def captions(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the Unicode name, then the short names that differ from it."""
    texts = [row["name"].lower()]
    # The short name of a flag is the two-letter code of its country: no caption.
    if row["subcategory"] != "country-flag":
        # Replaces hyphens between words, but not the sign of "-1", which is a thumb down.
        texts += [re.sub(r"(?<=\w)[-_](?=\w)|_", " ", name) for name in row["short_names"]]
    return tuple(dict.fromkeys(texts))


def look_alikes(names: Sequence[str], sheets: Sequence[np.ndarray]) -> list[int]:
    """Returns for each concept the first one with an equal drawing or an equal name."""
    first = list(range(len(names)))
    keys = [list(names), *([drawing.tobytes() for drawing in sheet] for sheet in sheets)]
    for key in keys:
        seen: dict[object, int] = {}
        for index, value in enumerate(key):
            here, there = first[index], first[seen.setdefault(value, index)]
            if here != there:
                low, high = sorted((here, there))
                first = [low if group == high else group for group in first]
    return first


def unshared(texts: Sequence[tuple[str, ...]], groups: Sequence[int]) -> list[tuple[str, ...]]:
    """Returns the captions without the short names that are captions in another group too.

    A shared caption would make false negatives in a batch: "cat" is the name of the cat, and a
    short name of the cat's face. The Unicode name, the first caption, always stays.
    """
    users: dict[str, set[int]] = {}
    for own, group in zip(texts, groups, strict=True):
        for text in own:
            users.setdefault(text, set()).add(group)
    return [(name, *(text for text in others if len(users[text]) == 1)) for name, *others in texts]


def rebuild(packages: Sequence[Path], out: Path = FOLDER) -> int:
    """Writes the data set of the packages, in the order of VENDORS; returns the concept count.

    Raises:
        FileNotFoundError: a package is missing.
        ValueError: a package has another name or version.
    """
    read = dict(zip(VENDORS, map(open_package, packages), strict=True))
    for vendor in VENDORS:
        package = json.loads(read[vendor]("package.json"))
        found = f"{package['name']} {package['version']}"
        if found != f"emoji-datasource-{vendor} {VERSION}":
            raise ValueError(f"expected emoji-datasource-{vendor} {VERSION}, got {found}")
    rows = [
        row
        for row in json.loads(read[VENDORS[0]]("emoji.json"))
        if row["subcategory"] != "skin-tone" and all(row[f"has_img_{v}"] for v in VENDORS)
    ]
    rows.sort(key=lambda row: row["sort_order"])
    sheets = [
        np.stack([shrink(read[vendor](f"img/{vendor}/64/{row['image']}")) for row in rows])
        for vendor in VENDORS
    ]
    texts = [captions(row) for row in rows]
    groups = look_alikes([name for name, *_ in texts], sheets)
    concepts = [
        Concept(row["unified"], own, row["category"], row["subcategory"], group)
        for row, own, group in zip(rows, unshared(texts, groups), groups, strict=True)
    ]
    for vendor, sheet in zip(VENDORS, sheets, strict=True):
        write_sheet(out / f"{vendor}.png", sheet)
    text_lines = (json.dumps(vars(concept), ensure_ascii=False) for concept in concepts)
    (out / "concepts.json").write_text("[\n" + ",\n".join(text_lines) + "\n]\n", encoding="utf-8")
    parts = split(concepts)
    trained = [concepts[i] for group in parts.vendors for i in parts.members[group]]
    learnt = sorted(caption for concept in trained for caption in concept.captions)
    Tokenizer.train(learnt, VOCABULARY).save(out / "tokenizer.json")
    return len(concepts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip.demo.emoji.rebuild",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for vendor in VENDORS:
        parser.add_argument(vendor, type=Path, help=f"emoji-datasource-{vendor}: .tgz or folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        help="output folder (default: this module's)",
    )
    args = parser.parse_args(argv)
    try:
        count = rebuild([getattr(args, vendor) for vendor in VENDORS], args.out)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{count} concepts written to {args.out}")


if __name__ == "__main__":
    main()
