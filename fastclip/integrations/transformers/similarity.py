"""The losses of transformers' two-tower models, and the logits that go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """The loss of a class of models, from features of length 1.

    parameters: the model's parameters that it uses.
    loss: f(model, x, text, where, **options), with the losses of `where`: `fastclip.loss`, or
        `fastclip.distributed` with its options. x: (N, D), the features of the other tower.
    logits: f(model, x, text), the (N, N) logits of a row for each x, and of a row for each text.
    """

    parameters: tuple[str, ...]
    loss: Callable[..., Tensor]
    logits: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _both(logits_per_text: Tensor) -> tuple[Tensor, Tensor]:
    return logits_per_text.t(), logits_per_text


def _scale(model: Any, text: Tensor) -> Tensor:
    return model.logit_scale.exp().to(text.device)


def _clip_loss(model: Any, x: Tensor, text: Tensor, where: ModuleType, **options: Any) -> Tensor:
    return where.clip_loss(x, text, _scale(model, text), **options)


def _clip_logits(model: Any, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _both(text @ x.t() * _scale(model, text))


def _siglip_loss(model: Any, x: Tensor, text: Tensor, where: ModuleType, **options: Any) -> Tensor:
    bias = model.logit_bias.to(text.device)
    return where.siglip_loss(x, text, _scale(model, text), bias, **options)


def _siglip_logits(model: Any, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _both(text @ x.t() * _scale(model, text) + model.logit_bias.to(text.device))


def _align_loss(model: Any, x: Tensor, text: Tensor, where: ModuleType, **options: Any) -> Tensor:
    scale = model.temperature.reciprocal().to(text.device)
    return where.clip_loss(x, text, scale, label_smoothing=0.1, **options)


def _tips_loss(model: Any, x: Tensor, text: Tensor, where: ModuleType, **options: Any) -> Tensor:
    return where.clip_loss(x, text, model.temperature.reciprocal().to(text.device), **options)


def _divided_logits(model: Any, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _both(text @ x.t() / model.temperature.to(text.device))


def _clap_loss(model: Any, x: Tensor, text: Tensor, where: ModuleType, **options: Any) -> Tensor:
    """Texts pick their sound twice, once with each scale: transformers transposes the logits of the
    other direction before it takes their cross-entropy."""
    scales = model.logit_scale_t.exp(), model.logit_scale_a.exp()
    return sum(where.info_nce(text, x, scale, **options) for scale in scales) / 2


def _clap_logits(model: Any, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return x @ text.t() * model.logit_scale_a.exp(), text @ x.t() * model.logit_scale_t.exp()


CLIP = Similarity(("logit_scale",), _clip_loss, _clip_logits)
SIGLIP = Similarity(("logit_scale", "logit_bias"), _siglip_loss, _siglip_logits)
ALIGN = Similarity(("temperature",), _align_loss, _divided_logits)
TIPS = Similarity(("temperature",), _tips_loss, _divided_logits)
CLAP = Similarity(("logit_scale_t", "logit_scale_a"), _clap_loss, _clap_logits)
