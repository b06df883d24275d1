"""Zero-shot classification: a class is represented by text features of sentences that name it.

The features of a class's names in all templates are averaged (prompt ensembling). A picture belongs
to the class of the highest cosine. No parameter is learnt.

Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020,
section 3.1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import CLIP

TEMPLATES = ("{}", "a {}", "{} emoji", "a picture of {}")


@torch.no_grad()
def class_features(
    model: CLIP,
    encode: Callable[[Sequence[str]], Tensor],
    classes: Mapping[str, Iterable[str]],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:  # (len(classes), D)
    """Returns a unit vector per class: the normalised mean of its prompts' normalised features.

    Args:
        encode: converts captions to token ids on the model's device.
        classes: the names of each class, which replace `{}` in the templates.

    Raises:
        ValueError: a class has no names, or there are no templates.
    """
    rows = []
    for label, names in classes.items():
        prompts = [template.format(name) for name in names for template in templates]
        if not prompts:
            raise ValueError(f"every class needs a name and a template, {label!r} has no prompt")
        rows.append(model.encode_text(encode(prompts)).mean(dim=0))
    return F.normalize(torch.stack(rows), dim=-1)


@torch.no_grad()
def classify(model: CLIP, images: Tensor, classes: Tensor) -> Tensor:
    """Returns the nearest class (B,) of each picture; images (B, 3, H, W), classes (C, D)."""
    return (model.encode_image(images) @ classes.T).argmax(dim=1)
