"""Times the Triton engine's tile candidates on a CUDA device: what its table should say.

    python -m bench.tiles FILE.csv

One step of each loss at 32,768 x 768 in bf16, whose launches the autotuner times one by one; its
figures go into the CSV, the table's own choice first.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

from .cases import LOSSES, Case, make_inputs

N, D = 32768, 768


def measure(n: int = N, d: int = D) -> list[dict[str, object]]:
    """A row for each kernel and candidate."""
    from fastclip import loss as losses
    from fastclip.triton_kernels import configurations

    os.environ[configurations.AUTOTUNE] = "1"
    configurations.TIMES.clear()
    for loss in LOSSES:
        inputs = make_inputs(Case(loss, n, n, d, "bfloat16", 14.3), "cuda")
        function = losses.clip_loss if loss == "clip" else losses.siglip_loss
        function(inputs.x, inputs.y, inputs.scale, inputs.bias, backend="triton").backward()
    return rows_of(configurations.TIMES)


def rows_of(times: dict) -> list[dict[str, object]]:
    return [
        {"kernel": key[-1], "n": N, "d": key[3], **config._asdict(), "ms": f"{ms:.4f}"}
        for key, found in times.items()
        for config, ms in found.items()
    ]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]), measure())
