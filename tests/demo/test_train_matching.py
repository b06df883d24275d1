"""The demo with a matching head: curves, ranks, resumption, evaluation, files, options."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import demo_task
from support.ranks.processes import Ranks

from fastclip.clip import matching
from fastclip.clip.matching import MatchingHead, matching_loss
from fastclip.clip.model import CLIP
from fastclip.clip.views import FUSIONS
from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.emoji.evaluate_matching import (
    evaluate_matching,
    hard_negatives,
    hits,
    ordered_anew,
    pair_scores,
)
from fastclip.demo.matching import MatchingLoss
from fastclip.demo.train import Task, main
from fastclip.demo.workers import Workers


def curve(fusion: str, batch_size: int = 12, **options: Any) -> list[float]:
    return demo_task.trained(
        demo_task.small(), batch_size, matching=fusion, steps=4, **options
    ).losses


@pytest.fixture(scope="module", params=FUSIONS)
def fusion(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def losses(fusion: str) -> list[float]:
    return curve(fusion)


def test_fused_dense_and_micro_batches_have_one_curve(fusion: str, losses: list[float]) -> None:
    """The drawn negatives are the same, since the features differ by rounding alone."""
    assert curve(fusion, implementation="dense") == pytest.approx(losses, rel=2e-4)
    assert curve(fusion, micro_batch=5) == pytest.approx(losses, rel=2e-4)
    # An untrained head adds about ln 2 to the contrastive loss.
    assert losses[0] - curve("none")[0] == pytest.approx(0.69, abs=0.15)


def test_a_resumed_training_equals_an_uninterrupted_one(
    fusion: str, losses: list[float], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "training.pt", {}, {}, every=1)
    assert curve(fusion, stop=2, checkpoint=checkpoint) == losses[:2]
    state = checkpoint.load()
    assert state["loss"]["matching.step"] == 2 and "matching.head.logit.weight" in state["loss"]
    assert curve(fusion, state=state) == losses
    # The head's weights and the place in the sequence of draws count.
    state["loss"]["matching.step"] += 1
    assert curve(fusion, state=state)[2] != losses[2]


def test_negatives_change_with_the_step_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    draw = matching.sample_negatives

    def record(*arguments: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        return draw(*arguments, seed=seed, **options)

    monkeypatch.setattr(matching, "sample_negatives", record)
    curve("late")
    curve("late", seed=1)
    assert len(set(seeds)) == 8


def test_equal_captions_are_no_negatives() -> None:
    """A batch of three pairs with two captions leaves one choice to the third pair's partners."""
    task = replace(demo_task.small(), matching="late")
    model, stream = task.start(0, 3)
    batch, seen = next(stream), []
    loss = task.batch_loss("fused", 3)
    loss.matching.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[-1]))
    batch = replace(batch, captions=("a", "b", "a"))
    outputs = model(batch.images, batch.tokens)
    x, y = outputs["image_features"], outputs["text_features"]
    loss(batch, **outputs, image_view=x, text_view=y)
    assert seen[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"implementation": "dense"}], ids=str)
def test_two_ranks_keep_one_model(options: dict[str, Any], two: Ranks) -> None:
    """Each rank draws among its own pairs, so that the curve is another than that of one process.
    The gradients of the head are averaged as those of the towers are."""
    options = {"steps": 4, "matching": "late", **options}
    first, second = two.run(demo_task.parameters_after, 9, options)
    assert first.keys() == second.keys() and "loss.matching.head.logit.weight" in first
    assert all(torch.equal(first[name], second[name]) for name in first)
    if len(options) > 2:
        fused, _ = two.run(demo_task.curve, 9, {"steps": 4, "matching": "late"})
        assert two.run(demo_task.curve, 9, options)[1] == pytest.approx(fused, rel=2e-4)


def test_the_mean_over_ranks_is_that_of_all_pairs() -> None:
    config = demo_task.small().config
    shares = [MatchingLoss(config, "late", 9, 0, Workers(rank, 2)).share for rank in (0, 1)]
    assert shares == pytest.approx([10 / 9, 8 / 9])  # ranks have five and four pairs


def test_a_workers_loss_is_its_share_of_that_of_its_pairs() -> None:
    config = demo_task.small().config
    loss = MatchingLoss(config, "late", 7, 3, Workers(0, 2))
    x, y = F.normalize(torch.randn(2, 4, config.embed_dim), dim=2)
    outputs = {
        "image_features": x, "text_features": y, "image_view": x, "text_view": y,
        "logit_scale": torch.tensor(2.0),
    }  # fmt: skip
    tokens, ids = torch.ones(4, 3, dtype=torch.int64), torch.tensor([0, 1, 0, 0])
    for step in range(1, 9):
        found = loss(outputs, tokens, ids)
        seed = 3 * 1_000_003 + step
        expected = matching_loss(loss.head, outputs, tokens, ids=ids, seed=seed)
        torch.testing.assert_close(found, expected * 8 / 7)


def test_a_rank_with_the_whole_batch_draws_among_its_own_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dense loss has all captions, the head those of the rank's own pairs."""
    task = replace(demo_task.small(), matching="late", workers=Workers(1, 2))
    model, stream = task.start(0, 5)
    batch, seen = replace(next(stream), captions=("a", "b", "c", "d", "d")), []
    loss = task.batch_loss("dense", 5)
    monkeypatch.setattr(loss, "_whole", lambda *towers: [t.repeat(3, 1)[:5] for t in towers])
    loss.matching.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[-1]))
    outputs = model(batch.images, batch.tokens)
    x, y = outputs["image_features"], outputs["text_features"]
    with pytest.raises(ValueError, match="every pair must have a negative"):
        loss(batch, **outputs, image_view=x, text_view=y)
    assert len(x) == 2 and seen[0].tolist() == [3, 3]


def test_an_untrained_head_scores_about_chance(fusion: str) -> None:
    task = replace(demo_task.small(), matching=fusion)
    model, _ = task.start(0, 8)
    head = task.batch_loss("fused", 8).matching.head
    some = {group: task.split.vendors[group] for group in task.split.one_vendor[:80]}
    split = replace(task.split, held_out=task.split.held_out[:90], vendors=some)
    scores = evaluate_matching(head, model, task.emoji, split, task.encode)
    one, held = 80, 90
    for test, count, queries in (("other vendor", one, one), ("held out", held, 2 * held)):
        assert len(scores[test]) == 4
        for name, score in scores[test].items():
            assert score.queries == queries
            if name.startswith("match"):
                assert score.chance == 0.5 and 0.38 < score.value < 0.62
            else:
                assert score.chance == pytest.approx(1 / count) and score.value < 0.1


def test_a_perfect_head_finds_what_is_among_the_nearest() -> None:
    """Row i has i columns that are nearer than its own."""
    similarity = torch.ones(40, 40).tril(-1) + 0.5 * torch.eye(40)
    assert hits(similarity, 1) == pytest.approx(1 / 40)

    def knows(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (rows == columns).float()

    assert hits(ordered_anew(similarity, knows), 1) == pytest.approx(16 / 40)
    # A head that says the same of all pairs finds nothing.
    assert hits(ordered_anew(similarity, lambda rows, _: 0.0 * rows), 1) == 0
    assert hits(similarity * torch.nan, 1) == 0


def test_both_directions_ask_for_the_same_pairs() -> None:
    """The head knows all pairs, but takes picture 5 for a match with any other name."""
    numbers = torch.arange(10)

    def head(images: torch.Tensor, texts: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where(images == texts, 1.0, torch.where(images == 5, 2.0, -1.0))

    side = torch.eye(10), numbers
    scores = pair_scores(head, side, side, numbers, torch.Generator().manual_seed(0))
    assert {name: round(score.value, 4) for name, score in scores.items()} == {
        "match, random negative": 0.95,
        "match, hard negative": 0.95,
        "image to text R@1, top 16 anew": 0.9,
        "text to image R@1, top 16 anew": 0.1,
    }


def test_a_hard_negative_is_near_wrong_and_used_once() -> None:
    similarity = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    found = hard_negatives(similarity)
    assert sorted(found.tolist()) == list(range(30)) and (found != torch.arange(30)).all()
    assert similarity[range(30), found].mean() > 1
    # Three rows: the first two want each other, and the last one is left with itself.
    near = torch.tensor([[0.0, 9, 1], [8, 0, 2], [3, 4, 0]])
    assert hard_negatives(near).tolist() == [2, 0, 1]


def test_the_demo_saves_evaluates_and_reports_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Task, "load", lambda _, workers: replace(demo_task.small()))
    main(["--steps", "4", "--batch-size", "8", "--out", str(tmp_path), "--matching", "late"])
    out = capsys.readouterr().out
    assert out.count("match, hard negative") == out.count("text to image R@1, top 16 anew") == 2
    assert float(out.rpartition("at any step: ")[2].split()[0]) < 1e-3
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["matching"] == "late"
    file = tmp_path / "clip.safetensors"
    model, head = CLIP.load(file), MatchingHead.load(file)
    task = demo_task.small()
    scores = evaluate_matching(head, model, task.emoji, task.split, task.encode)
    kept = results["scores"]["held out"]
    found = {name: score.value for name, score in scores["held out"].items()}
    assert found == {name: kept[name]["value"] for name in found} and len(kept) == 8


def test_a_lone_pair_on_a_rank_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = Workers(0, 3, 0, 3)
    monkeypatch.setattr(Workers, "launched", classmethod(lambda cls: workers))
    monkeypatch.setattr(
        Task, "load", lambda _, workers: replace(demo_task.small(), workers=workers)
    )
    options = ["--batch-size", "5", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*options, "--matching", "late"])
    error = capsys.readouterr().err
    assert "batch size must be at least 2 for each of 3 ranks" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main([*options, "--matching", "soon"])
    assert "argument --matching: invalid choice: 'soon'" in capsys.readouterr().err
