"""The classes. This module imports lightly; its package imports this module when it is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import DCLLoss as TheirDCL
from lightly.loss import NTXentLoss as TheirNTXent
from torch import Tensor, nn

from ... import distributed
from ...contrast import contrast
from ...loss.nt_xent import nt_xent_loss
from ..host import disabled
from ..plain import is_plain
from .host import HOST

PLAIN = nn.CrossEntropyLoss()


class NTXentLoss(TheirNTXent):
    """lightly's class without its matrices: two views in memory O(N D) in place of O(N^2), or a
    bank of K negatives in O((N + K) D) in place of O(N K).

    Same arguments, value and gradients; the loss is float32 for narrower views. The host's own code
    computes the loss with FASTCLIP_DISABLE=1, and, with one warning, if its `cross_entropy` is
    replaced.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views (N, D) of N images. Updates the bank, if there is one."""
        replaced = not is_plain(self.cross_entropy, PLAIN)
        if replaced:
            HOST.falls_back("the cross-entropy of an NTXentLoss is not its own")
        if replaced or disabled():
            return super().forward(out0, out1)
        scale = 1 / self.temperature
        x, y = (F.normalize(view, dim=1) for view in (out0, out1))
        y, bank = self.memory_bank.forward(y, update=x.requires_grad)
        if bank is None:
            of = distributed.nt_xent_loss if self.gather_distributed else nt_xent_loss
            return of(x, y, scale, memory_budget=0)
        rows = contrast(
            x, bank.T.to(x.device), scale, offset=None, columns=False, memory_budget=0
        ).rows  # fmt: skip
        positives = scale * (x * y).sum(1, dtype=rows.dtype)
        loss = F.softplus(rows - positives, threshold=60).mean()
        return loss.to(torch.promote_types(out0.dtype, torch.float32))


class DCLLoss(TheirDCL):
    """lightly's class, `weight_fn` included, without its matrices: memory O(N D) in place of
    O(N^2). Same arguments, value and gradients; the loss is float32 for narrower views. The
    host's own code computes the loss with FASTCLIP_DISABLE=1, and, with one warning, if a subclass
    has its own `_loss`."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views (N, D) of N images."""
        own_loss = type(self)._loss is not TheirDCL._loss
        if own_loss:
            HOST.falls_back("a subclass computes the loss of views")
        if own_loss or disabled():
            return super().forward(out0, out1)
        block = distributed.contrast if self.gather_distributed else contrast
        how = {"logit_scale": 1 / self.temperature, "memory_budget": 0}
        x, y = (F.normalize(view, dim=1) for view in (out0, out1))
        c = block(x, y, **how)
        own = c.positives
        if self.weight_fn is not None:
            own = own * (self.weight_fn(x, y) + self.weight_fn(y, x)) / 2
        lines = [
            torch.logaddexp(others, block(view, None, **how).rows)
            for view, others in ((x, c.rows), (y, c.columns))
        ]
        loss = ((lines[0] + lines[1]) / 2 - own).mean()
        return loss.to(torch.promote_types(out0.dtype, torch.float32))
