"""Leaves out pairs whose image cannot be read, before the training: batches must not depend on
what is found on the way."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from ..demo.workers import Workers
from .images import chunks, decode, in_processes
from .pair import LeftOut, Pair, Place

FINE, NO_FILE, NO_IMAGE = range(3)
REASONS = {NO_FILE: "the image's file cannot be read", NO_IMAGE: "the image cannot be decoded"}


class _Checked(Dataset):
    """`checked[number]` is FINE, NO_FILE or NO_IMAGE."""

    def __init__(self, places: Sequence[Place], side: int) -> None:
        self.places, self.side = places, side

    def __getitem__(self, number: int) -> int:
        try:
            data = self.places[number].read()
        except (OSError, ValueError):  # the latter for a path with a null character
            return NO_FILE
        try:
            decode(data, self.side)
        except Exception:  # Pillow's decoders raise almost any
            return NO_IMAGE
        return FINE


def readable(
    pairs: Sequence[Pair], side: int, left_out: LeftOut, workers: Workers, processes: int
) -> list[Pair]:
    """Returns the pairs whose image can be decoded. Each rank tries its share of them; the first
    one shows a progress bar on a terminal."""
    codes = torch.zeros(len(pairs), dtype=torch.uint8)
    own = range(workers.rank, len(pairs), workers.size)
    batches = [[own[place] for place in chunk] for chunk in chunks(len(own))]
    checked = _Checked([pair.place for pair in pairs], side)
    # disable=None: no bar in a log, and an error stays one line of it.
    with tqdm(
        total=len(own), desc="checks images", unit="image", dynamic_ncols=True, leave=False,
        disable=None if workers.first else True,
    ) as bar:  # fmt: skip
        for batch, found in zip(batches, in_processes(checked, batches, processes), strict=True):
            codes[batch] = found.to(torch.uint8)
            bar.update(len(batch))
    if workers.size > 1:
        dist.all_reduce(codes, dist.ReduceOp.MAX)
    for pair, code in zip(pairs, codes.tolist(), strict=True):
        if code != FINE:
            left_out.add(REASONS[code], pair.origin)
    return [pair for pair, code in zip(pairs, codes.tolist(), strict=True) if code == FINE]
