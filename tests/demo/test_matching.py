"""The matching head: padding, other rows, learning, gradients, negatives, files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.clip.matching import MatchingHead, matching_loss
from fastclip.clip.model import CLIP, CLIPConfig
from fastclip.clip.views import FUSIONS, WithViews
from fastclip.retrieval import sample_negatives

SMALL = CLIPConfig(
    embed_dim=16, image_size=8, patch_size=4, image_width=32, image_layers=1, image_heads=2,
    vocab_size=40, context_length=10, text_width=24, text_layers=1, text_heads=2,
)  # fmt: skip
END = SMALL.vocab_size - 1


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def some_pairs(count: int, length: int = 6) -> tuple[Tensor, Tensor]:
    """Returns pictures and captions of two to `length` tokens, with padding after their end."""
    tokens = torch.zeros(count, length, dtype=torch.long)
    for row, end in enumerate(torch.randint(1, length, (count,)).tolist()):
        tokens[row, :end] = torch.randint(1, END, (end,))
        tokens[row, end] = END
    return torch.rand(count, 3, 8, 8) * 2 - 1, tokens


@pytest.fixture(params=FUSIONS)
def pair(request: pytest.FixtureRequest) -> tuple[CLIP, MatchingHead]:
    return CLIP(SMALL), MatchingHead(SMALL, request.param, layers=3)


def test_padding_and_other_rows_do_not_change_a_logit(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(5)
    logits = head.match(model, images, tokens)
    assert logits.shape == (5,) and logits.std() > 1e-3
    wider = torch.cat((tokens, torch.randint(0, END, (5, 4))), dim=1)
    torch.testing.assert_close(head.match(model, images, wider), logits)
    for row in range(5):
        end = int(tokens[row].argmax()) + 1
        alone = head.match(model, images[row : row + 1], tokens[row : row + 1, :end])
        torch.testing.assert_close(alone[0], logits[row])


def test_every_word_and_patch_matters(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(1)
    logit = head.match(model, images, tokens)
    for place in range(int(tokens[0].argmax())):
        other = tokens.clone()
        other[0, place] = other[0, place] % (END - 1) + 1
        assert (head.match(model, images, other) - logit).abs() > 1e-6
    for row in (0, 4):
        for column in (0, 4):
            other = images.clone()
            other[..., row : row + 4, column : column + 4] *= -1
            assert (head.match(model, other, tokens) - logit).abs() > 1e-6


@pytest.mark.parametrize("fusion", ["early", "middle"])
def test_the_logit_is_read_at_the_end_of_the_caption(fusion: str) -> None:
    """Layers that add nothing leave the end of the caption, which no picture changes."""
    model, head = CLIP(SMALL), MatchingHead(SMALL, fusion)
    images, tokens = some_pairs(3)
    before = head.match(model, images, tokens)
    for block in head.blocks:
        for linear in (block.out, block.down):
            torch.nn.init.zeros_(linear.weight)
    after = head.match(model, images, tokens)
    assert torch.equal(after, head.match(model, images.flip(0), tokens))
    assert not torch.allclose(after, before)


def test_gradients_reach_both_towers(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(4)
    head.match(model, images, tokens).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    missing = {name for name, _ in model.named_parameters()} - moved
    # The fusion reads the towers at one depth: what follows has no gradient.
    after = {
        "early": ("logit_scale", "projection", "tower.blocks", "tower.norm"),
        "middle": ("logit_scale", "projection"),
        "late": ("logit_scale",),
    }[head.fusion]
    assert all(any(part in name for part in after) for name in missing)
    assert all(any(part in name for name in missing) for part in after)
    assert {"image_tower.positions", "text_tower.positions", "token_embedding.weight"} <= moved


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_learns_a_rule(fusion: str) -> None:
    """A pair matches if the picture has the colour that the word names."""
    model, head = CLIP(SMALL), MatchingHead(SMALL, fusion)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])
    right = []
    for _ in range(80):
        seen, said = torch.randint(0, 4, (2, 64))
        said = torch.where(torch.rand(64) < 0.5, seen, said)
        images = colours[seen][:, :, None, None].expand(-1, -1, 8, 8)
        tokens = torch.stack((said + 1, torch.full_like(said, END)), dim=1)
        logits, match = head.match(model, images, tokens), seen == said
        right.append(((logits > 0) == match).float().mean().item())
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, match.float()).backward()
        optimizer.step()
    assert right[0] < 0.7 and sum(right[-10:]) / 10 > 0.97


def test_views_leave_the_outputs_as_they_are(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(3)
    outputs = WithViews(model, head.fusion)(images, tokens)
    for name, value in model(images, tokens).items():
        assert torch.equal(outputs.pop(name), value)
    assert set(outputs) == {"image_view", "text_view"}


def test_the_loss_is_that_of_pairs_and_negatives(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(4)
    views = WithViews(model, head.fusion)(images, tokens)
    ids = torch.tensor([0, 1, 2, 1])
    found = matching_loss(head, views, tokens, seed=3, ids=ids)
    x, y, scale = (views[name] for name in ("image_features", "text_features", "logit_scale"))
    rows, columns = sample_negatives(x, y, scale, seed=3, ids=(ids, ids))
    images_at, texts_at = [0, 1, 2, 3, *columns.tolist()], [*rows.tolist(), 0, 1, 2, 3]
    wrong = head.match(model, images[images_at], tokens[texts_at])
    expected = F.softplus(wrong).mean() + F.softplus(-head.match(model, images, tokens)).mean()
    torch.testing.assert_close(found, expected / 2)
    # The towers learn from the head, too.
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, dense = (
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected / 2)
    )
    for a, b in zip(ours, dense, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(a is not None for a in ours)


def test_a_pair_without_a_negative_is_an_error(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(3)
    views = WithViews(model, head.fusion)(images, tokens)
    with pytest.raises(ValueError, match="every pair must have a negative, got 3 pairs"):
        matching_loss(head, views, tokens, seed=0, ids=torch.zeros(3, dtype=torch.int64))


def test_one_file_holds_the_model_and_the_head(
    pair: tuple[CLIP, MatchingHead], tmp_path: Path
) -> None:
    model, head = pair
    images, tokens = some_pairs(3)
    file = tmp_path / "clip.safetensors"
    head.save(file, model, steps="7")
    again, head_again = CLIP.load(file), MatchingHead.load(file)
    assert (head_again.fusion, head_again.layers) == (head.fusion, 3)
    assert torch.equal(head_again.match(again, images, tokens), head.match(model, images, tokens))
    model.save(file)
    assert torch.equal(CLIP.load(file).encode_image(images), model.encode_image(images))
    with pytest.raises(ValueError, match="must hold a matching head, got a CLIP alone"):
        MatchingHead.load(file)


def test_wrong_options_and_inputs_are_named(pair: tuple[CLIP, MatchingHead]) -> None:
    model, head = pair
    images, tokens = some_pairs(3)
    with pytest.raises(ValueError, match="must have the same number of rows, got 1, 3, 3"):
        head.match(model, images[:1], tokens)
    with pytest.raises(ValueError, match="fusion must be one of early, middle, late, got 'latest'"):
        MatchingHead(SMALL, "latest")
    with pytest.raises(ValueError, match="layers must be at least 1 for 'early', got 0"):
        MatchingHead(SMALL, "early", layers=0)
    with pytest.raises(ValueError, match="layers must be at least 2 for 'middle', got 1"):
        MatchingHead(SMALL, "middle", layers=1)
