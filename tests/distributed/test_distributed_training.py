"""Losses across ranks under DDP and FSDP2, the bytes that ranks send and the memory they hold."""

import pytest
import torch
from support.ranks import training
from support.ranks.processes import Ranks


@pytest.mark.parametrize(
    "options", [{}, {"checkpointed": True}, {"frozen": True}, {"shape": (1,)}], ids=str
)
@pytest.mark.parametrize(
    "ddp", [{"static_graph": True}, {"find_unused_parameters": False}], ids=["static", "plain"]
)
def test_under_ddp(two: Ranks, options: dict, ddp: dict) -> None:
    """The gradients of towers and scale, averaged by DDP itself, are those of one process."""
    assert max(two.run(training.under_ddp, options, ddp)) < 1e-12


def test_cached_under_ddp(two: Ranks) -> None:
    """Gradients are all-reduced once, with the last micro-batch."""
    for error, exchanges in two.run(training.cached_under_ddp):
        assert error < 1e-12 and exchanges == 1


def test_a_static_graph_allows_no_cached_step(two: Ranks) -> None:
    for error in two.run(training.cached_in_a_static_graph):
        assert "static_graph=False" in error


def test_under_fsdp(two: Ranks) -> None:
    """In micro-batches, gradients are sent with the last one only: as many bytes as without."""
    plain, cached = (two.run(training.under_fsdp, micro) for micro in (None, 2))
    for error, sent in plain + cached:
        assert error < 1e-12 and sent == plain[0][1] > 0


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_bytes_sent_are_the_stated_ones(
    three: Ranks, loss: str, dtype: torch.dtype, ring: bool
) -> None:
    """The formula in `distributed.clip_loss`, and at most 40 bytes more for each pair."""
    world_size, b, d = 3, 40, 256
    found = three.run(training.bytes_sent, loss, (b,) * world_size, d, dtype, ring)
    texts, gradients = b * d * dtype.itemsize, 4 * b * d
    others = world_size - 1
    # Around a ring texts travel for the forward and for the backward.
    stated = others * ((2 if ring else 1) * texts + gradients)
    for sent in found:
        total = sum(sent.values())
        assert stated <= total <= stated + 5 * 8 * world_size * b, dict(sent)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_no_rank_sends_for_the_largest_one(three: Ranks, loss: str, ring: bool) -> None:
    """A rank sends its own texts and the others' gradients, and no padding. One without pairs sends
    gradients alone, and costs the others no more than another rank does."""
    sizes, d = (60, 20, 0), 256
    batch = sum(sizes)
    found = three.run(training.bytes_sent, loss, sizes, d, torch.float32, ring)
    for own, sent in zip(sizes, found, strict=True):
        texts = 2 * own * d * 4
        # An all-to-all counts as two thirds of what it is given.
        gradients = 4 * d * ((batch - own) if ring else batch * 2 // 3)
        exactly = (2 if ring else 1) * texts + gradients
        total = sum(sent.values())
        assert exactly <= total <= exactly + 5 * 8 * 3 * max(sizes), (own, dict(sent))


@pytest.mark.parametrize(
    "loss, dtype",
    [("clip", torch.float32), ("clip", torch.bfloat16), ("siglip", torch.bfloat16)],
    ids=lambda value: str(value),
)
def test_memory_is_the_stated_one(three: Ranks, loss: str, dtype: torch.dtype) -> None:
    """The formula in `distributed.clip_loss`, in bytes per element of a rank's features."""
    world_size, b, d, itemsize = 3, 1024, 1024, dtype.itemsize
    gathered, ring = (
        max(three.run(training.most_held, loss, b, d, dtype, ring)) / (b * d)
        for ring in (False, True)
    )
    own = 2 * itemsize + 8
    # States and work space: less than another fp32 gradient.
    slack = 3.6
    assert world_size * (itemsize + 4) < gathered < world_size * (itemsize + 8) + own + slack
    assert ring < min(4 * itemsize + 24 + own + slack, gathered - 4)
