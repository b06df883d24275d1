"""The global contrastive loss: moving averages of each sample's negatives, for small batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributed.described import described
from ..distributed.world import world_of_ranks
from ..engine.checks import (
    check_features,
    check_integers,
    check_number,
    check_tensor,
    check_vector,
    is_readable,
    scalar,
)
from ..formulas.reduction import Reduction
from ..formulas.world import World
from .base import one_process
from .loss_module import LossModule

AVERAGES = ("log_u_images", "log_u_texts")


class GlobalClipLoss(LossModule):
    """CLIP's loss with negatives of the whole dataset, estimated by moving averages (SogCLR: Yuan
    et al., arXiv 2202.12387; FastCLIP v1 and v3: Wei et al., arXiv 2407.01445).

    The inner function of sample i is the mean over the other samples j of the batch of
    `exp(scale * (t_ij - t_ii))`, g_i; its moving average over steps is u_i:

        g = (exp(scale * (t - t.diagonal()[:, None])) * off_diagonal).sum(1) / (N - 1)
        u[index] = (1 - gamma) * u[index] + gamma * g   # g, if the sample was not seen
                                                        # before or u is not finite

    and the same for texts, with columns. With tau = 1 / scale and the means over the batch, the
    loss is

        v1 (rho=None)
            value     mean(log(eps + u_images) + log(eps + u_texts)) / 2
            gradient  of mean(g_images / (eps + u_images) + g_texts / (eps + u_texts)) / 2
        v3
            value     tau * (the value of v1 + rho)
            gradient  of features: tau times that of v1
                      of tau: the value of v1 + rho + tau * that of v1

    with constant u in gradients. v1 keeps the temperature constant, so the scale has no gradient
    there; SogCLR's loss is tau times this. FastCLIP's own code counts the last term of the gradient
    of tau twice; this is the published estimator. With gamma = 1 and eps = 0, v1 is the decoupled
    loss, `info_nce(..., decoupled=True, symmetric=True) - log(N - 1)`.

    The averages are buffers, in the log domain so that no exponential overflows: `log_u_images` and
    `log_u_texts`, float32 (data_size), -inf for samples that were not seen. They are part of the
    state_dict, and training updates them at every call; evaluation neither reads nor writes them:
    it takes u = g. Keep the loss outside of a module in DDP, which would overwrite all ranks'
    buffers by those of rank 0.

    Args:
        data_size: the number of samples of the dataset, or of this rank's shard of it.
        gamma: the weight of a new estimate, in (0, 1].
        decay_epochs: with a number, `set_epoch` lowers the weight from 1 to gamma over that many
            epochs along a cosine, as FastCLIP does.
        rho: None for v1, or v3's lower bound of the tau * log term; FastCLIP takes 6.5 to 16.
        eps: 1e-14 in FastCLIP.
        shared: across ranks, True gathers the new averages, so that every rank holds all samples'.
            False: samples never change their rank, and indices count the rank's own samples.
        options: normalize, backend, memory_budget: as in `clip_loss`; across_ranks: True: the
            batch is spread over the ranks of `process_group`; ring, uneven: as in
            `fastclip.distributed.clip_loss`. Each rank updates the averages of its own samples.
    """

    log_u_images: Tensor
    log_u_texts: Tensor

    def __init__(
        self,
        data_size: int,
        gamma: float = 0.8,
        *,
        decay_epochs: int | None = None,
        rho: float | None = None,
        eps: float = 1e-14,
        shared: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(data_size, bool) or not isinstance(data_size, int) or data_size < 1:
            raise ValueError(f"data_size must be a number of samples >= 1, got {data_size!r}")
        check_number("gamma", gamma, 0.0)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        check_number("eps", eps, 0.0)
        if rho is not None:
            check_number("rho", rho)
        self.data_size = data_size
        self.gamma = self._least_gamma = gamma
        self.decay_epochs = decay_epochs
        self.rho = rho
        self.eps = eps
        self.shared = shared
        for name in AVERAGES:
            self.register_buffer(name, torch.full((data_size,), -math.inf))
        if decay_epochs is not None and (
            isinstance(decay_epochs, bool) or not isinstance(decay_epochs, int) or decay_epochs < 0
        ):
            raise ValueError(f"decay_epochs must be an int >= 0 or None, got {decay_epochs!r}")
        if decay_epochs is not None:
            self.set_epoch(0)

    def _apply(self, fn: Any, recurse: bool = True) -> GlobalClipLoss:
        """Moves the averages, but keeps them from half precision, where they would be 2 % off."""
        before = {name: getattr(self, name) for name in AVERAGES}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype.itemsize < 4:
                setattr(self, name, old.to(new.device))
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the weight of new estimates for an epoch, if `decay_epochs` is given."""
        if self.decay_epochs is None:
            return
        share = min(1.0, epoch / self.decay_epochs) if self.decay_epochs else 1.0
        above = (1 + math.cos(math.pi * share)) / 2
        self.gamma = self._least_gamma + (1 - self._least_gamma) * above

    def _world(self) -> World:
        if not self.across_ranks:
            return one_process(self.normalize, self.backend, self.memory_budget)
        loss = described(
            "GlobalClipLoss", gamma=self.gamma, rho=self.rho, eps=self.eps, shared=self.shared,
            training=self.training, data_size=self.data_size if self.shared else None,
            averages=str(self.log_u_images.dtype) if self.shared else None,
        )  # fmt: skip
        return world_of_ranks(
            loss, self.process_group, self.ring, self.uneven, self.normalize, self.backend,
            self.memory_budget,
        )  # fmt: skip

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        indices: Tensor,  # (N)
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`. indices: (N) int64, the samples' numbers in
        the dataset, each at most once in a batch."""
        world, inputs = self._world(), (image_features, text_features)

        def check() -> Tensor:
            check_features(*inputs, may_be_empty=self.uneven)
            self._check_indices(indices, image_features)
            return scalar("logit_scale", logit_scale, image_features)

        scale = world.guarded(check)
        indices = indices.long()
        c = world.contrast(*inputs, scale if self.rho is not None else scale.detach())
        pairs = torch.full_like(c.positives.new_zeros(1), indices.shape[0] * world.ranks)
        if not world.even:
            pairs = world.total(pairs / world.ranks)
        losses: list[Tensor] = []
        for lines, buffer in ((c.rows, self.log_u_images), (c.columns, self.log_u_texts)):
            log_g = lines - c.positives - (pairs - 1).clamp_min(1).log()
            with torch.no_grad():
                log_u = self._averaged(log_g, buffer, indices, world)
                log_u = torch.logaddexp(log_u, torch.full_like(log_u, self.eps).log())
            # Without negatives g is 0.
            nothing = log_g == -math.inf
            estimate = (log_g - log_u.masked_fill(nothing, 0)).exp()
            losses.append(self._with_gradient(log_u, estimate, scale))
        loss = Reduction().of((losses[0] + losses[1]) / 2, world, inputs)
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_indices(self, indices: Tensor, features: Tensor) -> None:
        check_tensor("indices", indices)
        check_integers("indices", indices)
        check_vector("indices", indices, "a sample's number for each pair", features)
        # Values are checked on CPUs only: reading them elsewhere would wait for the device.
        if not is_readable(indices) or indices.numel() == 0:
            return
        least, most = indices.aminmax()
        if least < 0 or most >= self.data_size:
            raise ValueError(
                f"indices must be samples, 0 <= index < {self.data_size}, got {int(least)} to "
                f"{int(most)}"
            )

    def _averaged(self, log_g: Tensor, buffer: Tensor, indices: Tensor, world: World) -> Tensor:
        """Updates the averages of the batch's samples; returns their logarithms."""
        if not self.training:
            return log_g
        before = buffer[indices].to(log_g.dtype)
        log_u = log_g
        if self.gamma < 1:
            old, new = before + math.log1p(-self.gamma), log_g + math.log(self.gamma)
            log_u = torch.where(before.isfinite(), torch.logaddexp(old, new), log_g)
        places, values = indices, log_u.to(buffer.dtype)
        if self.shared:
            places, values = world.gather_rows(places), world.gather_rows(values)
        buffer[places] = values
        return log_u

    def _with_gradient(self, value: Tensor, estimate: Tensor, scale: Tensor) -> Tensor:
        """The losses of lines: their values, with the gradient of the estimates."""
        of_features = estimate - estimate.detach()
        if self.rho is None:
            return value + of_features
        tau = 1 / scale.reshape(()).to(value.dtype)
        return tau * (value + self.rho) + tau.detach() * of_features
