"""SupCon: features with equal labels are positives of each other."""

from __future__ import annotations

from torch import Tensor

from ..engine.checks import check_integers, check_sides, check_tensor, check_vector
from .info_nce import InfoNCE, info_nce
from .reduction import Reduction
from .world import World


def supcon(
    world: World, features: Tensor, labels: Tensor, logit_scale: Tensor | float, decoupled: bool,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of features (N, D): InfoNCE of one set against itself, with positives by label."""

    def check() -> None:
        check_sides(features, features, may_be_empty=True, names=("features", "features"))
        check_tensor("labels", labels)
        check_integers("labels", labels)
        check_vector("labels", labels, "a label for each row of the features", features)

    world.guarded(check)
    options = InfoNCE(ids=labels, same_id="positive", decoupled=decoupled)
    return info_nce(world, features, None, logit_scale, options, reduction)
