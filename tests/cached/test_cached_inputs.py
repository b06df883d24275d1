"""Batches of `cached_step` as users have them: dictionaries, nested containers, strings, pairs."""

from collections import UserDict, namedtuple
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip import cached_step
from fastclip.loss import ClipLoss, clip_loss, info_nce

N, WIDTH = 11, 6
Pair = namedtuple("Pair", "image caption")


class Batch(UserDict):
    """A type as transformers' BatchEncoding: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def linear(width: int = WIDTH) -> nn.Linear:
    torch.manual_seed(width)
    return nn.Linear(width, 5).double()


def rows(seed: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


class Model(nn.Module):
    """Takes any batch in which `read` finds images and texts."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.image, self.text = linear(), linear()
        self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.read = read
        self.seen: list[Any] = []

    def forward(self, *batch: Any, **by_name: Any) -> tuple[Tensor, ...]:
        self.seen.append((batch, by_name))
        x, y = self.read(*batch, **by_name)
        return self.image(x), self.text(y), self.logit_scale.exp()


def assert_as_a_whole(model: Any, step: Any, whole: Any) -> None:
    """`step` leaves the gradients that the backward of `whole()` leaves."""
    value = whole()
    exact = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    found = step()
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=0)
    for p, gradient in zip(model.parameters(), exact, strict=True):
        assert (p.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-14)


def lengths(texts: list[str]) -> Tensor:
    """A text tower's input: the lengths and the first letters of strings."""
    return torch.tensor([[len(t), ord(t[0])] for t in texts]).double() / 100


x, y = rows(1), rows(2)
captions = [chr(97 + i) * (i + 1) for i in range(N)]
POSITIONAL: dict[str, tuple[Any, Any]] = {
    "dict": (({"a": x, "b": {"c": y, "d": None}},), lambda b: (b["a"], b["b"]["c"])),
    "list of dicts": (([{"a": x}, {"a": y}],), lambda b: (b[0]["a"], b[1]["a"])),
    "named tuple": ((Pair(x, (y, "as is")),), lambda b: (b.image, b.caption[0])),
    "mapping with attributes": ((Batch(a=x, b=y),), lambda b: (b.a, b.b)),
    "whole objects": ((x, None, y, (3, 4), "text"), lambda a, _, b, *others: (a, b)),
    "arrays": ((x.numpy(), y.numpy()), lambda a, b: (torch.tensor(a), torch.tensor(b))),
    "scalars": ((x, y, torch.tensor(1.0), np.float64(2)), lambda a, b, *others: (a, b)),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_any_batch(name: str) -> None:
    batch, read = POSITIONAL[name]
    model = Model(read)
    assert_as_a_whole(
        model,
        lambda: cached_step(model, clip_loss, *batch, micro_batch=4),
        lambda: clip_loss(*model(*batch)),
    )
    whole, *parts = (read(*positional) for positional, _ in model.seen)
    assert [len(part[0]) for part in parts] == [4, 4, 3] * 2 and len(whole[0]) == N
    assert all(type(given[0]) is type(batch[0]) for given, _ in model.seen)


class Table(MutableMapping):
    """A mapping whose `copy.copy` shares its entries."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def test_the_batch_keeps_its_entries() -> None:
    for batch in (Batch(a=x, b=y), Table(a=x, b=y)):
        model = Model(lambda b: (b["a"], b["b"]))
        value = cached_step(model, clip_loss, batch, micro_batch=4)
        torch.testing.assert_close(value, clip_loss(*model({"a": x, "b": y})).detach())
        assert batch["a"] is x and batch["b"] is y


def test_objects_without_rows_are_passed_on_whole() -> None:
    sizes = {"shape": (3, 4), "names": ()}
    model = Model(lambda a, b, options: (a, b))
    cached_step(model, clip_loss, x, y, micro_batch=4, options=sizes)
    assert all(by_name["options"] is sizes for _, by_name in model.seen)


def test_keywords() -> None:
    model = Model(lambda pixel_values, input_ids: (pixel_values, input_ids))
    batch = {"pixel_values": x, "input_ids": y}
    assert_as_a_whole(
        model,
        lambda: cached_step(model, clip_loss, **batch, micro_batch=4),
        lambda: clip_loss(*model(**batch)),
    )


@pytest.mark.parametrize("texts", [captions, tuple(captions)], ids=["list", "tuple"])
def test_strings_are_split(texts: Any) -> None:
    model = Model(lambda a, b: (a, lengths(b)))
    model.text = linear(2)
    assert_as_a_whole(
        model,
        lambda: cached_step(model, clip_loss, x, texts, micro_batch=4),
        lambda: clip_loss(*model(x, texts)),
    )
    assert [len(batch[1]) for batch, _ in model.seen[1:4]] == [4, 4, 3]


def test_leaves_among_the_inputs_get_gradients() -> None:
    """Only results of operations are refused: their graph would serve one micro-batch."""
    model, images = Model(lambda a, b: (a, b)), x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(clip_loss(*model(images, y)), images)
    cached_step(model, clip_loss, images, y, micro_batch=4)
    torch.testing.assert_close(images.grad, exact, rtol=1e-9, atol=1e-14)


def test_sizes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"got inputs\[0\]\['a'\]: 11, inputs\['b'\]\[1\]: 10"):
        cached_step(Model(None), clip_loss, {"a": x}, b=[None, y[1:]], micro_batch=4)


def embeds(images: Tensor, texts: Tensor, model: Model) -> dict[str, Any]:
    """As transformers' CLIPModel: other names, and entries that are no features."""
    a, b, scale = model(images, texts)
    return {"logits": a @ b.T, "image_embeds": a, "text_embeds": b, "nested": {"a": a}, "s": scale}


def test_outputs_of_other_names() -> None:
    model = Model(lambda a, b: (a, b))

    def named(images: Tensor, texts: Tensor) -> dict[str, Any]:
        return embeds(images, texts, model)

    names = {"image_features": "image_embeds", "text_features": "text_embeds", "logit_scale": "s"}
    for outputs in (names, lambda r: {name: r[key] for name, key in names.items()}):
        model.zero_grad()
        assert_as_a_whole(
            model,
            lambda outputs=outputs: cached_step(
                named, ClipLoss(), x, y, micro_batch=4, outputs=outputs
            ),
            lambda: ClipLoss()(*model(x, y)),
        )
    places = {"image_features": 0, "text_features": 1, "logit_scale": 2}
    value = cached_step(model, ClipLoss(), x, y, micro_batch=4, outputs=places)
    torch.testing.assert_close(value, clip_loss(*model(x, y)).detach())
    got = "got dict with logits, image_embeds, text_embeds, nested, s"
    with pytest.raises(ValueError, match=f"outputs= must say which entries they are, {got}"):
        cached_step(named, ClipLoss(), x, y, micro_batch=4)
    with pytest.raises(ValueError, match="got 'embeds', which is not in dict with logits, "):
        cached_step(named, ClipLoss(), x, y, micro_batch=4, outputs={"image_features": "embeds"})


def test_one_tower_for_both_views() -> None:
    """A model may return features alone, for a loss of one set."""
    tower = linear()
    assert_as_a_whole(
        tower,
        lambda: cached_step(tower, lambda z: z.logsumexp(0).square().sum(), x, micro_batch=4),
        lambda: tower(x).logsumexp(0).square().sum(),
    )


class Pooled(nn.Module):
    """A tower whose result has attributes, as transformers' have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return namedtuple("Result", "pooled")(self.linear(ids * mask))


@pytest.mark.parametrize("micro_batch", [np.int64(4), (2, 6)], ids=["one", "two"])
@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_two_towers(named: bool, micro_batch: Any) -> None:
    image, text = linear(), Pooled()
    log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    both = nn.ModuleList((image, text))
    both.scale = log_scale
    mask = (rows(3) > 0).double()

    def step() -> Tensor:
        scale = log_scale.exp()
        return cached_step(
            (image, text), ClipLoss(), x, {"ids": y, "mask": mask}, micro_batch=micro_batch,
            outputs=(None, "pooled"), shared={"logit_scale": scale} if named else (scale, None),
        )  # fmt: skip

    both.zero_grad()
    assert_as_a_whole(
        both, step, lambda: ClipLoss()(image(x), text(y, mask).pooled, log_scale.exp())
    )


def test_each_tower_has_micro_batches_of_its_own() -> None:
    sizes: dict[str, list[int]] = {"image": [], "text": []}
    towers = []
    for name, tower in (("image", linear()), ("text", linear())):
        tower.register_forward_hook(lambda m, i, o, name=name: sizes[name].append(len(o)))
        towers.append(tower)
    cached_step(tuple(towers), clip_loss, (x,), (y,), micro_batch=(2, 6), shared=5.0)
    assert sizes == {"image": [2, 2, 2, 2, 2, 1] * 2, "text": [6, 5] * 2}


def test_two_towers_may_have_different_numbers_of_rows() -> None:
    queries, documents = linear(), linear()
    keys = rows(4, 3 * N)
    both = nn.ModuleList((queries, documents))
    assert_as_a_whole(
        both,
        lambda: cached_step((queries, documents), info_nce, x, keys, micro_batch=4, shared=5.0),
        lambda: info_nce(queries(x), documents(keys), 5.0),
    )


def test_a_frozen_tower_is_encoded_once() -> None:
    image, text = linear(), linear().requires_grad_(False)
    calls: list[int] = []
    text.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    assert_as_a_whole(
        image,
        lambda: cached_step((image, text), clip_loss, x, y, micro_batch=4, shared=5.0),
        lambda: clip_loss(image(x), F.linear(y, text.weight, text.bias), 5.0),
    )
    assert calls == [4, 4, 3] and text.weight.grad is None


def test_a_leaf_gets_its_gradient_through_a_frozen_tower() -> None:
    image, text, images = linear().requires_grad_(False), linear(), x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(clip_loss(image(images), text(y), 5.0), images)
    cached_step((image, text), clip_loss, images, y, micro_batch=4, shared=5.0)
    torch.testing.assert_close(images.grad, exact, rtol=1e-9, atol=1e-14)


def test_a_shared_value_gets_a_gradient_though_both_towers_are_frozen() -> None:
    image, text = linear().requires_grad_(False), linear().requires_grad_(False)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(clip_loss(image(x), text(y), scale), scale)
    cached_step((image, text), clip_loss, x, y, micro_batch=4, shared=scale)
    torch.testing.assert_close(scale.grad, exact)


def test_errors_of_two_towers() -> None:
    towers = linear(), linear()

    def refused(message: str, *inputs: Any, own: Any = towers, **options: Any) -> None:
        given = {"micro_batch": 4, "shared": 5.0, **options}
        with pytest.raises(ValueError, match=message):
            cached_step(own, clip_loss, *inputs, **given)

    refused("two inputs, one each, and none by name, got 2 towers, 1 inputs and 0 by name", x)
    refused("got 3 towers, 2 inputs and 1 by name", x, y, own=(*towers, towers[0]), mask=x)
    refused("micro_batch must be one value or a pair for two towers, got 3", x, y,
            micro_batch=(1, 2, 3))  # fmt: skip
    refused("shared must have one number each, .* got shape \\(11, 6\\)", x, y, shared=(5.0, x))
    refused("shared must be None for one model, .* got float", x, own=towers[0])
    refused(r"one number of rows, got inputs\[1\]\['a'\]: 11, inputs\[1\]\['b'\]: 10", x,
            {"a": y, "b": y[1:]})  # fmt: skip
    refused("must return features \\(m, D\\), .* got tuple of a tensor of shape \\(4, 5\\)", x, y,
            own=(lambda a: (towers[0](a),), towers[1]))  # fmt: skip
    refused("got 'pooled', which is not in a tensor", x, y, outputs="pooled")
    refused("outputs must be a key, .* for two towers, got a dictionary", x, y,
            outputs={"image_features": "pooled"})  # fmt: skip
