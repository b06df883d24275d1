"""Fuses single models of transformers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ..host import disabled
from .families import FAMILIES
from .family import Family
from .forms import other_form
from .forward import HOST, Options, fused_forward, own_forward


def fuse(
    model: Any, *, keep_logits: bool = False, across_ranks: bool = True, uneven: bool = True
) -> Any:
    """Computes a model's contrastive loss with fastclip from here on. Equivalent to transformers':

        logits_per_text = text_embeds @ image_embeds.t() * self.logit_scale.exp()
        loss = image_text_contrastive_loss(logits_per_text)    # or the loss of its class

    A call with `return_loss=True` returns the same outputs and gradients, without any N x N tensor.
    Other calls run the model's own code. The model stays one of its class, and copies of it stay
    fused, pickled ones too. A model that `from_pretrained` loads must be fused anew.

    Args:
        model: of a class in docs/transformers.md, or of a subclass that does not replace `forward`.
            Fuse it before it is wrapped or compiled.
        keep_logits: True returns logits_per_image and logits_per_text with the loss, two views of
            one N x N matrix (of CLAP two matrices). False returns None in their place; tuples leave
            them out.
        across_ranks: True takes the loss of all ranks' pairs in training, in train mode with
            gradients, if there are several ranks: after DDP's mean, the gradients are those of one
            process on the whole batch. Evaluation stays local. False takes the loss of this rank's
            pairs, as transformers does; needed where ranks hold the same pairs, as in tensor
            parallelism.
        uneven: True lets ranks have different numbers of pairs. False is faster, and
            `torch.compile` then makes one graph.

    Returns:
        The model itself. With FASTCLIP_DISABLE=1 it is unchanged.

    Raises:
        ImportError: transformers is not installed, or of a version that is not known.
        TypeError: a model of another class, or of one with a forward of its own.
        ValueError: a model whose forward has been replaced, as Accelerate does.
        NotImplementedError: this version's forward of the class has an unknown form.
    """
    if disabled():
        return model
    version = HOST.load().__version__
    family, known = _family_of(model)
    base = vars(type(model)).get("_fastclip_base", type(model))
    if own_forward(base) is not own_forward(known):
        raise TypeError(
            f"fuse needs the forward of {family.name}, got {base.__name__} with one of its own: "
            f"patch() fuses the {family.name}.forward that it calls"
        )
    _check_forward(model, "fuse")
    reason = other_form(known, family)
    if reason is not None:
        raise NotImplementedError(
            f"fuse does not know this form of {family.name}.forward, transformers {version}: "
            f"{reason}"
        )
    model.__class__ = _fused_class(base, family, Options(keep_logits, across_ranks, uneven))
    return model


def unfuse(model: Any) -> Any:
    """Gives a model that `fuse` fused its own loss again, and returns it. Others stay as they are.

    Raises:
        ValueError: the model's class or its forward has been replaced since, as FSDP and Accelerate
            do.
    """
    found = vars(type(model)).get("_fastclip_base")
    if found is not None:
        _check_forward(model, "unfuse")
        model.__class__ = found
    elif hasattr(type(model), "_fastclip_base"):
        raise ValueError(
            "unfuse needs the class that fuse gave the model, got "
            f"{type(model).__name__}: unfuse the model before it is wrapped"
        )
    return model


def _check_forward(model: Any, caller: str) -> None:
    if "forward" in vars(model):
        raise ValueError(
            f"{caller} needs a model with its class's forward, got one whose forward has been "
            f"replaced: {caller} it before Accelerate prepares it"
        )


def _family_of(model: Any) -> tuple[Family, type]:
    """Returns the family of a model, and the class that the family names."""
    for base in type(model).__mro__:
        for family in FAMILIES:
            if base.__name__ == family.name and base is family.find():
                return family, base
    raise TypeError(
        f"fuse needs a model of {', '.join(family.name for family in FAMILIES)}, got "
        f"{type(model).__name__}: fuse the model before it is wrapped or compiled"
    )


@functools.lru_cache
def _fused_class(base: type, family: Family, options: Options) -> type:
    """Returns a subclass of the same name: transformers writes that name into a config."""

    def reduced(model: Any, protocol: int) -> Any:
        """Copies and pickles name the class that pickle can find."""
        parts = super(made, model).__reduce_ex__(protocol)
        return (_empty, (base, options), *parts[2:]) if type(model) is made else parts

    made = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduced,
            "forward": fused_forward(own_forward(base), family, options),
            "_fastclip_base": base,
        },
    )
    return made


def _empty(base: type, options: Options) -> Any:
    """Returns a fused model without content, for pickle and copy."""
    return fuse(base.__new__(base), **dataclasses.asdict(options))
