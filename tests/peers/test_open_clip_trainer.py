"""open_clip's trainer logs the same losses patched, and makes no matrix of pairs.

FASTCLIP_OPEN_CLIP names a folder with another open_clip, such as the `src` of a checkout, whose
trainer runs in place of the installed one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.installation import ROOT
from support.open_clip_jobs.data import write
from support.peers import OPEN_CLIP, find, peer

ALONE = [
    "fp32",
    "amp_bf16",
    "accumulated",
    "siglip",
    "coca",
    "distilled",
    "checkpointed",
    "validated",
]
TOGETHER = [
    "fp32", "local", "accumulated", "local_accumulated", "siglip", "local_coca", "local_distilled",
]  # fmt: skip
# Graphs replace the operators, so that nothing is counted.
COMPILED = ["task", "step"] if OPEN_CLIP else ["compiled"]
ALONE += COMPILED
TOGETHER += ["fsdp", "task"] if OPEN_CLIP else ["siglip_gather"]

Found = dict[str, dict[str, Any]]


def start(folder: Path, ranks: int, module: str, *arguments: str, **variables: str) -> str:
    """Runs a module in one process, or under torchrun; returns what it printed."""
    places = [str(ROOT / "tests"), str(ROOT), *([OPEN_CLIP] if OPEN_CLIP else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    done = subprocess.run(
        [*launcher, module, *arguments], env=environment | variables,
        cwd=folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def results(folder: Path, arm: str, jobs: Sequence[str], ranks: int) -> Found:
    return {job: json.loads((folder / f"{job}-{arm}-{ranks}.json").read_text()) for job in jobs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("webdataset", "braceexpand", "pandas"):
        find(package)
    made = tmp_path_factory.mktemp("open_clip")
    write(made, peer("open_clip"))
    return made


@pytest.fixture(scope="module")
def ran(folder: Path) -> Callable[[int], dict[str, Found]]:
    """Returns a function that runs the jobs of one or two ranks, once."""
    done: dict[int, dict[str, Found]] = {}

    def run(ranks: int) -> dict[str, Found]:
        if ranks not in done:
            jobs = ALONE if ranks == 1 else TOGETHER
            start(folder, ranks, "support.open_clip_jobs", str(folder), *jobs)
            done[ranks] = {
                arm: results(folder, arm, jobs, ranks) for arm in ("open_clip", "fastclip")
            }
        return done[ranks]

    return run


@pytest.mark.parametrize(
    ("ranks", "job"), [*((1, job) for job in ALONE), *((2, job) for job in TOGETHER)]
)
def test_the_curves_are_the_same(
    ranks: int, job: str, ran: Callable[[int], dict[str, Found]]
) -> None:
    ours, theirs = (ran(ranks)[arm][job] for arm in ("fastclip", "open_clip"))
    # The logits of open_clip are rounded to bfloat16.
    tolerance = 1e-2 if job == "amp_bf16" else 1e-4
    assert len(theirs["losses"]) == 3
    for found, wanted in zip(ours["losses"], theirs["losses"], strict=True):
        assert found == pytest.approx(wanted, rel=tolerance) and len(found) in (1, 2)
    # open_clip's own validation loss makes matrices.
    if job not in (*COMPILED, "validated"):
        assert ours["matrices"] == 0 < theirs["matrices"]


def test_the_evaluation_is_the_same(ran: Callable[[int], dict[str, Found]]) -> None:
    ours, theirs = (ran(1)[arm]["validated"]["evaluations"] for arm in ("fastclip", "open_clip"))
    assert len(ours) == len(theirs) == 1
    assert {"image_to_text_R@5", "text_to_image_median_rank"} <= set(ours[0])
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_program_patches_a_module(
    ranks: int, folder: Path, ran: Callable[[int], dict[str, Found]]
) -> None:
    printed = start(
        folder, ranks, "fastclip.patch", "support.open_clip_jobs.patched", str(folder), "fp32"
    )
    assert printed.count("fastclip.patch: open_clip computes its losses with fastclip") == 1
    found = results(folder, "program", ["fp32"], ranks)["fp32"]
    assert found == ran(ranks)["fastclip"]["fp32"]


def test_the_switch_leaves_open_clip_as_it_is(
    folder: Path, ran: Callable[[int], dict[str, Found]]
) -> None:
    printed = start(
        folder, 1, "fastclip.patch", "support.open_clip_jobs.patched", str(folder), "siglip",
        FASTCLIP_DISABLE="1",
    )  # fmt: skip
    assert "fastclip.patch: FASTCLIP_DISABLE=1, so nothing is patched" in printed
    found = results(folder, "program", ["siglip"], 1)["siglip"]
    assert found == ran(1)["open_clip"]["siglip"]


def test_the_trainer_by_its_own_name(folder: Path) -> None:
    """With a model that open_clip ships. torchvision's operators are declared before it starts."""
    (folder / "sitecustomize.py").write_text(
        "from bench.methods.open_clip import import_module\n"
        "import_module('torchvision', ('torchvision',))\n"
    )
    places = [str(folder), str(ROOT / "tests"), str(ROOT), *([OPEN_CLIP] if OPEN_CLIP else [])]
    printed = start(
        folder, 1, "fastclip.patch", "--host", "open_clip", "open_clip_train.main",
        "--train-data", f"{folder}/66.csv", "--dataset-type", "csv", "--csv-separator", ",",
        "--csv-img-key", "image", "--csv-caption-key", "caption", "--model", "ViT-S-32-alt",
        "--force-image-size", "32", "--batch-size", "22", "--epochs", "1", "--workers", "0",
        "--device", "cpu", "--precision", "fp32", "--logs", str(folder / "named"),
        PYTHONPATH=os.pathsep.join(places),
    )  # fmt: skip
    assert "fastclip.patch: open_clip computes its losses with fastclip" in printed
    assert "Contrastive_loss: " in printed
