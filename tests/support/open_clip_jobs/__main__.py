"""Runs jobs: the arms are "open_clip" and "fastclip"."""

import sys
from pathlib import Path

import torch
from support.peers import peer

from .data import add_models
from .run import run


def main(folder: Path, *jobs: str) -> None:
    torch.set_num_threads(1)
    add_models(folder, peer("open_clip"))
    peer("open_clip_train.main")
    from fastclip.integrations import open_clip

    for job in jobs:
        run(folder, "open_clip", job)
        open_clip.patch()
        run(folder, "fastclip", job)
        open_clip.unpatch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
