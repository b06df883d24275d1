"""Which concepts and drawings training sees, and which only the evaluation does. Fixed for good.

Look-alikes count as one: they share a side, so that no drawing is on both. Within each category

- 15 % are *held out*: no drawing and no name of them is trained on;
- 20 % are trained on *one vendor's* drawing alone, Google's and Twitter's by turns: the other
  vendor's drawings of known concepts are the test;
- the others are trained on both vendors' drawings.

The split does not depend on any run's seed, so that results of different runs compare.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import VENDORS, Concept

HELD_OUT, ONE_VENDOR = 0.15, 0.20


@dataclass(frozen=True)
class Split:
    """Groups of look-alikes by their number: `members[group]` are indices of concepts."""

    members: dict[int, tuple[int, ...]]
    held_out: tuple[int, ...]  # groups
    vendors: dict[int, tuple[int, ...]]  # trained group -> the vendors that it is trained on

    @property
    def one_vendor(self) -> tuple[int, ...]:
        """The trained groups of which one vendor's drawings are kept from training."""
        return tuple(group for group, seen in self.vendors.items() if len(seen) < len(VENDORS))


def split(concepts: Sequence[Concept]) -> Split:
    """Sorts the concepts' look-alike groups into trained and held out ones."""
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
