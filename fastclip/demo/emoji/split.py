"""Splits concepts and drawings into those for training and those for evaluation alone.

Look-alikes are split as one group, so that no drawing is on both sides. In each category

- 15 % are *held out*: neither drawings nor names are trained on;
- 20 % are trained on the drawing of *one vendor*, Google and Twitter in turn: the drawings of the
  other vendor test the recognition of known concepts;
- the others are trained on the drawings of both vendors.

The split does not depend on the seed of a run, so that results of different runs can be compared.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import VENDORS, Concept

HELD_OUT, ONE_VENDOR = 0.15, 0.20


@dataclass(frozen=True)
class Split:
    """Look-alike groups by their number; `members[group]` are indices of concepts."""

    members: dict[int, tuple[int, ...]]
    held_out: tuple[int, ...]  # groups
    vendors: dict[int, tuple[int, ...]]  # trained group -> vendors whose drawings it has

    @property
    def one_vendor(self) -> tuple[int, ...]:
        """The trained groups with the drawings of one vendor held out of training."""
        return tuple(group for group, seen in self.vendors.items() if len(seen) < len(VENDORS))


def split(concepts: Sequence[Concept]) -> Split:
    """Returns the split of the concepts' look-alike groups."""
    members: dict[int, list[int]] = {}
    for index, concept in enumerate(concepts):
        members.setdefault(concept.look_alike, []).append(index)
    by_category: dict[str, list[int]] = {}
    for group, indices in members.items():
        by_category.setdefault(concepts[indices[0]].category, []).append(group)

    held_out: list[int] = []
    vendors: dict[int, tuple[int, ...]] = {}
    for category, groups in sorted(by_category.items()):
        random.Random(category).shuffle(groups)
        first = round(HELD_OUT * len(groups))
        second = first + round(ONE_VENDOR * len(groups))
        held_out += groups[:first]
        for turn, group in enumerate(groups[first:second]):
            vendors[group] = (turn % len(VENDORS),)
        for group in groups[second:]:
            vendors[group] = tuple(range(len(VENDORS)))
    return Split({g: tuple(m) for g, m in members.items()}, tuple(held_out), vendors)
