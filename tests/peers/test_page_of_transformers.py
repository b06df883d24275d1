"""docs/transformers.md: its code runs, and its table lists the known classes."""

import re
from pathlib import Path
from typing import Any

import torch
from support.installation import ROOT
from support.peers import find, peer
from support.two_towers import NAMES, batch_of, model_of

PAGE = ROOT / "docs/transformers.md"


def test_the_code_runs(tmp_path: Path) -> None:
    find("accelerate")
    transformers = peer("transformers")
    clip, batch = model_of("CLIPModel", torch.float32), batch_of("CLIPModel", dtype=torch.float32)
    before = clip.logit_scale.detach().clone()
    found: dict[str, Any] = {
        "torch": torch, "clip": clip, "batch": batch,
        "dataset": [{key: value[row] for key, value in batch.items()} for row in range(8)],
        "arguments": transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=4, max_steps=2,
        ),
    }  # fmt: skip
    codes = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for code in codes:
        exec(code, found)
    assert len(codes) == 2 and found["model"] is clip and found["loss"].isfinite()
    assert clip.logit_scale != before


def test_the_table_lists_the_known_classes() -> None:
    table = PAGE.read_text().split("## Classes")[1].split("A class whose forward")[0]
    listed = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+Model)`", " ".join(listed))) == NAMES
