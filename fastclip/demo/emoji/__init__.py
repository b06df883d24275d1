"""Image-text pairs small enough for a repository: emoji of two vendors, with their names.

There are 1,906 concepts, each drawn by Google (Noto Emoji) and by Twitter (Twemoji), in 32 x 32
pixels with transparency, so that training can put them on any background. `load()` reads them from
this folder. `rebuild.py` made the files, and LICENSE.txt names their owners and licences.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FOLDER = Path(__file__).parent
TOKENIZER = FOLDER / "tokenizer.json"
VENDORS = ("google", "twitter")
SIZE = 32  # side of a drawing, in pixels
SHEET_COLUMNS = 44  # drawings in a row of a sheet


@dataclass(frozen=True)
class Concept:
    """One emoji, in the drawings of all vendors.

    `captions` begins with its Unicode name, followed by short names that differ from it. Concepts
    with the same `look_alike` number cannot be told apart: a vendor draws them pixel for pixel
    alike (the flags of Norway and of Bouvet Island), or they have the same name. Concepts with
    different numbers share no caption.
    """

    code: str
    captions: tuple[str, ...]
    category: str
    subcategory: str
    look_alike: int

    @property
    def name(self) -> str:
        return self.captions[0]


@dataclass(frozen=True)
class Emoji:
    """All concepts and their drawings: `drawings[concept, vendor]` is (4, 32, 32), RGBA, uint8."""

    concepts: tuple[Concept, ...]
    drawings: Tensor  # (len(concepts), len(VENDORS), 4, SIZE, SIZE) uint8


def load(folder: Path = FOLDER) -> Emoji:
    """Returns the concepts and drawings, read from concepts.json and one sheet for each vendor.

    Raises:
        FileNotFoundError: a file is missing; wheels of fastclip do not hold them.
    """
    files = ["concepts.json", TOKENIZER.name, *(f"{vendor}.png" for vendor in VENDORS)]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo needs {', '.join(missing)} in {folder}, which wheels of fastclip "
            "leave out (6 MB): run the demo in a checkout of the sources, with `make demo`"
        )
    rows = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    concepts = tuple(Concept(**{**row, "captions": tuple(row["captions"])}) for row in rows)
    sheets = [read_sheet(folder / f"{vendor}.png", len(concepts)) for vendor in VENDORS]
    return Emoji(concepts, torch.from_numpy(np.stack(sheets, axis=1)))


def read_sheet(path: Path, count: int) -> np.ndarray:
    """Returns the first `count` drawings of a sheet, row by row: (count, 4, SIZE, SIZE) uint8."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGBA"))
    rows = sheet.shape[0] // SIZE
    tiles = sheet.reshape(rows, SIZE, SHEET_COLUMNS, SIZE, 4).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(rows * SHEET_COLUMNS, 4, SIZE, SIZE)[:count]


def write_sheet(path: Path, drawings: np.ndarray) -> None:
    """Writes a sheet that `read_sheet` reads. Unused places are transparent."""
    rows = -(-len(drawings) // SHEET_COLUMNS)
    tiles = np.zeros((rows * SHEET_COLUMNS, 4, SIZE, SIZE), np.uint8)
    tiles[: len(drawings)] = drawings
    sheet = tiles.reshape(rows, SHEET_COLUMNS, 4, SIZE, SIZE).transpose(0, 3, 1, 4, 2)
    Image.fromarray(sheet.reshape(rows * SIZE, SHEET_COLUMNS * SIZE, 4)).save(path, optimize=True)
