"""Images with their captions, from rows that name them, and the rows that are left out."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NAMED = 3  # rows that a report names for each reason


class Place(NamedTuple):
    """The bytes of an image: a whole file, or `size` bytes of it from `offset` on."""

    file: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Raises OSError if the file cannot be read."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Pair:
    """An image with captions.

    name: the image's path relative to the source. Random choices depend on it, and not on the place
        of the source.
    origin: the row of the source in an error message, such as "line 7".
    """

    name: str
    place: Place
    captions: tuple[str, ...]
    origin: str


@dataclass
class LeftOut:
    """The rows that are no usable pair, by reason: how many, and the first few of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, origin: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.first.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(_encodable(origin))

    def lines(self) -> list[str]:
        """Returns a line for each reason."""
        return [
            f"{count:,} left out, {reason}: {', '.join(self.first[reason])}"
            + (f" and {count - NAMED:,} more" if count > NAMED else "")
            for reason, count in self.counts.items()
        ]


def merged(rows: Iterable[Pair]) -> list[Pair]:
    """Returns one pair for each image, with the different captions of all its rows. Neither the
    pairs nor their captions depend on the order of the rows."""
    by_place: dict[Place, list[Pair]] = {}
    for row in rows:
        by_place.setdefault(row.place, []).append(row)
    pairs = [
        Pair(
            _encodable(group[0].name), place,
            tuple(sorted({_encodable(c) for row in group for c in row.captions})),
            _encodable(group[0].origin),
        )
        for place, group in by_place.items()
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: (pair.name, pair.place))


def _encodable(text: str) -> str:
    """Replaces what no text in UTF-8 has, such as the bytes of a file name in another encoding:
    printing, hashing and tokenizing would fail."""
    return text.encode("utf-8", "replace").decode()


def hold_out(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs to train on, and about `share` of all to evaluate with.

    A hash of the image's name without its ending decides, and the held-out pairs are in the order
    of that hash: their first few are a fair sample.
    """
    places = {pair: _place_in_unit_interval(pair.name) for pair in pairs}
    trained = [pair for pair in pairs if places[pair] >= share]
    held_out = [pair for pair in pairs if places[pair] < share]
    return trained, sorted(held_out, key=lambda pair: (places[pair], pair.name))


def _place_in_unit_interval(name: str) -> float:
    folder, slash, file = name.rpartition("/")
    stem = folder + slash + (file.rpartition(".")[0] or file)
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:7], "big") / 256**7


def fingerprint(pairs: Iterable[Pair], *others: str) -> str:
    """Returns a hash of names and captions, and of other texts: trainings of equal ones agree."""
    digest = hashlib.sha256()
    for text in (*(t for pair in pairs for t in (pair.name, *pair.captions)), *others):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]
