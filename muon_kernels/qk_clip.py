"""QK-Clip: after a step, scale down the query and key projections of heads whose attention logits grew too large."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed.placement import dim_of, ranges_at
from .layout import overlapping, overlaps_itself
from .options import check_workspace, on_host
from .tensors import DTYPES, check_dense, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["max_logits", "qk_clip_"]

Weights = Tensor | Sequence[Tensor | tuple[Tensor, slice | Tensor]]


class _Weight(NamedTuple):
    """A weight, and those of its rows that heads share, in the order of heads; None for all."""

    tensor: Tensor
    rows: slice | Tensor | None

    @property
    def height(self) -> int:
        """Number of these rows."""
        n = self.tensor.shape[0]
        if self.rows is None:
            return n
        return len(range(*self.rows.indices(n))) if isinstance(self.rows, slice) else self.rows.numel()


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
    group: dist.ProcessGroup | None = None,
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

    Before it, take the maximum over what else the step saw: `torch.maximum` over accumulated micro-batches. Over
    data-parallel ranks `group` takes it. Where queries and keys are normalised there is nothing to clip.

    - Fused projections: give slices, as `qkv.weight[:d]` and `qkv.weight[d : 2 * d]`, or pairs of the weight and its
      rows, as `[(qkv.weight, slice(0, d))]` and `[(qkv.weight, slice(d, 2 * d))]`.
    - A bias, and an fp32 master of the weight, belong to the rows as well: give `[q.weight, q.bias, q_master]`. Without
      a master, a bf16 weight is rounded to nearest, which loses a factor within 0.2 % of 1.
    - Grouped-query attention: `kv_heads`. Consecutive query heads share a key head, which is scaled by the γ of its
      largest logit; their query rows have γ of their own.
    - Multi-head latent attention: q and k are the parts without rotary embedding and `q_rope` the one with, views such
      as `q_up.weight.view(heads, nope + rope, -1)[:, :nope]`. The rotary key, which all heads share, is left alone, so
      the rows of q_rope are scaled by γ.
    - Several ranks: DTensors, sharded in any way, get the same bits as whole tensors. A rank scales the rows that it
      holds, and sends none. A slice along the dimension that is sharded is a copy in torch, and raises: give pairs.

    Args:
        q: a weight or several that are scaled alike, of any floating dtype and strides, written. The first dimension
            is divided evenly among the heads, in order: (heads · head_dim, ...) as in nn.Linear, or
            (heads, head_dim, ...). In a list, a pair (weight, rows) has a slice or an int tensor (rows,) on the CPU,
            in the order of heads; the weight's other rows are left alone.
        k: the same for the key heads, written.
        max_logits: (heads,), of any floating dtype, on the weights' device; -inf for a head without logits. It has all
            heads of the weights. A tensor-parallel rank, which knows its own heads only, gives a DTensor, as
            `muon_kernels.max_logits` does, or `DTensor.from_local(own, mesh, [Shard(0)])`. All ranks of its mesh then
            exchange these few numbers; Partial("max") takes the maximum.
        tau: > 0.
        alpha: in [0, 1], the queries' share.
        kv_heads: number of key heads, a divisor of heads; None: as many.
        q_rope: as q, or nothing; written.
        group: process group of the ranks that saw other parts of the batch. The maximum over them is taken by an
            all-reduce of (heads,) numbers, so all of them have to call this. None: `max_logits` is of the whole batch.

    Returns:
        γ, (heads,), float32, or float64 if `max_logits` is.

    Raises:
        ValueError, TypeError: an argument that cannot be used; nothing has been written then. On the CPU a maximum of
            NaN or +inf is one, on whichever rank; between ranks NaN goes as +inf. On a device it would have to be
            waited for: there a head with such a maximum counts as one below `tau`, and its γ is returned as NaN.

    Source: Kimi K2, https://arxiv.org/abs/2507.20534; alpha is Megatron-LM's.
    """
    heads = _heads(max_logits)
    kv_heads = heads if kv_heads is None else kv_heads
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads should divide the {heads} heads that max_logits has but is: {kv_heads!r}")
    _check_positive("tau", tau)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha should be a number in [0, 1] but is: {alpha!r}")
    weights = {"q": _several("q", q), "k": _several("k", k), "q_rope": _several("q_rope", q_rope)}
    for name, count in (("q", heads), ("k", kv_heads), ("q_rope", heads)):
        if not weights[name] and name != "q_rope":
            raise ValueError(f"{name} should be a weight, or several, but is empty")
        for weight in weights[name]:
            _check_weight(name, weight, count, local(max_logits).device)
    _check_disjoint(weights)

    largest = _of_all_ranks(max_logits, group)
    bad = largest.isnan() | (largest == math.inf)
    if on_host(bad) and bad.any():
        wrong = {head: largest[head].item() for head in bad.nonzero().flatten().tolist()}
        raise ValueError(f"max_logits should be numbers but of these heads are: {wrong}; has the training diverged?")
    gamma = tau / largest.clamp(min=tau)  # 1 for negative maxima, too
    applied = gamma.where(~bad, 1.0)
    shared = applied.view(kv_heads, -1).amin(1)
    for name, scale in (("q", applied**alpha), ("k", shared ** (1 - alpha)), ("q_rope", applied)):
        for weight in weights[name]:
            _scale(weight, scale)
    return gamma.where(~bad, math.nan)


def _heads(max_logits: Tensor) -> int:
    """Return the number of heads; raise unless there is a maximum for each."""
    if not isinstance(max_logits, Tensor):
        raise TypeError(
            "max_logits should be a tensor with the largest logit of every head, as muon_kernels.max_logits(q, k) "
            f"makes it, but is: {type(max_logits).__name__}"
        )
    check_dense("max_logits", local(max_logits))
    if max_logits.ndim != 1 or not max_logits.numel():
        raise ValueError(f"max_logits should have size (heads,) but has: {tuple(max_logits.shape)}")
    if is_dtensor(max_logits) and any(getattr(at, "reduce_op", "max") != "max" for at in max_logits.placements):
        raise ValueError(
            f"max_logits should be replicated, sharded, or Partial('max') but has placements: {max_logits.placements}"
        )
    return max_logits.numel()


def _of_all_ranks(max_logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the maxima of all heads over all ranks, in fp32 or better."""
    largest = local(max_logits.detach()).to(torch.promote_types(max_logits.dtype, torch.float32))
    if group is None and not is_dtensor(max_logits):
        return largest
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group should be a torch.distributed.ProcessGroup that this rank is in but is: {group!r}")
    largest = largest.where(~largest.isnan(), math.inf)  # the maximum of a backend may lose a NaN
    try:
        if is_dtensor(max_logits):
            largest = _like(max_logits, largest).full_tensor()
        if group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    except Exception as error:
        raise RuntimeError(
            f"qk_clip_ should be called on every rank that shares max_logits, but a collective failed: {error}"
        ) from error
    return largest


def _like(t: DTensor, part: Tensor) -> DTensor:
    """Return a DTensor placed as `t`, which is of one dimension, of this rank's part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=(1,))


def _scale(weight: _Weight, scale: Tensor) -> None:
    """Multiply each head's rows by its scale, (heads,), those that this rank holds."""
    t, count = weight.tensor, scale.numel()
    if weight.rows is None and not is_dtensor(t):
        rows = t.detach().view(count, t.shape[0] // count, *t.shape[1:])
        rows.mul_(scale.view(count, *[1] * t.ndim))  # computed in fp32 or better, rounded once
        return
    start, stop = _rows_here(t)
    if weight.rows is None:
        factors = scale.repeat_interleave(t.shape[0] // count)[start:stop]
    else:
        head = torch.full((t.shape[0],), count, device="cpu")  # of no head
        head[weight.rows] = torch.arange(count, device="cpu").repeat_interleave(weight.height // count)
        factors = torch.cat([scale, scale.new_ones(1)])[head[start:stop].to(scale.device, non_blocking=True)]
    local(t.detach()).mul_(factors.view(-1, *[1] * (t.ndim - 1)))
    if is_dtensor(t) and not t.is_inference():  # whose shard has a version of its own
        torch.autograd.graph.increment_version(t)


def _rows_here(t: Tensor) -> tuple[int, int]:
    """Return the first of the rows that this rank holds, and the one after the last."""
    if not is_dtensor(t):
        return 0, t.shape[0]
    at = t.device_mesh.get_coordinate()
    assert at is not None
    sharded = [i for i, placement in enumerate(t.placements) if not placement.is_replicate()]
    return ranges_at(t.shape, t.device_mesh.shape, t.placements, sharded, [at[i] for i in sharded])[0]


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} should be a number but is: {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be > 0 and finite but is: {value}")


def _several(name: str, weights: Weights) -> list[_Weight]:
    if not isinstance(weights, (Tensor, Sequence)):
        raise TypeError(f"{name} should be a tensor or a list of tensors but is: {type(weights).__name__}")
    given = [weights] if isinstance(weights, Tensor) else weights
    pairs = [each if isinstance(each, tuple) and len(each) == 2 else (each, None) for each in given]
    return [_Weight(*pair) for pair in pairs]


def _check_weight(name: str, weight: _Weight, heads: int, device: torch.device) -> None:
    t, rows = weight
    check_dense(name, local(t))
    if is_dtensor(t):
        _check_placed(name, t)
    if t.ndim and rows is not None:
        _check_rows(name, t, rows)
    if t.ndim == 0 or weight.height % heads:
        raise ValueError(
            f"{name} should have a first dimension that {heads} heads share evenly but has size: {tuple(t.shape)}"
            + (f", of which {weight.height} rows were given" if rows is not None else "")
        )
    here = local(t)
    if here.device != device:
        raise ValueError(f"{name} should be on the device of max_logits, {device}, but is on: {here.device}")
    if overlaps_itself(here.shape, here.stride()):
        raise ValueError(f"{name} should have memory for every element but its strides are: {here.stride()}")


def _check_placed(name: str, t: DTensor) -> None:
    """Raise ValueError if what is written into a DTensor would not be in its parameter."""
    if any(placement.is_partial() for placement in t.placements):
        raise ValueError(f"{name} should be sharded or replicated but has placements: {t.placements}")
    whole = t._base
    if not is_dtensor(whole):
        return
    if [at.is_replicate() for at in t.placements] != [at.is_replicate() for at in whole.placements]:
        raise ValueError(
            f"{name} should be in the memory of its parameter but is a copy of a part, which torch makes where it "
            f"slices a DTensor along a dimension that is sharded; the parameter has placements {whole.placements}; "
            "give it whole, with the rows, in a list: [(qkv.weight, slice(0, d))]"
        )


def _check_rows(name: str, t: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        return
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        kind = f"{rows.dtype} of size {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows of {name} should be a slice or an int tensor of one dimension but are: {kind}")
    if not on_host(rows):
        raise ValueError(f"rows of {name} should be on the CPU, so that nothing waits, but are on: {rows.device}")
    found = rows.tolist()
    if found and not 0 <= min(found) <= max(found) < t.shape[0]:
        raise ValueError(
            f"rows of {name} should be from 0 to {t.shape[0] - 1} but are from {min(found)} to {max(found)}"
        )
    if len(set(found)) < len(found):
        raise ValueError(f"rows of {name} should be there once each, or they would be scaled twice, but are: {found}")


def _check_disjoint(weights: dict[str, list[_Weight]]) -> None:
    """Raise ValueError if an element would be scaled twice."""
    named = [(name, weight) for name, several in weights.items() for weight in several]
    times = Counter(id(weight.tensor) for _, weight in named)
    taken: dict[int, Tensor] = {}
    for name, (t, rows) in named:
        if times[id(t)] > 1:
            of_rows = taken.setdefault(id(t), torch.zeros(t.shape[0], dtype=torch.bool, device="cpu"))
            at = slice(None) if rows is None else rows
            if of_rows[at].any():
                raise ValueError(_twice(name, t))
            of_rows[at] = True
    every = {id(weight.tensor): (name, weight.tensor, local(weight.tensor)) for name, weight in named}
    parts = [part for _, _, part in every.values()]
    places = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in parts)
    if places in _DISJOINT:
        return
    if (shared := overlapping(parts)) is not None:
        raise ValueError(_twice(*next((name, t) for name, t, part in every.values() if part is shared)))
    if len(_DISJOINT) == 4096:
        _DISJOINT.clear()
    _DISJOINT.add(places)


def _twice(name: str, t: Tensor) -> str:
    return (
        f"{name} of size {tuple(t.shape)} should have memory of its own but shares elements with another weight, which "
        "would be scaled twice; of a fused projection give the slices, qkv.weight[:d] and qkv.weight[d : 2 * d]"
    )


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
        q: (..., heads, length, head_dim), of any floating dtype; only read. A DTensor may be sharded along batch or
            heads.
        k: (..., kv_heads, keys, head_dim), of q's dtype, device and placements; only read. Consecutive query heads
            share a key head, as in scaled_dot_product_attention with enable_gqa=True.
        causal: whether query i sees keys 0..i alone, as with is_causal=True.
        scale: > 0; None for 1/√head_dim.
        max_workspace_bytes: cap on the memory of logits at a time, which are those of some queries of all heads and of
            the whole batch; at least one query's.

    Returns:
        (heads,), float32, or float64 if q is. -inf where there are no logits, NaN where one is. It is detached, and
            nothing waits for the host. Of DTensors it is one, without communication: Partial("max") where the batch
            is sharded, Shard(0) where the heads are.

    Raises:
        ValueError, TypeError: sizes, dtypes, placements or options that do not fit.
    """
    _check_queries(q, k, scale)
    check_workspace(max_workspace_bytes)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    if not is_dtensor(q):
        return _largest(q.detach(), k.detach(), causal, max_workspace_bytes) * scale
    return _placed(q, _largest(local(q.detach()), local(k.detach()), causal, max_workspace_bytes) * scale)


def _check_queries(q: Tensor, k: Tensor, scale: float | None) -> None:
    for name, t in (("q", q), ("k", k)):
        # Not `check_dense`, which looks for memory: torch.compile traces this.
        if not isinstance(t, Tensor) or t.dtype not in DTYPES:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} should be a tensor of a floating-point dtype but is: {kind}")
        if t.ndim < 3:
            raise ValueError(f"{name} should have size (..., heads, length, head_dim) but has: {tuple(t.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"k should be {q.dtype} on {q.device}, as q is, but is {k.dtype} on {k.device}")
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1] or (heads % kv_heads if kv_heads else heads):
        raise ValueError(
            "q and k should have sizes (..., heads, length, head_dim) and (..., kv_heads, keys, head_dim), kv_heads a "
            f"divisor of heads, but have: {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if scale is not None:
        _check_positive("scale", scale)
    if is_dtensor(q) or is_dtensor(k):
        _check_queries_placed(q, k)


def _check_queries_placed(q: Tensor, k: Tensor) -> None:
    """Raise unless each rank has whole heads of queries, and their keys."""
    if not is_dtensor(q) or not is_dtensor(k) or (q.device_mesh, q.placements) != (k.device_mesh, k.placements):
        at = [f"DTensor {t.placements}" if is_dtensor(t) else "plain" for t in (q, k)]
        raise ValueError(f"q and k should be DTensors of the same mesh and placements, or plain, but are: {at}")
    heads = q.ndim - 3
    if any(at.is_partial() or not (at.is_replicate() or dim_of(at, q.shape) <= heads) for at in q.placements):
        raise ValueError(
            f"q and k should be sharded along batch or heads, or replicated, but have placements: {q.placements}"
        )
    ranks = math.prod(
        q.device_mesh.size(i)
        for i, at in enumerate(q.placements)
        if not at.is_replicate() and dim_of(at, q.shape) == heads
    )
    if q.shape[-3] != k.shape[-3] and k.shape[-3] % ranks:
        raise ValueError(
            f"k should have heads that the {ranks} ranks which shard them share evenly, so that each has those of its "
            f"queries, but has: {k.shape[-3]}"
        )


def _placed(q: DTensor, best: Tensor) -> Tensor:
    """Return the maxima of this rank's heads and batch as a DTensor of all heads."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    heads = q.ndim - 3
    placements = [
        Replicate() if at.is_replicate() else Shard(0) if dim_of(at, q.shape) == heads else Partial("max")
        for at in q.placements
    ]
    size = torch.Size([q.shape[heads]])
    return DTensor.from_local(best, q.device_mesh, placements, run_check=False, shape=size, stride=(1,))


def _largest(q: Tensor, k: Tensor, causal: bool, max_workspace_bytes: int) -> Tensor:
    """Return the largest q·k of every head, (heads,), in fp32 or better."""
    *batch, heads, length, dim = q.shape
    kv_heads, keys = k.shape[-3:-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    best = torch.full((heads,), -math.inf, dtype=dtype, device=q.device)
    count = math.prod(batch)
    if not count * heads * keys:
        return best
    q = q.reshape(count, kv_heads, heads // kv_heads, length, dim)
    k = k.reshape(count, kv_heads, keys, dim).to(dtype)
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
    return best
