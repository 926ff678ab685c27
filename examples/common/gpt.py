"""GPT-2 with the names of nanoGPT, which most people know: `transformer.h.0.attn.c_attn.weight` and so on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. The defaults are GPT-2's with 124 million parameters, but for the biases."""

    vocab_size: int = 50304  # GPT-2's 50257 tokens, and some that do not occur: a multiple of 64 is faster on GPUs
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # GPT-2 has biases; today's models leave them out


GPT2_124M = GPTConfig()
TINY = GPTConfig(vocab_size=256, block_size=128, n_layer=4, n_head=4, n_embd=128)  # a token is a byte


class CausalSelfAttention(nn.Module):
    """Attention of every token to those before it. Queries, keys and values come from one fused projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, n_embd) to the same size."""
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values, (batch, heads, length, head_dim) as the arguments are."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MLP(nn.Module):
    """Two matrices with GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, n_embd) to the same size."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A layer: attention, then an MLP, each behind a norm and added to what came in."""

    def __init__(self, config: GPTConfig, attention: Callable[..., nn.Module], mlp: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, n_embd) to the same size."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A language model whose output head is its token embedding, as GPT-2's is.

    Args:
        config: the sizes.
        attention, mlp: make the two parts of a layer from the config; other examples put their own here.
    """

    def __init__(
        self,
        config: GPTConfig,
        attention: Callable[[GPTConfig], nn.Module] = CausalSelfAttention,
        mlp: Callable[[GPTConfig], nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, attention, mlp) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        for name, p in self.named_parameters():
            if p.ndim > 1:
                # What is added to the residual stream starts smaller, since 2 * n_layer such terms are summed.
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each, (batch, length, vocab_size), of tokens (batch, length)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats a token, of all tokens but the first of windows (batch, length + 1)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
