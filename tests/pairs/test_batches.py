"""Batches of one's own pairs: epochs, captions, slices, continuation."""

import gc
import multiprocessing
import os
import signal
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import pairs_task
from support.exported_emoji import export

from fastclip.pairs.batches import Batch, Batches
from fastclip.pairs.images import Augmentation
from fastclip.pairs.pair import Pair, Place
from fastclip.pairs.plan import Plan
from fastclip.pairs.task import Task

PAIRS = [Pair(f"{k}.png", Place(""), (f"a{k}", f"b{k}"), "") for k in range(20)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return pairs_task.loaded(export(tmp_path_factory.mktemp("emoji"), "folder", 30))


def stream(task: Task, size: int = 9, seed: int = 0, processes: int = 0, **rows: slice) -> Batches:
    return Batches(
        task.trained, task.encode, size, seed, 16, Augmentation(0.6), processes=processes, **rows
    )


def same(a: Batch, b: Batch) -> bool:
    drawn = (a.captions, a.samples) == (b.captions, b.samples)
    return drawn and torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)


def test_an_epoch_has_each_image_once_with_one_of_its_captions() -> None:
    plan = Plan(PAIRS, 6, 0)
    drawn: Counter[str] = Counter()
    for epoch in range(40):
        numbers = [n for step in range(3 * epoch, 3 * epoch + 3) for n in plan.numbers(step)]
        assert len(numbers) == len(set(numbers)) == 18
        captions = [c for step in range(3 * epoch, 3 * epoch + 3) for c in plan.captions(step)]
        assert [int(caption[1:]) for caption in captions] == numbers
        drawn.update(caption[0] for caption in captions)
    assert 300 < drawn["a"] < 420 and drawn["a"] + drawn["b"] == 720
    assert plan.numbers(0) != plan.numbers(3) and plan.captions(0) == Plan(PAIRS, 6, 0).captions(0)
    assert plan.numbers(0) != Plan(PAIRS, 6, 1).numbers(0)
    crops = plan.crops(2, slice(1, 4))
    for step in range(2, 5):
        keys = [(n, f"0 {step // 3} {PAIRS[n].name}") for n in plan.numbers(step)[1:4]]
        assert next(crops) == keys


@pytest.mark.parametrize("size", [0, 1, 21])
def test_a_batch_size_must_fit_the_pairs(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch size must be from 2 to 20, .* got {size}"):
        Plan(PAIRS, size, 0)


def test_a_stream_continues_from_its_state(task: Task) -> None:
    for taken in (0, 1, 3):
        whole, other = stream(task), stream(task)
        for _ in range(taken):
            next(whole)
        next(other)
        other.load_state_dict(whole.state_dict())
        wanted = [next(whole) for _ in range(4)]
        assert all(same(next(other), batch) for batch in wanted)
        assert not same(wanted[0], wanted[1])
    assert not same(next(stream(task)), next(stream(task, seed=1)))


def test_slices_and_processes_decode_the_same_images(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = multiprocessing.active_children()  # such as ranks that other tests share
    monkeypatch.setattr("fastclip.pairs.plan.chunks", lambda n: _chunks(n))
    monkeypatch.setattr("fastclip.pairs.batches.chunks", lambda n: _chunks(n))
    monkeypatch.setattr("fastclip.pairs.batches.CHUNK", 2)
    whole, decoded_elsewhere = stream(task), stream(task, processes=2)
    parts = [stream(task, rows=rows) for rows in (slice(0, 5), slice(5, 9))]
    for step in range(5):
        batch, slices = next(whole), [next(part) for part in parts]
        assert same(next(decoded_elsewhere), batch)
        if step == 0:  # Ctrl-C reaches all processes of a terminal; only a step's end heeds it
            decoders = [p for p in multiprocessing.active_children() if p not in others]
            assert len(decoders) == 2
            for process in decoders:
                os.kill(process.pid, signal.SIGINT)
        assert torch.equal(torch.cat([part.images for part in slices]), batch.images)
        assert [len(part.images) for part in slices] == [5, 4]
        for part, tokens in zip(slices, batch.tokens.split([5, 4]), strict=True):
            assert torch.equal(part.tokens, tokens[:, : part.tokens.shape[1]])
            assert (part.captions, part.samples) == (batch.captions, batch.samples)


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + 2, count)) for start in range(0, count, 2)]


def test_pairs_bring_their_own_ids(task: Task) -> None:
    """Equal captions have equal ids, and an image is a sample of its own."""
    options = replace(task, args=type(task.args)(**{**vars(task.args), "loss": "global"}))
    model, batches, loss = options.start()
    assert loss.averages.data_size == len(task.trained)
    batch = next(batches)
    ids = loss._pairs(replace(batch, captions=("x", "y", "x", *batch.captions[3:])), "cpu")
    assert ids.captions[:3].tolist() == [0, 1, 0] and len(ids.captions) == 9
    assert ids.samples.tolist() == [*batch.samples]
    assert {task.trained[n].name for n in batch.samples} <= {p.name for p in task.trained}
    assert loss(batch, **model(batch.images, batch.tokens)).isfinite()


def test_a_stream_is_free_of_cycles(task: Task, tmp_path: Path) -> None:
    """Its processes would otherwise outlive it by seconds."""
    batches = stream(task)
    next(batches)
    alive = weakref.ref(batches)
    gc.disable()
    try:
        del batches
        assert alive() is None
    finally:
        gc.enable()
