"""A frozen text side whose features are sums of fixed token vectors.

DeViSE trains a picture tower towards frozen word vectors, and a thin model has none. Random vectors
take their place: captions that share words have similar features, and other captions are nearly
orthogonal, so that a picture tower can learn the words. No text is needed to make them.

DeViSE: A Deep Visual-Semantic Embedding Model, Frome et al., NeurIPS 2013.
"""

import torch
from torch import nn

from .model import CLIP
from .tokenizer import SPECIAL


@torch.no_grad()
def freeze_as_bag_of_tokens(model: CLIP) -> None:
    """Makes a new model's text features normalised sums of random token vectors, and freezes them.

    The text tower stays a Transformer, and files of the model are as ever. In its first layer a
    token attends alike to all tokens up to its own, and the other layers add nothing. Start, end
    and padding have a vector of zeros, so that captions without a common word are nearly
    orthogonal.
    """
    width = model.config.text_width
    tower = model.text_tower
    model.token_embedding.weight[-len(SPECIAL) :] = 0
    tower.positions.zero_()
    for block in tower.blocks:
        for linear in (block.qkv, block.out, block.down):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    first = tower.blocks[0]
    first.qkv.weight[2 * width :] = torch.eye(width)  # values; queries and keys stay zero
    first.out.weight.copy_(torch.eye(width))
    for part in (model.token_embedding, tower, model.text_projection):
        part.requires_grad_(False)
