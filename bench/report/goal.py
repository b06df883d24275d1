"""A goal of the library: a figure of a CSV's rows, a floor and an aim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .results import Row

Figure = Callable[[list[Row]], "float | None"]


@dataclass(frozen=True)
class Goal:
    """A figure of the rows at one scale, and the bounds that it should reach.

    The figure should be at least `floor` and ideally `aims` (one for each of `cases.SCALES`); with
    `at_most` these are upper bounds. `form` formats the figure.
    """

    text: str
    figure: Figure
    floor: float
    aims: tuple[float, float]
    form: Callable[[float], str]
    at_most: bool = False

    def reached(self, figure: float, bound: float) -> bool:
        """True if the figure is on the right side of the bound."""
        return figure <= bound if self.at_most else figure >= bound


def pick(rows: list[Row], method: str, **wanted: object) -> list[Row]:
    """The method's rows with these values; random data and forward with backward by default."""
    wanted = {"data": "random", "mode": "both", "method": method, **wanted}
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def worst_of(values: Iterable[float | None], worst: Callable[..., float]) -> float | None:
    """`worst`, min or max, of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return worst(known) if known else None
