"""The progress of a run: tqdm's bar on a terminal, else one message per case.

In a log, a bar would only add kilobytes of control characters.
"""

from __future__ import annotations

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Messages:
    """The methods of tqdm's bar that are used here, as messages on stderr."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __enter__(self) -> Messages:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str) -> None:
        self.write(f"{self.done}/{self.total} rows, now {text}")

    def set_postfix_str(self, text: str) -> None:
        """Ignored: steps within a case get no message."""

    def update(self, count: int) -> None:
        self.done += count

    @staticmethod
    def write(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def bar(total: int) -> Messages:
    """A progress bar over `total` rows, for use in a `with`."""
    if tqdm is None or not sys.stderr.isatty():
        return Messages(total)
    return tqdm(total=total, unit="row", dynamic_ncols=True, smoothing=0)
