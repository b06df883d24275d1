"""Emoji written to files in each form in which one's own pairs may be."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fastclip.demo import emoji as emoji_data

FORMS = ("csv", "tsv", "jsonl", "folder", "tars")


def images_with_captions(count: int) -> dict[str, tuple[Image.Image, tuple[str, ...]]]:
    """Returns drawings with all captions of their concepts, by the names of their files."""
    emoji = emoji_data.load()
    step = len(emoji.concepts) // count
    found = {}
    for number, concept in enumerate(emoji.concepts[: count * step : step]):
        drawing = emoji.drawings[number * step, number % 2].permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(drawing))
        found[f"{concept.code.lower()}.png"] = image, concept.captions
    return found


def export(folder: Path, form: str, count: int = 40) -> str:
    """Writes a data set of one of FORMS; returns what `--pairs` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = images_with_captions(count)
    for name, (image, _) in rows.items():
        image.save(folder / name)
    if form in ("folder", "tars"):
        for name, (_, captions) in rows.items():
            (folder / name).with_suffix(".txt").write_text("\n".join(captions))
        return str(folder) if form == "folder" else shards(folder)
    path = folder / f"pairs.{form}"
    pairs = [(name, caption) for name, (_, captions) in rows.items() for caption in captions]
    with path.open("w", newline="") as file:
        if form == "jsonl":
            for name, caption in reversed(pairs):
                file.write(json.dumps({"image": name, "text": caption}) + "\n")
        else:
            table = csv.writer(file, delimiter="," if form == "csv" else "\t")
            table.writerows([("filepath", "title"), *pairs])
    return str(path)


def shards(folder: Path) -> str:
    """Moves a folder's files to tars of ten samples, as webdataset writes them."""
    import webdataset

    tars = folder / "shards"
    tars.mkdir()
    images = sorted(folder.glob("*.png"))
    with webdataset.ShardWriter(str(tars / "%03d.tar"), maxcount=10, verbose=0) as writer:
        for image in images:
            writer.write(
                {
                    "__key__": image.stem,
                    "png": image.read_bytes(),
                    "txt": image.with_suffix(".txt").read_bytes(),
                }
            )
    last = (len(images) - 1) // 10
    for path in folder.iterdir():
        if path != tars:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return str(tars / f"{{000..{last:03}}}.tar")
