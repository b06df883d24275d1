"""The code of the pages about hosts runs."""

import re
from typing import Any

import pytest
import torch
from support.embedded import Projected, guide
from support.installation import ROOT
from support.peers import peer

PAGES = [ROOT / "docs/sentence-transformers.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code(page: Any) -> None:
    for name in ("sentence_transformers", "lightly.loss", "pytorch_metric_learning.losses"):
        peer(name)
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    names = {"model": Projected(4, 3), "guide": guide(), "x": x, "y": y}
    names["labels"] = torch.arange(6) // 2
    blocks = re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["losses"].GISTEmbedLoss is type(names["loss"]).__bases__[0]
    names["value"].backward()
    assert x.grad is not None
