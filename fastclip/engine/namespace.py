"""The name of this package, and the namespace of its operators in `torch.ops`, which is the same.

A copy of the package under another name, such as a kernel of the Hugging Face Hub, registers its
own operators, beside those of an installed fastclip. The compiled module registers operators of
`torch.ops.fastclip` only, so a copy has none.
"""

from __future__ import annotations

import re

import torch

PACKAGE = __package__.rpartition(".")[0]
NAMESPACE = re.sub(r"\W|^(?=\d)", "_", PACKAGE)
OPS = getattr(torch.ops, NAMESPACE)
