"""Recall and rank of image-text retrieval, under open_clip's names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.checks import check_floating, check_tensor, scalar
from .ranks import Ranks, ranks
from .sides import check_finite

Features = Tensor | Sequence[Tensor]


def metrics(
    image_features: Features,  # (M, D)
    text_features: Features,  # (N, D)
    logit_scale: Tensor | float | None = None,
    image_key: str = "image",
    text_key: str = "text",
    retrieval_chunk_size: int | None = None,
    retrieval_device: torch.device | str | None = None,
    retrieval_dtype: torch.dtype | str | None = torch.float32,
    *,
    ids: tuple[Tensor, Tensor] | None = None,
    pairs: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    normalize: bool = False,
    backend: str | None = None,
) -> dict[str, float]:
    """Returns R@k and the mean and median rank of retrieval in both directions.

    It replaces `open_clip_train`'s `get_clip_metrics`, whose arguments it takes and whose keys it
    returns: `image_to_text_mean_rank`, `image_to_text_median_rank`, `image_to_text_R@1`, `R@5`,
    `R@10`, and the same for `text_to_image`. Ranks count from 1. No matrix of scores is made.

    Args:
        image_features, text_features: one tensor or a list of chunks, any floating dtype.
        logit_scale: a number or a tensor of one element. Only its sign changes ranks; None: 1.
        image_key, text_key: names of the two sides in the keys.
        retrieval_chunk_size: accepted, and not needed.
        retrieval_device: where to compute; None: where the features are.
        retrieval_dtype: the dtype of the features in products; "fp32" is float32, and None or
            "model" leaves them as they are.
        ids: (image_ids (M), text_ids (N)), integers, for several captions of an image: Flickr30k
            and COCO have five. The rank of an image is then that of its best caption, and its
            other captions are not counted, as usual on these datasets.
        pairs: (P, 2), integers, in place of ids: images and texts that belong together. Without ids
            and pairs image i has text i.
        ks: the k of R@k.
        normalize, backend: as in `ranks`.

    Raises:
        TypeError, ValueError: as `ranks`; an image without a text or a text without an image.
    """
    images, texts, ids = pairs_of(
        image_features, text_features, logit_scale, retrieval_device, retrieval_dtype, ids, pairs
    )
    if isinstance(pairs, Tensor):
        pairs = pairs.to(images.device)
    found = ranks(images, texts, ids=ids, pairs=pairs, normalize=normalize, backend=backend)
    check_partners(found)
    return as_metrics(found, image_key, text_key, ks)


def pairs_of(
    image_features: Features, text_features: Features, logit_scale: Tensor | float | None,
    device: torch.device | str | None, dtype: torch.dtype | str | None,
    ids: tuple[Tensor, Tensor] | None, pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Returns both sides' features, the images' with the sign of the scale, and the ids, all on one
    device."""
    images, texts = (
        _whole(name, features, device, dtype)
        for name, features in (("image_features", image_features), ("text_features", text_features))
    )
    if ids is None and pairs is None and len(images) != len(texts):
        raise ValueError(
            "image_features and text_features must be pairs, or ids must be given, got "
            f"{len(images)} and {len(texts)} of them"
        )
    for name, features in (("image_features", images), ("text_features", texts)):
        check_finite(name, features)
    if isinstance(ids, Sequence):
        ids = tuple(i.to(images.device) if isinstance(i, Tensor) else i for i in ids)
    sign = sign_of(logit_scale, images)
    return images if sign == 1 else images * sign, texts, ids


def check_partners(found: Ranks, names: tuple[str, str] = ("image", "text")) -> None:
    """Checks that no line is without a partner."""
    for name, other, lines in zip(names, names[::-1], found, strict=True):
        if bool((lines < 0).any()):
            raise ValueError(
                f"every {name} must have a {other} of its own, got none for {name} "
                f"{int((lines < 0).nonzero()[0])}"
            )


def as_metrics(found: Ranks, image_key: str, text_key: str, ks: Sequence[int]) -> dict[str, float]:
    """Returns the metrics of ranks that count from 0; NaN without any."""
    names = f"{image_key}_to_{text_key}", f"{text_key}_to_{image_key}"
    result: dict[str, float] = {}
    for name, lines in zip(names, found, strict=True):
        lines = lines.cpu()
        result[f"{name}_mean_rank"] = lines.double().mean().item() + 1
        result[f"{name}_median_rank"] = _median(lines) + 1
        for k in ks:
            result[f"{name}_R@{k}"] = (lines < k).double().mean().item()
    return result


def _median(lines: Tensor) -> float:
    """The median, rounded down, as open_clip's."""
    if not len(lines):
        return math.nan
    ordered = lines.sort().values
    middle = (len(lines) - 1) // 2
    low, high = ordered[middle].item(), ordered[len(lines) // 2].item()
    return float((low + high) // 2)


def sign_of(logit_scale: Tensor | float | None, features: Tensor) -> float:
    if logit_scale is None:
        return 1.0
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.detach().to(features.device)
    scale = scalar("logit_scale", logit_scale, features).item()
    if math.isnan(scale):
        raise ValueError("logit_scale must be a number, got nan")
    return float((scale > 0) - (scale < 0))


def _whole(
    name: str, features: Features, device: torch.device | str | None,
    dtype: torch.dtype | str | None,
) -> Tensor:  # fmt: skip
    """The features in one tensor, detached."""
    chunks = [features] if isinstance(features, Tensor) else list(features)
    if not chunks:
        return torch.zeros(0, 1, device=device)
    for chunk in chunks:
        check_tensor(name, chunk)
        check_floating(name, chunk)
        if chunk.dim() != 2 or chunk.shape[1] != chunks[0].shape[-1]:
            raise ValueError(f"{name} must be (N, D), or chunks of one D, got {tuple(chunk.shape)}")
    if dtype == "fp32":
        dtype = torch.float32
    elif dtype in (None, "model"):
        dtype = chunks[0].dtype
    elif not isinstance(dtype, torch.dtype):
        raise ValueError(f"retrieval_dtype must be 'fp32', 'model' or a dtype, got {dtype!r}")
    moved = [chunk.detach().to(device=device or chunk.device, dtype=dtype) for chunk in chunks]
    return moved[0] if len(moved) == 1 else torch.cat(moved)
