"""The two-tower models of transformers with fastclip's loss.

    from fastclip.integrations.transformers import fuse
    model = fuse(CLIPModel.from_pretrained(name))
    loss = model(**batch, return_loss=True).loss    # no N x N matrix

`patch()` fuses every model of the process instead, those that exist already included. docs/
transformers.md lists the classes.
"""

from .instance import fuse, unfuse
from .patching import HOST, patch, unpatch

__all__ = ["HOST", "fuse", "patch", "unfuse", "unpatch"]
