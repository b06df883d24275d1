"""`python -m fastclip.patch support.open_clip_jobs.patched FOLDER JOB` runs one job, patched by
that program alone."""

import sys
from pathlib import Path

import torch
from support.peers import peer

from .data import add_models
from .run import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    add_models(Path(sys.argv[1]), peer("open_clip"))
    run(Path(sys.argv[1]), "program", sys.argv[2])
