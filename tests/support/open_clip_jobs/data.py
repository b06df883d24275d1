"""Files of the jobs: pairs, configurations of models, weights."""

import csv
import json
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from fastclip.demo import emoji

from .jobs import JOBS, MODELS, pairs_of


def write(folder: Path, open_clip: ModuleType) -> None:
    """Writes emoji as PNG files, tables of pairs for one and two ranks, and weights."""
    everything = emoji.load()
    counts = {pairs_of(job, ranks) for job in JOBS for ranks in (1, 2)}
    rows = [(folder / f"{k}.png", c.name) for k, c in enumerate(everything.concepts[: max(counts)])]
    for (path, _), drawing in zip(rows, everything.drawings[:, 0], strict=False):
        Image.fromarray(drawing.permute(1, 2, 0).contiguous().numpy()).save(path)
    for count in counts:
        with open(folder / f"{count}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows[:count]])
    (folder / "models").mkdir()
    for name, configuration in MODELS.items():
        (folder / "models" / f"{name}.json").write_text(json.dumps(configuration))
    add_models(folder, open_clip)
    torch.manual_seed(7)
    for name in ("smaller", "coca_tiny"):
        model = open_clip.create_model(name)
        if name == "coca_tiny":  # open_clip leaves this one as its memory was
            torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
        torch.save(model.state_dict(), folder / f"{name}.pt")


def add_models(folder: Path, open_clip: ModuleType) -> None:
    """Makes the configurations known to open_clip."""
    open_clip.add_model_config(folder / "models")
