"""The README's Python runs, in the order in which it is read."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastclip import kinds, reference

README = Path(__file__).parents[2] / "README.md"


def section(title: str) -> str:
    """The code under a heading."""
    text = README.read_text().split(f"# {title}\n")[1].split("\n#")[0].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def names() -> dict[str, Any]:
    x, y, queue = (torch.randn(k, 8, requires_grad=True) for k in (20, 20, 33))
    return {
        "torch": torch, "F": F, "x": x, "y": y, "queue": queue,
        "logit_scale": torch.tensor(2.0, requires_grad=True), "labels": torch.arange(20) // 3,
    }  # fmt: skip


def test_write_your_own_loss(names: dict[str, Any]) -> None:
    exec(section("Write your own loss"), names)
    x, y, queue, scale = (names[k].detach() for k in ("x", "y", "queue", "logit_scale"))
    logits, diagonal = scale * x @ y.T, torch.arange(20)
    negatives = logits.masked_fill(torch.eye(20, dtype=torch.bool), -torch.inf)
    same = names["labels"][:, None] == names["labels"]
    of_positives = logits.masked_fill(~same, -torch.inf).logsumexp(1)
    expected = {
        "clip": reference.clip_loss(x, y, scale),
        "info_nce": F.cross_entropy(logits, diagonal),
        "decoupled": (negatives.logsumexp(1) - logits.diagonal()).mean(),
        "with_queue": torch.cat((negatives, scale * x @ queue.T), 1).logsumexp(1),
        "supervised": (logits.logsumexp(1) - of_positives).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(names[name].float(), value, rtol=1e-5, atol=1e-5)
        names[name].sum().backward(retain_graph=True)
    assert all(names[k].grad is not None for k in ("x", "y", "queue", "logit_scale"))


def test_add_a_kind(names: dict[str, Any]) -> None:
    exec(section("Write your own loss"), names)
    try:
        exec(section("How to add a loss, or a kind of statistic"), names)
    finally:
        kinds.KINDS.pop("squared_hinge", None)
    x, y = names["x"].detach(), names["y"].detach()
    signed = (1 - 2 * torch.eye(20)) * (2.0 * x @ y.T)
    dense = F.relu(1 + signed).square().sum() / 20
    torch.testing.assert_close(names["loss"].float(), dense, rtol=1e-5, atol=1e-5)
