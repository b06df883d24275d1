"""Pools of two, three and four ranks, each made once for a file that asks for it."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.ranks.processes import Ranks


def pool_of(name: str, world_size: int) -> Any:
    @pytest.fixture(scope="module", name=name)
    def pool() -> Iterator[Ranks]:
        ranks = Ranks(world_size)
        yield ranks
        ranks.close()

    return pool


two, three, four = pool_of("two", 2), pool_of("three", 3), pool_of("four", 4)
