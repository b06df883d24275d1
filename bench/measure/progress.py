"""How far a run has come: tqdm's bar on a terminal, else a line for each case.

A bar in a log is some kilobytes of what nobody reads.
"""

from __future__ import annotations

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Lines:
    """The part of tqdm's bar that is used here, on stderr."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str) -> None:
        self.write(f"{self.done}/{self.total} rows, now {text}")

    def set_postfix_str(self, text: str) -> None:
        """What is being done within a case is not worth a line."""

    def update(self, count: int) -> None:
        self.done += count

    @staticmethod
    def write(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def bar(total: int) -> Lines:
    """A bar of `total` rows, to be used in a `with`."""
    if tqdm is None or not sys.stderr.isatty():
        return Lines(total)
    return tqdm(total=total, unit="row", dynamic_ncols=True, smoothing=0)
