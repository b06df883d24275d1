"""Pools of ranks that all tests of a process share, since starting one takes seconds."""

from .processes import Ranks

_POOLS: dict[int, Ranks] = {}


def pool_of(world_size: int) -> Ranks:
    """Returns the pool of this size; a new one after a rank died or gave no answer."""
    found = _POOLS.get(world_size)
    if found is not None and found.broken:
        found.close()
    if found is None or found.broken:
        _POOLS[world_size] = found = Ranks(world_size)
    return found


def close_all() -> None:
    while _POOLS:
        _POOLS.popitem()[1].close()
