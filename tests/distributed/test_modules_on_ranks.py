"""Modules of losses on ranks: without pairs, with local negatives, copied and pickled."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.ranks import modules
from support.ranks.cases import Case, Module, each_module, emulated
from support.ranks.processes import Ranks

from fastclip import clip_loss


@pytest.mark.parametrize("name", modules.LOCAL)
def test_local_negatives_warn_once(two: Ranks, name: str) -> None:
    """The value stays open_clip's. A group of one rank does not warn."""
    for (text,), difference in two.run(modules.local, name, False):
        assert text.startswith(f"{name} with world_size=1 takes negatives from this rank alone")
        assert "pass rank and world_size" in text and text.endswith("modules.py")
        assert difference < 1e-6


def test_open_clips_classes_beside_a_rank_without_pairs(two: Ranks) -> None:
    flags = product((False, True), repeat=3)
    every = [
        Module(
            Case("clip", (0, 5), upstream=(2.0, -0.5)),
            {"local_loss": local, "gather_with_grad": grad, "ring": ring, "uneven": True},
        )
        for local, grad, ring in flags
    ]
    every += [
        Module(Case("siglip", (4, 0)), {"dist_impl": name, "uneven": True})
        for name in ("bidir", "gather")
    ]
    for one, found in zip(every, zip(*two.run(each_module, every), strict=True), strict=True):
        for mine, exact in zip(found, emulated(one.case, **one.combination), strict=True):
            for name, value in exact.items():
                if name != "dbias" or one.case.loss == "siglip":
                    assert mine[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (one, name)


def test_copies_share_the_group_and_pickling_refuses_it(two: Ranks) -> None:
    for found in two.run(modules.copied):
        for name, errors in found.items():
            for error in errors:
                assert error.startswith(f"TypeError: {name} must have process_group=None"), error


def test_one_script_for_one_process_and_for_many(two: Ranks) -> None:
    """Without a process group, too."""
    for found in (two.run(modules.script), [modules.script(0, 1)]):
        values, gradients = zip(*found, strict=True)
        sides = zip(*(modules.pairs(rank) for rank in range(len(found))), strict=True)
        x, y = (torch.cat(of).detach().requires_grad_() for of in sides)
        exact = clip_loss(x, y, 2.0)
        exact.backward()
        assert sum(values) / len(found) == pytest.approx(exact.item(), rel=1e-6)
        torch.testing.assert_close(torch.cat(gradients) / len(found), x.grad)
