"""Evaluates a trained model on emoji that it has not seen. Each score comes with chance level.

The evaluation is retrieval in both directions on two test sets, and zero-shot classification of the
second:

- *other vendor*: concepts trained on one vendor's drawing, tested on the other vendor's;
- *held out*: concepts without a drawing or a name in the training set.

Each look-alike group is tested by one concept, with its Unicode name, on a white background.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...clip.model import CLIP
from ...clip.zero_shot import class_features, classify
from ...retrieval import metrics
from . import VENDORS, Emoji
from .batches import on_white
from .split import Split

Encode = Callable[[Sequence[str]], Tensor]

# Words for each category: its name, and things that it holds. No category was trained on.
CATEGORY_WORDS = {
    "Smileys & Emotion": ("face", "smiling face", "sad face", "heart", "cat face"),
    "People & Body": ("person", "man", "woman", "hand", "woman worker", "man running"),
    "Animals & Nature": ("animal", "bird", "dog", "fish", "bug", "plant", "flower", "tree"),
    "Food & Drink": ("food", "drink", "fruit", "vegetable", "bread", "cake", "glass of wine"),
    "Travel & Places": ("building", "car", "train", "house", "clock face", "moon", "cloud"),
    "Activities": ("sport", "ball", "game", "medal", "musical instrument", "party"),
    "Objects": ("object", "tool", "book", "clothes", "telephone", "box", "paper"),
    "Symbols": ("symbol", "arrow", "sign", "button", "square", "circle", "letters"),
    "Flags": ("flag", "country flag", "island flag", "republic flag"),
}


@dataclass(frozen=True)
class Score:
    """A fraction of right answers, and the fraction that guessing gets."""

    value: float
    chance: float
    queries: int

    def __str__(self) -> str:
        return f"{self.value:6.1%}  (chance {self.chance:.1%})"


def retrieval(images: Sequence[Tensor], texts: Tensor) -> dict[str, Score]:
    """Returns R@1 and R@5 in both directions, averaged over image sets of the same N texts."""
    count = len(texts)
    # A model that has diverged gives all inputs the same features, which get chance.
    sets = [metrics(i.nan_to_num(0, 0, 0), texts.nan_to_num(0, 0, 0), ks=(1, 5)) for i in images]
    return {
        f"{direction} R@{k}": Score(
            sum(found[f"{direction.replace(' ', '_')}_R@{k}"] for found in sets) / len(sets),
            min(1.0, k / count),
            count * len(images),
        )
        for direction in ("image to text", "text to image")
        for k in (1, 5)
    }


def per_class_accuracy(guesses: Tensor, labels: Tensor) -> float:
    """Returns the accuracy averaged over the classes: a constant answer gets exactly chance."""
    classes = labels.unique()
    return sum((guesses[labels == c] == c).float().mean().item() for c in classes) / len(classes)


@dataclass(frozen=True)
class HeldOut:
    """Held-out concepts with their features: `images[vendor]` and `texts` are (N, D)."""

    concepts: tuple[int, ...]
    images: tuple[Tensor, ...]
    texts: Tensor


def other_vendor(split: Split) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the concepts that were trained on one vendor's drawing, and the other vendor's
    number."""
    unseen = [
        (split.members[group][0], vendor)
        for group in split.one_vendor
        for vendor in range(len(VENDORS))
        if vendor not in split.vendors[group]
    ]
    concepts, vendors = zip(*unseen, strict=True)
    return concepts, vendors


@torch.no_grad()
def held_out_features(model: CLIP, emoji: Emoji, split: Split, encode: Encode) -> HeldOut:
    """Returns the features of every held-out concept in every vendor's drawing."""
    concepts = tuple(split.members[group][0] for group in split.held_out)
    images = tuple(
        features(model, emoji, concepts, [vendor] * len(concepts)) for vendor in range(len(VENDORS))
    )
    return HeldOut(concepts, images, names(model, emoji, concepts, encode))


@torch.no_grad()
def evaluate(
    model: CLIP, emoji: Emoji, split: Split, encode: Encode
) -> dict[str, dict[str, Score]]:
    """Returns all scores, by test set and by name."""
    model.eval()
    concepts, vendors = other_vendor(split)
    other = retrieval(
        [features(model, emoji, concepts, vendors)], names(model, emoji, concepts, encode)
    )
    held = held_out_features(model, emoji, split, encode)

    classes = class_features(model, encode, CATEGORY_WORDS)
    labels = list(CATEGORY_WORDS)
    truth = torch.tensor([labels.index(emoji.concepts[c].category) for c in held.concepts])
    guesses = [
        classify(model, pictures(model, emoji, held.concepts, [v] * len(held.concepts)), classes)
        for v in range(len(VENDORS))
    ]
    accuracy = per_class_accuracy(torch.cat(guesses).cpu(), truth.repeat(len(VENDORS)))
    return {
        "other vendor": other,
        "held out": retrieval(held.images, held.texts),
        "zero-shot": {
            f"{len(labels)} categories": Score(
                accuracy, 1 / len(labels), len(VENDORS) * len(held.concepts)
            )
        },
    }


def pictures(model: CLIP, emoji: Emoji, concepts: Sequence[int], vendors: Sequence[int]) -> Tensor:
    """Returns the drawings on white, (B, 3, SIZE, SIZE), on the model's device."""
    return on_white(emoji.drawings[list(concepts), list(vendors)].to(model.logit_scale.device))


def features(model: CLIP, emoji: Emoji, concepts: Sequence[int], vendors: Sequence[int]) -> Tensor:
    """Returns image features (B, D) of these concepts in these vendors' drawings."""
    return model.encode_image(pictures(model, emoji, concepts, vendors))


def names(model: CLIP, emoji: Emoji, concepts: Sequence[int], encode: Encode) -> Tensor:
    """Returns text features (B, D) of these concepts' names."""
    return model.encode_text(encode([emoji.concepts[c].name for c in concepts]))


def as_json(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        test: {name: asdict(score) for name, score in figures.items()}
        for test, figures in scores.items()
    }
