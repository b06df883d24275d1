"""The part that both towers share: positions, pre-norm Transformer blocks, norms.

Letters as in `fastclip.clip.model`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class TransformerBlock(nn.Module):
    """One pre-norm Transformer layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `forward` takes x (B, T, W). It may also take `source` (B, S, W), which x attends to in place of
    itself (cross-attention), and `mask`, a bool tensor that broadcasts to (B, heads, T, S) and is
    True for the tokens that are attended to.
    """

    def __init__(
        self, width: int, heads: int, *, causal: bool, mlp: int | None = None,
        activation: str = "gelu", eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, activation
        mlp = mlp or 4 * width
        self.norm_1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, mlp)
        self.down = nn.Linear(mlp, width)

    @torch.no_grad()
    def initialise(self, layers: int) -> None:
        """Draws the first weights of one of a number of layers."""
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        # Residual branches start small, so that the variance does not grow with the depth.
        for linear in (self.out, self.down):
            linear.weight.mul_((2 * layers) ** -0.5)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:  # 3 times (B, heads, T, W/heads)
        return self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:  # (B, T, W) -> (B, T, W)
        q, k, v = self._heads(x)
        if source is not None:
            _, k, v = self._heads(source)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(ACTIVATION[self.activation](self.up(self.norm_2(x))))


class Tower(nn.Module):
    """Position embeddings, Transformer blocks, a final norm; perhaps a class token before the
    sequence, and a norm before the blocks.

    `final_norm=False` leaves the last norm to the pooling.
    """

    def __init__(
        self, width: int, layers: int, heads: int, length: int, *, causal: bool,
        mlp: int | None = None, activation: str = "gelu", eps: float = 1e-5,
        class_token: bool = False, norm_first: bool = False, final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.final_norm = final_norm
        self.class_token = nn.Parameter(torch.zeros(width)) if class_token else None
        self.positions = nn.Parameter(torch.empty(length, width))
        self.norm_first = nn.LayerNorm(width, eps) if norm_first else None
        block = {"causal": causal, "mlp": mlp, "activation": activation, "eps": eps}
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, **block) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width, eps)

    def embed(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, T, W), T + 1 with a class token
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions[: x.shape[1]]
        return x if self.norm_first is None else self.norm_first(x)

    def forward(self, embedded: Tensor) -> Tensor:  # (B, T, W) -> (B, T, W)
        x = self.blocks(embedded)
        return self.norm(x) if self.final_norm else x


class AttentionPool(nn.Module):
    """A learnt query that attends to all tokens, and an MLP on the result: SigLIP's MAP head.

    Scaling Vision Transformers, arXiv 2106.04560; Set Transformer, arXiv 1810.00825.
    """

    def __init__(self, width: int, heads: int, mlp: int, activation: str, eps: float) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.query = nn.Parameter(torch.empty(width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, mlp)
        self.down = nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, W)
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(self.query.expand(len(x), 1, -1), weight[:width], bias[:width])
        k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]
        return x + self.down(ACTIVATION[self.activation](self.up(self.norm(x))))
