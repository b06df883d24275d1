"""A line, what it is replaced by, and the tests that must see it."""

from pathlib import Path
from typing import NamedTuple


class DoesNotApply(Exception):
    """The line is gone or is not unique: the list must follow the code."""


class Mutant(NamedTuple):
    """One mutant."""

    name: str  # what goes wrong
    path: str
    line: str  # a part of the file that occurs once
    replacement: str
    tests: tuple[str, ...]  # node ids of pytest
    hangs: bool = False  # then a time-out counts as killed

    def applied(self, text: str) -> str:
        """Returns the file's text with the replacement."""
        found = text.count(self.line)
        if found != 1:
            raise DoesNotApply(f"{self.path} has {found} times: {self.line}")
        if self.replacement == self.line:
            raise DoesNotApply(f"{self.path}: the replacement changes nothing: {self.line}")
        return text.replace(self.line, self.replacement)

    def apply(self, tree: Path) -> str:
        """Writes the mutant into a tree; returns the file's text without it."""
        file = tree / self.path
        if not file.is_file():
            raise DoesNotApply(f"{self.path} does not exist")
        text = file.read_text()
        file.write_text(self.applied(text))
        return text


def mutant(
    name: str, path: str, line: str, replacement: str, *tests: str, hangs: bool = False
) -> Mutant:
    return Mutant(name, path, line, replacement, tests, hangs)
