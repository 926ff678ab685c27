"""QK-Clip: after a step, scale down the query and key projections of heads whose attention logits grew too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .layout import overlapping, overlaps_itself
from .options import check_workspace, on_host
from .tensors import DTYPES, check_dense

__all__ = ["max_logits", "qk_clip_"]

Weights = Tensor | Sequence[Tensor]


@torch.no_grad()
def qk_clip_(
    q: Weights,
    k: Weights,
    max_logits: Tensor,
    tau: float = 100.0,
    *,
    alpha: float = 0.5,
    kv_heads: int | None = None,
    q_rope: Weights = (),
) -> Tensor:
    r"""Scale, in place, the rows that make each head's queries and keys, so that no logit would have passed `tau`.

    With S the largest logit q·k/√d of a head in the last forward pass, and γ = min(1, tau / S):

        rows of q ← γ^alpha · rows of q        rows of k ← γ^(1 - alpha) · rows of k

    Logits are products of the two, so the head's shrink by γ; where γ is 1 not a bit changes. Muon with this is
    MuonClip, but any optimizer will do:

        class Attention(nn.Module):
            def forward(self, x):
                ...  # q and k as scaled_dot_product_attention gets them
                self.max_logits = muon_kernels.max_logits(q, k, causal=True)

        loss.backward()
        optimizer.step()
        for attention in attentions:
            muon_kernels.qk_clip_(attention.q.weight, attention.k.weight, attention.max_logits)

    Before it, take the maximum over what else the step saw: `torch.maximum` over accumulated micro-batches, an
    all-reduce (MAX) over data-parallel ranks. Where queries and keys are normalised there is nothing to clip.

    - Fused projections: give slices, as `qkv.weight[:d]` and `qkv.weight[d : 2 * d]`.
    - A bias, and an fp32 master of the weight, belong to the rows as well: give `[q.weight, q.bias, q_master]`. Without
      a master, a bf16 weight is rounded to nearest, which loses a factor within 0.2 % of 1.
    - Grouped-query attention: `kv_heads`. Consecutive query heads share a key head, which is scaled by the γ of its
      largest logit; their query rows have γ of their own.
    - Multi-head latent attention: q and k are the parts without rotary embedding and `q_rope` the one with, views such
      as `q_up.weight.view(heads, nope + rope, -1)[:, :nope]`. The rotary key, which all heads share, is left alone, so
      the rows of q_rope are scaled by γ.

    Args:
        q: a weight or several that are scaled alike, of any floating dtype and strides, written. The first dimension
            is divided evenly among the heads, in order: (heads · head_dim, ...) as in nn.Linear, or
            (heads, head_dim, ...).
        k: the same for the key heads, written.
        max_logits: (heads,), of any floating dtype, on the weights' device; -inf for a head without logits.
        tau: > 0.
        alpha: in [0, 1], the queries' share.
        kv_heads: number of key heads, a divisor of heads; None: as many.
        q_rope: as q, or nothing; written.

    Returns:
        γ, (heads,), float32, or float64 if `max_logits` is.

    Raises:
        ValueError, TypeError: an argument that cannot be used; nothing has been written then. On the CPU a maximum of
            NaN or +inf is one. On a device it would have to be waited for: there a head with such a maximum counts as
            one below `tau`, and its γ is returned as NaN.

    Source: Kimi K2, https://arxiv.org/abs/2507.20534; alpha is Megatron-LM's.
    """
    if not isinstance(max_logits, Tensor):
        raise TypeError(
            "max_logits should be a tensor with the largest logit of every head, as muon_kernels.max_logits(q, k) "
            f"makes it, but is: {type(max_logits).__name__}"
        )
    check_dense("max_logits", max_logits)
    heads = max_logits.numel()
    if max_logits.ndim != 1 or not heads:
        raise ValueError(f"max_logits should have size (heads,) but has: {tuple(max_logits.shape)}")
    kv_heads = heads if kv_heads is None else kv_heads
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads should divide the {heads} heads that max_logits has but is: {kv_heads!r}")
    _check_positive("tau", tau)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha should be a number in [0, 1] but is: {alpha!r}")
    weights = {"q": _several("q", q), "k": _several("k", k), "q_rope": _several("q_rope", q_rope)}
    _check_weights(weights, {"q": heads, "k": kv_heads, "q_rope": heads}, max_logits.device)

    largest = max_logits.detach().to(torch.promote_types(max_logits.dtype, torch.float32))
    bad = largest.isnan() | (largest == math.inf)
    if on_host(bad) and bad.any():
        wrong = {head: largest[head].item() for head in bad.nonzero().flatten().tolist()}
        raise ValueError(f"max_logits should be numbers but of these heads are: {wrong}; has the training diverged?")
    gamma = tau / largest.clamp(min=tau)  # 1 for negative maxima, too
    applied = gamma.where(~bad, 1.0)
    shared = applied.view(kv_heads, -1).amin(1)
    for name, scale in (("q", applied**alpha), ("k", shared ** (1 - alpha)), ("q_rope", applied)):
        for weight in weights[name]:
            count = scale.numel()
            rows = weight.detach().view(count, weight.shape[0] // count, *weight.shape[1:])
            rows.mul_(scale.view(count, *[1] * weight.ndim))  # computed in fp32 or better, rounded once
    return gamma.where(~bad, math.nan)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} should be a number but is: {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be > 0 and finite but is: {value}")


def _several(name: str, weights: Weights) -> list[Tensor]:
    if not isinstance(weights, (Tensor, Sequence)):
        raise TypeError(f"{name} should be a tensor or a list of tensors but is: {type(weights).__name__}")
    return [weights] if isinstance(weights, Tensor) else list(weights)


def _check_weights(weights: dict[str, list[Tensor]], heads: dict[str, int], device: torch.device) -> None:
    for name, tensors in weights.items():
        if not tensors and name != "q_rope":
            raise ValueError(f"{name} should be a weight, or several, but is empty")
        for t in tensors:
            check_dense(name, t)
            if t.ndim == 0 or t.shape[0] % heads[name]:
                raise ValueError(
                    f"{name} should have a first dimension that {heads[name]} heads share evenly but has size: "
                    f"{tuple(t.shape)}"
                )
            if t.device != device:
                raise ValueError(f"{name} should be on the device of max_logits, {device}, but is on: {t.device}")
            if overlaps_itself(t.shape, t.stride()):
                raise ValueError(f"{name} should have memory for every element but its strides are: {t.stride()}")
    every = [t for tensors in weights.values() for t in tensors]
    places = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in every)
    if places in _DISJOINT:
        return
    if (shared := overlapping(every)) is not None:
        name = next(name for name, tensors in weights.items() if any(t is shared for t in tensors))
        raise ValueError(
            f"{name} of size {tuple(shared.shape)} should have memory of its own but shares elements with another "
            "weight, which would be scaled twice; of a fused projection give the slices, qkv.weight[:d] and "
            "qkv.weight[d : 2 * d]"
        )
    if len(_DISJOINT) == 4096:
        _DISJOINT.clear()
    _DISJOINT.add(places)


# Places of weights that are known to share no element: for slices that interleave it takes a while to find out.
_DISJOINT: set[tuple[object, ...]] = set()


@torch.no_grad()
def max_logits(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    max_workspace_bytes: int = 64 << 20,
) -> Tensor:
    """Return the largest attention logit scale · q·k of every head over batch and positions, as `qk_clip_` takes it.

    This multiplies once more what attention multiplies, in fp32. On a long sequence call it in some steps only, or for
    a part of the batch.

    Args:
        q: (..., heads, length, head_dim), of any floating dtype; only read.
        k: (..., kv_heads, keys, head_dim), of q's dtype and device; only read. Consecutive query heads share a key
            head, as in scaled_dot_product_attention with enable_gqa=True.
        causal: whether query i sees keys 0..i alone, as with is_causal=True.
        scale: > 0; None for 1/√head_dim.
        max_workspace_bytes: cap on the memory of logits at a time, which are those of some queries of all heads and of
            the whole batch; at least one query's.

    Returns:
        (heads,), float32, or float64 if q is. -inf where there are no logits, NaN where one is. It is detached, and
            nothing waits for the host.

    Raises:
        ValueError, TypeError: sizes, dtypes or options that do not fit.
    """
    for name, t in (("q", q), ("k", k)):
        # Not `check_dense`, which looks for memory: torch.compile traces this.
        if not isinstance(t, Tensor) or t.dtype not in DTYPES:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} should be a tensor of a floating-point dtype but is: {kind}")
        if t.ndim < 3:
            raise ValueError(f"{name} should have size (..., heads, length, head_dim) but has: {tuple(t.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"k should be {q.dtype} on {q.device}, as q is, but is {k.dtype} on {k.device}")
    *batch, heads, length, dim = q.shape
    *k_batch, kv_heads, keys, k_dim = k.shape
    if batch != k_batch or dim != k_dim or (heads % kv_heads if kv_heads else heads):
        raise ValueError(
            "q and k should have sizes (..., heads, length, head_dim) and (..., kv_heads, keys, head_dim), kv_heads a "
            f"divisor of heads, but have: {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if scale is not None:
        _check_positive("scale", scale)
    check_workspace(max_workspace_bytes)

    dtype = torch.promote_types(q.dtype, torch.float32)
    best = torch.full((heads,), -math.inf, dtype=dtype, device=q.device)
    count = math.prod(batch)
    if not count * heads * keys:
        return best
    q = q.detach().reshape(count, kv_heads, heads // kv_heads, length, dim)
    k = k.detach().reshape(count, kv_heads, keys, dim).to(dtype)
    chunk = max(max_workspace_bytes // (count * heads * keys * dtype.itemsize), 1)
    # Autocast is disabled because it would make the products bf16.
    type_ = q.device.type
    with torch.autocast(type_, enabled=False) if torch.amp.is_autocast_available(type_) else nullcontext():
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            seen = min(end, keys) if causal else keys
            rows = q[..., begin:end, :].to(dtype).flatten(2, 3)
            logits = (rows @ k[..., :seen, :].mT).view(count, kv_heads, heads // kv_heads, end - begin, seen)
            if causal:
                later = torch.ones(end - begin, seen, dtype=torch.bool, device=q.device).triu(begin + 1)
                logits.masked_fill_(later, -math.inf)
            best = torch.maximum(best, logits.amax((0, 3, 4)).flatten())
    return best * (1 / math.sqrt(max(dim, 1)) if scale is None else scale)
