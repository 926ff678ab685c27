"""Sort a model's parameters between Muon and AdamW, and say what went where."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from .layout import flattens
from .split import check_split, close, matching, pieces

__all__ = ["Assignment", "ParamGroups", "param_groups"]

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_HEAD_NAMES = frozenset(
    "classifier fc head heads lm_head logits output output_layer output_projection score "
    "to_logits unembed unembedding".split()
)
_EMBEDDING_NAME = re.compile(r"embed|\bwte\b|\bwpe\b")
_NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)


class Assignment(NamedTuple):
    """Where one parameter went: the optimizer is "Muon", "AdamW" or "none" (frozen)."""

    name: str
    shape: tuple[int, ...]
    optimizer: str
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """The Muon group and the AdamW group, in this order; print it to see what went where.

    `assignments` holds one entry per parameter of the model, frozen ones included.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], assignments: Iterable[Assignment]) -> None:
        """Hold `groups` and what `summary` tells of them."""
        super().__init__(groups)
        self.assignments = tuple(assignments)

    def summary(self) -> str:
        """Return a table: name, shape, optimizer and reason of every parameter, then the totals."""
        rows = [("parameter", "shape", "optimizer", "reason")]
        totals: dict[str, list[int]] = {}
        for name, shape, optimizer, reason in self.assignments:
            rows.append((name, "x".join(map(str, shape)), optimizer, reason))
            totals.setdefault(optimizer, []).append(math.prod(shape))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for optimizer in ("Muon", "AdamW", "none"):
            if sizes := totals.get(optimizer):
                lines.append(f"{optimizer}: {len(sizes)} parameters, {sum(sizes):,} elements")
        return "\n".join(lines)

    __str__ = summary


class _Owner(NamedTuple):
    """One place a parameter is registered at: its full name there and the module that holds it."""

    name: str
    module: nn.Module


_Owners = dict[nn.Parameter, list[_Owner]]


def param_groups(
    model: nn.Module,
    *,
    muon: str | Iterable[str] = (),
    adamw: str | Iterable[str] = (),
    split: Mapping[str, str] | None = None,
    muon_options: Mapping[str, Any] | None = None,
    adamw_options: Mapping[str, Any] | None = None,
) -> ParamGroups:
    """Sort the parameters of `model` into a group for Muon and one for AdamW.

    Muon is for the matrices between the first and the last layer [1, 2]. To AdamW go, by the first
    rule that holds in any place where the parameter is registered (so a tied weight counts once):

    - the weights of `nn.Embedding` and `nn.EmbeddingBag`, hence an output head tied to one;
    - the output head: the last matrix `weight` at or below a module called `lm_head`, `head`,
      `classifier`, `fc`, `output`, ... (of each entry, where that module is a list or a dict of
      heads) outside numbered layers; where no name tells, the last matrix `weight` of the model if
      it has as many rows as an embedding;
    - what sits in a module whose class is called a norm, and what is called a bias;
    - scalars, vectors, whatever their number of dimensions: (1, 1, 768) is one; complex numbers;
    - what has "embed", "wte" or "wpe" in its name;
    - depthwise convolutions: one small filter per channel is no matrix;
    - what Muon would read wrongly unless its `flatten` is set in `muon_options`: weights of 1-D
      convolutions, which are 3-D, as a stack of matrices; more dimensions outside a convolution
      as one matrix.

    Everything else goes to Muon: matrices, stacks of matrices (3-D: experts), convolutions.
    Frozen parameters (`requires_grad=False`) are in neither group.

    Args:
        model: the model; nothing in it is written.
        muon: `fnmatch` patterns of names that go to Muon whatever the rules say,
            for example `muon=["*.patch_embed.proj.weight"]`.
        adamw: the same for AdamW.
        split: what parameters that hold several matrices are cut to for Muon, by pattern, see `muon_kernels.split`:
            `split={"*.qkv.weight": qkv(12, 4), "*.gate_up.weight": equal(2)}`.
        muon_options: options of the Muon group, such as `{"lr": 0.02}`.
        adamw_options: options of the AdamW group, such as `{"lr": 3e-4, "betas": (0.9, 0.95)}`.

    Returns:
        Two param groups, `{"params", "param_names", "use_muon", **options}`, either of them
        possibly without parameters: what `MuonAdamW` takes; `muon, adamw = param_groups(model)`
        gives each to an optimizer of its own. Printed, a table of what went where and why.

    Raises:
        ValueError: a pattern matches no parameter or a scalar or 1-D one is to go to Muon, or a
            parameter is claimed for both, or options hold what is not theirs, or a split does not
            fit, matches what another one does, or only what does not go to Muon.
        TypeError: `model` is no `nn.Module`, or options or splits are no mapping.

    Sources: [1] https://kellerjordan.github.io/posts/muon, [2] https://arxiv.org/abs/2502.16982
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model should be an nn.Module, whose layers tell what a parameter is for, but is: {type(model).__name__}; "
            "give Muon and AdamW their parameters yourself where there is none"
        )
    for name, options in (("muon_options", muon_options), ("adamw_options", adamw_options)):
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"{name} should be a mapping of options but is: {options!r}")
        if taken := sorted({"params", "param_names", "use_muon"} & set(options or ())):
            raise ValueError(f"{name} should hold options, but {taken[0]!r} is for param_groups to say")
    if split is not None and not isinstance(split, Mapping):
        raise TypeError(f"split should be a mapping of patterns to cuts but is: {split!r}")
    if split is not None and "split" in (muon_options or {}):
        raise ValueError("split should be given once but is in muon_options too")
    owners = _owners(model)
    flatten = (muon_options or {}).get("flatten")
    rules = _adamw_rules(_output_heads(model), flatten)
    to_muon = _matches(owners, muon, "muon")
    to_adamw = _matches(owners, adamw, "adamw")
    cuts = _cuts(owners, split or {})

    assignments = []
    groups: dict[str, list[nn.Parameter]] = {"Muon": [], "AdamW": [], "none": []}
    splits: dict[str, str] = {}
    for param, places in owners.items():
        name = places[0].name
        if param in to_muon and param in to_adamw:
            raise ValueError(f"{name} is claimed by both {to_muon[param]} and {to_adamw[param]}")
        if param in to_muon and param.ndim < 2:
            raise ValueError(
                f"Muon takes parameters of 2 or more dimensions, but {to_muon[param]} "
                f"matches {name}, which has {param.ndim}"
            )
        if not param.requires_grad:
            optimizer, reason = "none", "frozen"
        elif param in to_muon:
            optimizer, reason = "Muon", to_muon[param]
        elif param in to_adamw:
            optimizer, reason = "AdamW", to_adamw[param]
        else:
            reasons = (reason for reason, holds in rules.items() if any(holds(param, at) for at in places))
            reason = next(reasons, "")
            optimizer = "AdamW" if reason else "Muon"
            reason = reason or f"{_kind(param, flatten)} in {type(places[0].module).__name__}"
        if optimizer == "Muon" and param in cuts:
            cut = cuts[param][1]
            try:
                pieces(param.shape, flatten, cut)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            splits[name] = cut
            reason += f", split: {cut}"
        if len(places) > 1:
            reason += ", tied with " + ", ".join(place.name for place in places[1:])
        groups[optimizer].append(param)
        assignments.append(Assignment(name, tuple(param.shape), optimizer, reason))

    went = {a.name: a.optimizer for a in assignments}
    for pattern in split or {}:
        names = [owners[param][0].name for param, (by, _) in cuts.items() if by == pattern]
        if all(went[name] == "AdamW" for name in names):
            raise ValueError(
                f"split={pattern!r} should match a parameter that goes to Muon but matches only, of AdamW's: "
                f"{', '.join(names)}"
            )

    def group(optimizer: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "params": groups[optimizer],
            "param_names": [a.name for a in assignments if a.optimizer == optimizer],
            "use_muon": optimizer == "Muon",
            **(options or {}),
        }

    if splits:
        muon_options = {**(muon_options or {}), "split": splits}
    return ParamGroups([group("Muon", muon_options), group("AdamW", adamw_options)], assignments)


def _owners(model: nn.Module) -> _Owners:
    """Map every parameter to all the places it is registered at, in `named_parameters` order."""
    owners: _Owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owners.setdefault(param, []).append(_Owner(name, module))
    return owners


def _found(owners: _Owners, pattern: str, keyword: str) -> list[nn.Parameter]:
    """The parameters that a pattern matches under any of their names."""
    names = {place.name: param for param, places in owners.items() for place in places}
    found = dict.fromkeys(names[name] for name in matching(pattern, names))
    if not found:
        raise ValueError(f"{keyword}={pattern!r} matches no parameter of the model{close(pattern, names)}")
    return list(found)


def _cuts(owners: _Owners, split: Mapping[str, str]) -> dict[nn.Parameter, tuple[str, str]]:
    """Map each parameter that a pattern of `split` matches to that pattern and its cut."""
    cuts: dict[nn.Parameter, tuple[str, str]] = {}
    for pattern, cut in split.items():
        check_split(cut)
        for param in _found(owners, pattern, "split"):
            if param in cuts:
                raise ValueError(
                    f"{owners[param][0].name} is claimed by both split={cuts[param][0]!r} and split={pattern!r}"
                )
            cuts[param] = pattern, cut
    return cuts


def _matches(owners: _Owners, patterns: str | Iterable[str], keyword: str) -> dict[nn.Parameter, str]:
    """Map each parameter that a pattern matches, under any of its names, to that pattern."""
    matches: dict[nn.Parameter, str] = {}
    # A lone string is an iterable of one-letter patterns, "*" among them.
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = _found(owners, pattern, keyword)
        matches.update(dict.fromkeys(found, f"{keyword}={pattern!r}"))
    return matches


def _output_heads(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of the output heads, by name or else by size; see `param_groups`."""
    modules = list(model.named_modules(remove_duplicate=False))
    weights = [
        (path.split("."), weight)
        for path, module in modules
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 2
        and not isinstance(module, _EMBEDDINGS)
    ]
    heads: dict[str, nn.Parameter] = {}
    for path, weight in weights:
        for depth, name in enumerate(path, start=1):
            if name.isdigit():
                break
            if name in _HEAD_NAMES:
                head = model.get_submodule(".".join(path[:depth]))
                several = isinstance(head, (nn.ModuleList, nn.ModuleDict))
                heads[".".join(path[: depth + several])] = weight
                break
    if not heads and weights:
        _, last = weights[-1]
        if last.shape[0] in {m.num_embeddings for _, m in modules if isinstance(m, _EMBEDDINGS)}:
            return {last}
    return set(heads.values())


def _kind(param: nn.Parameter, flatten: bool | None) -> str:
    """Return what Muon sees in a parameter."""
    if param.ndim == 2:
        return "matrix"
    return "flattened to a matrix" if flattens(param.shape, flatten) else "stack of matrices"


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels


def _adamw_rules(heads: set[nn.Parameter], flatten: bool | None) -> dict[str, Callable[[nn.Parameter, _Owner], bool]]:
    """Return what keeps a parameter from Muon, by reason, in the order of `param_groups`."""
    return {
        "embedding": lambda _, owner: isinstance(owner.module, _EMBEDDINGS),
        "output head": lambda param, _: param in heads,
        "norm": lambda _, owner: bool(_NORM.search(type(owner.module).__name__)),
        "bias": lambda _, owner: "bias" in owner.name.rpartition(".")[2],
        "vector": lambda param, _: param.numel() == max(param.shape, default=1),
        "complex": lambda param, _: param.is_complex(),
        "embedding by name": lambda _, owner: bool(_EMBEDDING_NAME.search(owner.name)),
        "depthwise convolution": lambda _, owner: _is_depthwise(owner.module),
        "3-D convolution weight": lambda param, owner: (
            param.ndim == 3 and not flatten and isinstance(owner.module, _CONVOLUTIONS)
        ),
        "more than 3-D": lambda param, owner: (
            param.ndim > 3 and flatten is None and not isinstance(owner.module, _CONVOLUTIONS)
        ),
    }
