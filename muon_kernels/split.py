"""Splits of parameters that hold several matrices in one: fused projections, heads, halves, experts.

A split is a line of text, which these functions return. So it can stand in a configuration file, and checkpoints hold
it as it is. The parts are views: nothing is copied but where `qkv` and `blocks` say so.

>>> from muon_kernels.split import blocks, equal, heads, qkv
>>> qkv(12, 4)
'qkv(12, 4)'

`param_groups(model, split="auto")` splits what `muon_kernels.rules.LAYERS` knows. By hand: where the layer is torch's
nn.Linear, outputs are rows (`dim=0`); where its weight is (inputs, outputs), they are columns (`dim=1`):

    GPT-2's c_attn, a Conv1D of (in, out)              equal(3, dim=1), each head by itself equal(36, dim=1)
    nn.MultiheadAttention's in_proj_weight             equal(3)
    Llama's fused qkv (vLLM, Phi-3, Qwen, MPT)         qkv(32, 8)
    Megatron, InternLM2, new Falcon                    qkv(32, 8, interleaved=True)
    GPT-NeoX, Pythia, BLOOM                            qkv(32, interleaved=True)
    any of these, each head by itself                  heads(32 + 2 * 8)
    q_proj and o_proj, each head by itself             heads(32) and heads(32, dim=1)
    gate_up of a fused MLP, of every expert of a stack equal(2); stored as (experts, in, out) equal(2, dim=1)
    gpt-oss's gate_up_proj, whose columns alternate    blocks(1, 1, interleaved=True, dim=1)
    experts one below the other in one matrix          equal(experts)
    a grouped convolution                              equal(groups)
    DeepSeek's kv_a_proj_with_mqa, kv_b_proj           blocks(512, 64), blocks(128, 128, interleaved=True)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from .layout import Piece, flattens

__all__ = ["blocks", "equal", "heads", "qkv"]


def equal(n: int, dim: int = 0) -> str:
    """Split into `n` consecutive parts of equal size.

    Args:
        n: number of parts.
        dim: the dimension of every matrix that is divided: 0 for rows, 1 for columns. Of a parameter that is flattened
            to a matrix, such as a convolution, the first or the second dimension.

    Returns:
        The split, a line of text for the option `split`.

    Raises:
        ValueError, TypeError: `n` is no positive int or `dim` neither 0 nor 1.
    """
    return _written("equal", n, dim=dim)


def heads(n: int, dim: int = 0) -> str:
    """Split into `n` heads, each a matrix of its own: `equal(n)` by its purpose.

    Args:
        n: number of heads, those of keys and values included where they are fused.
        dim: see `equal`; 1 for output projections.

    Returns:
        The split, a line of text for the option `split`.

    Raises:
        ValueError, TypeError: see `equal`.
    """
    return _written("heads", n, dim=dim)


def blocks(*sizes: int, interleaved: bool = False, dim: int = 0) -> str:
    """Split into consecutive parts of the given sizes.

    Args:
        sizes: of the parts.
        interleaved: whether the sizes repeat until the dimension is full, a part being all its occurrences. Unless a
            part is 1 wide, no strides describe that: such parts are stepped in copies.
        dim: see `equal`.

    Returns:
        The split, a line of text for the option `split`.

    Raises:
        ValueError, TypeError: a size is no positive int, `interleaved` no bool or `dim` neither 0 nor 1.
    """
    return _written("blocks", *sizes, interleaved=interleaved, dim=dim)


def qkv(q_heads: int, kv_heads: int | None = None, *, interleaved: bool = False, dim: int = 0) -> str:
    """Split a fused projection into three matrices: that of all queries, of all keys, and of all values.

    Args:
        q_heads: number of query heads.
        kv_heads: number of key heads, and of value heads; None for as many as query heads.
        interleaved: whether heads are ordered by groups, each of q_heads / kv_heads queries, a key and a value, as in
            Megatron. Else all queries come first, then all keys, then all values. With more than one group no strides
            describe the three, which are then stepped in copies; `heads(q_heads + 2 * kv_heads)` needs none.
        dim: see `equal`.

    Returns:
        The split, a line of text for the option `split`.

    Raises:
        ValueError, TypeError: q_heads is no multiple of kv_heads, or see `equal`.
    """
    kv_heads = q_heads if kv_heads is None else kv_heads
    text = _written("qkv", q_heads, kv_heads, interleaved=interleaved, dim=dim)
    if q_heads % kv_heads:
        raise ValueError(f"q_heads should be a multiple of kv_heads but they are: {q_heads} and {kv_heads}")
    return text


def _written(name: str, *numbers: int, dim: int, interleaved: bool = False) -> str:
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} takes positive ints but was given: {n!r}")
        if n < 1:
            raise ValueError(f"{name} takes positive ints but was given: {n}")
    if not numbers:
        raise ValueError(f"{name} takes one size or more but was given none")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved should be True or False but is: {interleaved!r}")
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"dim should be 0 for rows or 1 for columns but is: {dim!r}")
    words = [str(n) for n in numbers]
    words += ["interleaved=True"] * interleaved + [f"dim={dim}"] * (dim > 0)
    return f"{name}({', '.join(words)})"


_FORMS: dict[str, Callable[..., str]] = {"blocks": blocks, "equal": equal, "heads": heads, "qkv": qkv}
_WANTED = "what muon_kernels.split's blocks, equal, heads and qkv return, such as 'heads(12)'"
_TEXT = r"(\w+)\((\d+(?:, ?\d+)*)(, ?interleaved=True)?(?:, ?dim=(\d+))?\)"  # compiled when asked for


class _Parsed(NamedTuple):
    """A split as numbers.

    Attributes:
        shares: consecutive (count, share) of a dimension: so many parts with the same share of it.
        runs: how often the shares repeat; None for as often as they fit.
        sizes: whether shares are sizes, not proportions.
        dim: see `equal`.
    """

    shares: tuple[tuple[int, int], ...]
    runs: int | None
    sizes: bool
    dim: int


def check_split(split: Any) -> None:
    """Raise ValueError or TypeError unless `split` is None or what the functions of this module write."""
    if split is None:
        return
    if not isinstance(split, str):
        raise TypeError(f"split should be {_WANTED}, but is: {split!r}")
    _parsed(split)


@lru_cache
def _parsed(split: str) -> _Parsed:
    found = re.fullmatch(_TEXT, split)
    if found is None or found[1] not in _FORMS:
        raise ValueError(f"split should be {_WANTED}, but is: {split!r}")
    name, interleaved, dim = found[1], found[3] is not None, int(found[4] or 0)
    numbers = tuple(map(int, found[2].split(",")))
    try:
        _FORMS[name](*numbers, **({"interleaved": True} if interleaved else {}), dim=dim)
    except TypeError as error:
        raise ValueError(f"split={split!r} is no call of muon_kernels.split.{name}: {error}") from None
    if name in ("equal", "heads"):
        return _Parsed(((numbers[0], 1),), 1, False, dim)
    runs: int | None = 1
    if name == "qkv":
        q, kv = numbers[0], numbers[-1]
        numbers, runs = ((q // kv, 1, 1), kv) if interleaved else ((q, kv, kv), 1)
    elif interleaved:
        runs = None
    shares = tuple((len(list(equals)), share) for share, equals in groupby(numbers))
    return _Parsed(shares, runs, name == "blocks", dim)


@lru_cache(maxsize=65536)
def pieces(
    shape: tuple[int, ...], flatten: bool | None, split: str | None, separate: bool = False
) -> tuple[Piece | None, ...]:
    """Return the pieces that a parameter of this size is split into; (None,) for one that is left whole.

    Args:
        shape: of at least two dimensions.
        flatten: see `Muon`.
        split: from a function of this module.
        separate: whether every part is a piece of its own; else consecutive parts of equal size are one piece.

    Raises:
        ValueError: the split does not fit.
    """
    if split is None:
        return (None,)
    shares, runs, sizes, dim = _parsed(split)
    if not flattens(shape, flatten):
        dim += len(shape) - 2
    n, total = shape[dim], sum(count * share for count, share in shares)
    if sizes:
        runs, rest = divmod(n, total) if runs is None else (1, n - total)
        if rest:
            how = "repeat" if _parsed(split).runs is None else "sum"
            raise ValueError(
                f"the sizes of split={split!r} should {how} to {n}, dimension {dim} of the parameter of size "
                f"{tuple(shape)}, but sum to {total}"
            )
        unit = 1
    else:
        assert runs is not None
        if n % (total * runs):
            raise ValueError(
                f"split={split!r} should divide dimension {dim} of the parameter of size {tuple(shape)} by "
                f"{total * runs} but {n} is no multiple of it"
            )
        unit = n // (total * runs)
    found, start = [], 0
    for count, share in shares:
        size = share * unit
        for i in range(count) if separate else (0,):
            found.append(Piece(dim, start + i * size, 1 if separate else count, size, runs, total * unit))
        start += count * size
    return tuple(found)


def by_name(split: Mapping[str, str], names: Sequence[str]) -> list[str | None]:
    """Return the split of each of the named parameters, None for those that are left whole.

    Args:
        split: by name or `fnmatch` pattern.
        names: of the parameters.

    Raises:
        ValueError: a pattern matches no name, or two patterns match the same.
    """
    chosen: dict[str, str] = {}
    for pattern in split:
        found = matching(pattern, names)
        if not found:
            raise ValueError(f"split={pattern!r} matches no parameter of the group{close(pattern, names)}")
        for name in found:
            if name in chosen:
                raise ValueError(f"{name} is claimed by both split={chosen[name]!r} and split={pattern!r}")
            chosen[name] = pattern
    return [split[chosen[name]] if name in chosen else None for name in names]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that are `pattern` or that it matches."""
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def close(pattern: str, names: Iterable[str]) -> str:
    """Return names like the pattern, as the end of a sentence; empty if there are none."""
    from difflib import get_close_matches

    likely = get_close_matches(pattern, list(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(likely)}?" if likely else ""
