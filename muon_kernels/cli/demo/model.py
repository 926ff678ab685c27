"""Model of the demo: a byte-level GPT."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


class MLP(nn.Module):
    """Part of a layer after attention: two matrices with GELU between them."""

    def __init__(self, width: int) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """A pre-norm transformer layer: causal attention with fused QKV, then an MLP."""

    def __init__(self, width: int, heads: int, mlp: Callable[[int], nn.Module] = MLP) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (3, batch, heads, length, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        mlp: Tensor = self.mlp(self.mlp_norm(x))
        return x + mlp


class GPT(nn.Module):
    """A byte-level language model.

    Args:
        width: width of the residual stream.
        layers: number of layers.
        heads: number of heads in each, which divides `width`.
        context: largest number of bytes that it reads at once.
        mlp: makes the part of a layer after attention, from `width`.
    """

    def __init__(
        self, width: int, layers: int, heads: int, context: int, mlp: Callable[[int], nn.Module] = MLP
    ) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.byte_embedding = nn.Embedding(BYTES, width)
        self.position_embedding = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Block(width, heads, mlp) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of every byte of `text` but the first.

        Args:
            text: bytes as integers, (batch, at most context + 1).
        """
        context, target = text[:, :-1], text[:, 1:]
        x = self.byte_embedding(context) + self.position_embedding.weight[: context.shape[1]]
        logits = self.head(self.norm(self.layers(x)))
        # In bf16 a loss near 2 would be rounded to 0.01.
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
