"""Zero-shot predictions of pictures: probabilities, and their table, CSV and JSON."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .model import CLIP


@dataclass(frozen=True)
class Prediction:
    """A picture and its most probable labels, best first."""

    image: Path
    labels: tuple[tuple[str, float], ...]


@torch.no_grad()
def probabilities(model: CLIP, images: Tensor, classes: Tensor) -> Tensor:
    """Returns (B, C): softmax over the classes, or, of a model with a bias (SigLIP), each class's
    own sigmoid.

    Args:
        images: (B, 3, image_size, image_size).
        classes: (C, D), of `class_features`.
    """
    logits = model.encode_image(images) @ classes.T * model.logit_scale.exp()
    if model.config.bias is None:
        return logits.float().softmax(dim=1)
    return (logits + model.logit_bias).float().sigmoid()


def best(images: Sequence[Path], p: Tensor, labels: Sequence[str], top: int) -> list[Prediction]:
    """Returns the `top` labels of each row of p (B, C)."""
    values, places = p.topk(min(top, len(labels)), dim=1)
    return [
        Prediction(image, tuple((labels[k], v) for k, v in zip(ks, vs, strict=True)))
        for image, vs, ks in zip(images, values.tolist(), places.tolist(), strict=True)
    ]


def shown(path: Path) -> str:
    """Returns the path's name. Its bytes that are not UTF-8, which no terminal or file takes, are
    spelled out, such as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def table(predictions: Sequence[Prediction]) -> str:
    """Returns one line a picture: its name, then labels with probabilities in per cent."""
    width = max((len(shown(p.image)) for p in predictions), default=0)
    return "\n".join(
        f"{shown(p.image):<{width}}  "
        + "  ".join(f"{100 * v:5.1f} % {label}" for label, v in p.labels)
        for p in predictions
    )


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "rank", "label", "probability"))
        for p in predictions:
            rows.writerows(
                (shown(p.image), k, label, v) for k, (label, v) in enumerate(p.labels, 1)
            )


def write_json(path: Path, predictions: Sequence[Prediction], unreadable: Sequence[Path]) -> None:
    found = {
        "predictions": [
            {
                "image": shown(p.image),
                "labels": [{"label": label, "probability": v} for label, v in p.labels],
            }
            for p in predictions
        ],
        "unreadable": [shown(path) for path in unreadable],
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
