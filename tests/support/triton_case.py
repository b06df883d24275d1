"""Marks and checks that only tests of the Triton engine need."""

import importlib.util
from itertools import pairwise

import pytest

import fastclip

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_engine = pytest.mark.skipif(
    fastclip.backends()["triton"] != "available",
    reason=f"the Triton engine cannot run: {fastclip.backends()['triton']}",
)


def cover(intervals: list[tuple[int, int]], end: int) -> bool:
    """True if the intervals follow one another, without gaps, from 0 to the end."""
    intervals = sorted(set(intervals))
    joined = all(one[1] == other[0] for one, other in pairwise(intervals))
    return intervals[0][0] == 0 and intervals[-1][1] == end and joined
