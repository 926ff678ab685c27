"""Sorting of a model's parameters between Muon and AdamW."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layout import flattens
from ..options import check_half, check_number
from ..rules import CONVOLUTIONS, EMBEDDING, HEADS, NORM, RULES, Place, Rule, class_of, is_unknown, known_layers
from ..split import check_split, close, matching, pieces
from ..tensors import FLATTENED, check_whole
from .assignments import Assignment, ParamGroups
from .muon_adamw import OPTIONS

__all__ = ["Assignment", "ParamGroups", "param_groups"]


_Places = dict[nn.Parameter, list[Place]]
_OF_MATRICES = (nn.Linear, nn.Embedding, nn.EmbeddingBag, *CONVOLUTIONS)


def param_groups(
    model: nn.Module,
    *,
    muon: str | Iterable[str] = (),
    adamw: str | Iterable[str] = (),
    split: str | Mapping[str, str] | None = None,
    lr: Mapping[str, float | str] | None = None,
    weight_decay: Mapping[str, float] | None = None,
    rules: Iterable[Rule] | None = None,
    missing_ok: bool = False,
    muon_options: Mapping[str, Any] | None = None,
    adamw_options: Mapping[str, Any] | None = None,
) -> ParamGroups:
    """Sort the parameters of `model` into a group for Muon and one for AdamW.

    Muon is for the matrices between the first and the last layer [1, 2]: for matrices, stacks of matrices (3-D:
    experts) and convolutions. To AdamW go embeddings, stems and patch embeddings, output heads, norms, biases, vectors,
    positions and learned tokens, and whatever else is no matrix. `muon_kernels.rules` has the rules. The first rule
    decides that holds at any place where a parameter is registered, so a tied weight counts once. A parametrized weight
    is judged as the weight that it stands for.

    Where no name tells the output head, it is the last matrix `weight` of the model if that has as many rows as the
    largest embedding, positions aside. Routers go to Muon, see `muon_kernels.rules.ROUTER`. Names and shapes do not
    tell everything, so look at the table: a bare parameter of three dimensions that an einsum reads as one matrix looks
    like a stack of matrices. Scripts and traces of torch.jit are judged as what they were made of.

    Frozen parameters (`requires_grad=False`) are in no group. Weights that the rules know to be stored as (inputs,
    outputs), such as those of transformers' Conv1D, are listed in the Muon group's option `transposed`.

    Patterns are names, or `fnmatch` patterns of names.

    Args:
        model: the model; nothing in it is written.
        muon: patterns of parameters that go to Muon whatever the rules say, such as
            `muon=["*.patch_embed.proj.weight"]`.
        adamw: patterns of parameters that go to AdamW whatever the rules say.
        split: how parameters that hold several matrices are split for Muon, by pattern, see `muon_kernels.split`:
            `split={"*.qkv.weight": qkv(12, 4), "*.gate_up.weight": equal(2)}`. "auto" splits what
            `muon_kernels.rules.LAYERS` knows: queries, keys, values and gates, each a matrix for all heads. Given for a
            pattern, it applies where no other pattern matches: `split={"*.Wqkv.weight": qkv(12, 4), "*": "auto"}`.
        lr: learning rates by pattern; the first pattern that matches decides. A number, or "0.5x" for a multiple of the
            `lr` in the options of the parameter's optimizer: `lr={"*.lora_B.*": "16x"}`.
        weight_decay: weight decays by pattern, numbers only: `weight_decay={"*.bias": 0.0, "*norm*": 0.0}`.
        rules: None for `muon_kernels.rules.RULES`, or your own in front of them: `rules=[Rule(...), *RULES]`.
        missing_ok: whether a pattern may match nothing here, as on a stage of a pipeline.
        muon_options: options of the Muon groups, such as `{"lr": 0.02}`. Keys of your own go into the groups returned.
        adamw_options: options of the AdamW groups, such as `{"lr": 3e-4, "betas": (0.9, 0.95)}`. Keys of your own go
            into the groups returned.

    Returns:
        Param groups, `{"params", "param_names", "use_muon", **options}`, as `MuonAdamW` takes them: one of Muon and one
            of AdamW, either of them possibly without parameters, so that `muon, adamw = param_groups(model)` gives each
            to an optimizer of its own. Where `lr` or `weight_decay` are given by pattern there are as many groups as
            they ask for, those of Muon first, and at least one of each: `groups.muon` and `groups.adamw` are lists of
            them. Printed, they are a table of what went where and why.

    Raises:
        ValueError: a pattern matches no parameter; or a scalar or 1-D parameter is to go to Muon; or a parameter is
            claimed for both; or options are of the other optimizer; or a split does not fit, matches what another one
            does, or matches only what does not go to Muon; or a parameter is flattened, emptied or not made yet, so
            that its shape tells nothing.
        TypeError: `model` is no `nn.Module`, or options or splits are no mapping, or a rule is no `Rule`.

    Warns:
        UserWarning: a parameter has no elements, and nothing tells whether it has been emptied; or parameters go to
            Muon whose layers have lost their classes, as in a model that torch.export returns.

    Sources: [1] https://kellerjordan.github.io/posts/muon, [2] https://arxiv.org/abs/2502.16982
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model should be an nn.Module, whose layers tell what a parameter is for, but is: {type(model).__name__}; "
            "give Muon and AdamW their parameters yourself where there is none"
        )
    halves = {
        "Muon": _mapping("muon_options", muon_options, "options"),
        "AdamW": _mapping("adamw_options", adamw_options, "options"),
    }
    _check_halves(halves)
    flatten = halves["Muon"].get("flatten")
    places = _places(model, flatten)
    everything = {"*": "auto"} if places else {}  # a pattern has to match something
    split = _mapping("split", everything if split == "auto" else split, "patterns to cuts")
    if split and "split" in halves["Muon"]:
        raise ValueError("split should be given once but is in muon_options too")
    find = _Finder(places, missing_ok)
    claims = {"Muon": find.claims("muon", muon), "AdamW": find.claims("adamw", adamw)}
    splits = find.splits(split)
    own = {
        "lr": find.first("lr", _mapping("lr", lr, "patterns to numbers")),
        "weight_decay": find.first("weight_decay", _mapping("weight_decay", weight_decay, "patterns to numbers")),
    }
    book = RULES if rules is None else _checked(rules)

    sorting = _Sorting(halves, own, splits, flatten)
    assignments = []
    for param, at in places.items():  # no comprehension: before Python 3.12 a warning would be of its frame
        optimizer, reason = _judge(param, at, claims, book)
        assignments.append(sorting.put(param, at, optimizer, reason))
    if not missing_ok:
        _check_splits(splits, places, assignments)
    _warn_of_unknown(assignments)
    return ParamGroups(sorting.groups(), assignments)


class _Sorting:
    """Groups of both halves while parameters are put into them."""

    def __init__(
        self,
        halves: Mapping[str, Mapping[str, Any]],
        own: Mapping[str, Mapping[nn.Parameter, tuple[str, Any]]],
        splits: Mapping[nn.Parameter, tuple[str, str]],
        flatten: bool | None,
    ) -> None:
        """Args as `param_groups` has found them: options of the halves, options and splits of single parameters."""
        self._halves, self._own, self._splits, self._flatten = halves, own, splits, flatten
        self._groups: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"Muon": {}, "AdamW": {}}

    def put(self, param: nn.Parameter, at: Sequence[Place], optimizer: str, reason: str) -> Assignment:
        """Put a parameter into a group of the optimizer that it was judged to be for, or into none; say why."""
        name, words = at[0].full_name, [reason]
        if optimizer != "none":
            own = self._own.items()
            options = {key: _number(key, *of[param], optimizer, self._halves) for key, of in own if param in of}
            new = {"params": [], "param_names": [], **options}
            group = self._groups[optimizer].setdefault(tuple(options.items()), new)
            group["params"].append(param)
            group["param_names"].append(name)
            words += [f"{key} {value:g}" for key, value in options.items()]
        if optimizer == "Muon":
            transposed, cut_to = _stored(at, self._flatten, self._splits.get(param))
            if transposed and "transposed" not in self._halves["Muon"]:
                group.setdefault("transposed", []).append(name)
                words.append("transposed")
            if cut_to is not None:
                group.setdefault("split", {})[name] = cut_to
                words.append(f"split: {cut_to}")
        if len(at) > 1:
            words.append("tied with " + ", ".join(place.full_name for place in at[1:]))
        return Assignment(name, tuple(param.shape), optimizer, ", ".join(words))

    def groups(self) -> list[dict[str, Any]]:
        """Return the groups of both halves, of each one at least."""
        made = []
        for optimizer, by_options in self._groups.items():
            plain = by_options.pop((), {"params": [], "param_names": []})
            for group in [plain, *by_options.values()] if plain["params"] or not by_options else by_options.values():
                made.append({"use_muon": optimizer == "Muon", **self._halves[optimizer], **group})
        return made


def _mapping(name: str, value: Any, of: str) -> Mapping[str, Any]:
    """Return the value, empty for None; raise TypeError unless it is a mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} should be a mapping of {of} but is: {value!r}")
    return value or {}


def _check_halves(halves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if options of a half are the other's, or cannot be set for a group."""
    for half, options in halves.items():
        if taken := sorted({"params", "param_names", "use_muon"} & options.keys()):
            raise ValueError(f"{half.lower()}_options should hold options, but {taken[0]!r} is for param_groups to say")
        if "process_group" in options:
            raise ValueError(
                f"{half.lower()}_options should hold options of groups, but 'process_group' is for a whole optimizer: "
                "give it to Muon, or in muon_options to MuonAdamW"
            )
        check_half(half, options, OPTIONS)


def _warn_of_unknown(assignments: Sequence[Assignment]) -> None:
    """Warn of parameters that go to Muon although their layers have lost their classes."""
    if unknown := [at.name for at in assignments if at.optimizer == "Muon" and _UNKNOWN in at.reason]:
        warnings.warn(
            f"parameters go to Muon whose layers have lost the classes by which embeddings, heads and convolutions are "
            f"known, as torch.export, torch.fx and torch.jit leave them: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}; call param_groups on the model before, which has the same "
            "parameters, or say muon=[...] and adamw=[...]",
            stacklevel=3,
        )


def _checked(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return `rules` as a tuple; raise ValueError or TypeError if one of them cannot be applied."""
    if isinstance(rules, Rule):
        raise TypeError(f"rules should be a list of them, [rule, *RULES], but is one rule: {rules.reason!r}")
    book = tuple(rules)
    for i, rule in enumerate(book):
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{i}] should be a muon_kernels.rules.Rule but is: {rule!r}")
        if rule.optimizer not in ("Muon", "AdamW"):
            raise ValueError(f"rules[{i}].optimizer should be 'Muon' or 'AdamW' but is: {rule.optimizer!r}")
        for pattern in (rule.name, rule.layer):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(
                    f"rules[{i}] should have regular expressions, such as r'\\.knots$' where a pattern has '*.knots', "
                    f"but has {pattern!r}: {error}"
                ) from None
    return book


_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*")
_NORMED = re.compile(r"(\w+)_(?:orig|g|v)")  # of the older weight_norm and spectral_norm of torch.nn.utils


def _places(model: nn.Module, flatten: bool | None) -> _Places:
    """Map every parameter to all places where it is registered, in the order of `named_parameters`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for path, module in modules.items():
        for full_name, param in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owner, leaf = path, full_name.rpartition(".")[2]
            if match := _PARAMETRIZED.fullmatch(full_name):
                owner, leaf = match[1] or "", match[2]
            elif (match := _NORMED.fullmatch(leaf)) and isinstance(getattr(module, match[1], None), Tensor):
                leaf = match[1]
            parts = [*owner.split("."), leaf] if owner else [leaf]
            layers = tuple(modules[".".join(parts[:depth])] for depth in range(len(parts)))
            found.append(Place(".".join(parts), param, layers, False, flatten, full_name))
    heads = _output_heads(found)
    places: _Places = {}
    for place in found:
        places.setdefault(place.param, []).append(place._replace(head=place.param in heads))
    return places


def _output_heads(places: Sequence[Place]) -> set[nn.Parameter]:
    """Return the weights of the output heads, by name or else by size; see HEADS and `param_groups`."""
    weights = [i for i, p in enumerate(places) if p.leaf == "weight" and p.param.ndim > 1 and not EMBEDDING.holds(p)]
    last: dict[str, int] = {}  # index of the last weight of each head
    certain = set()
    for i in weights:
        path, sure = _head_of(places[i])
        if path:
            last[path] = i
            certain |= {path} if sure else set()
    for path in last.keys() - certain:
        normed = any(p.name.startswith(f"{path}.") and NORM.holds(p) for p in places[last[path] :])
        if normed or any(other.startswith(f"{path}.") for other in certain):
            del last[path]
    if last or not weights:
        return {places[i].param for i in last.values()}
    tables = [p.param.shape[0] for p in places if EMBEDDING.holds(p) and not HEADS.positions.search(p.name)]
    end = places[weights[-1]].param
    return {end} if end.shape[0] == max(tables, default=-1) else set()


def _head_of(place: Place) -> tuple[str, bool]:
    """Return the path of the output head that holds the weight, empty without, and whether its name leaves no doubt."""
    parts, end, inner = place.name.split(".")[:-1], "", False
    for depth, part in enumerate(parts, start=1):
        if part.isdigit():
            break
        several = issubclass(class_of(place.layers[depth]), (nn.ModuleList, nn.ModuleDict))
        path = ".".join(parts[: depth + several])
        if HEADS.heads.fullmatch(part):
            return path, True
        if HEADS.beside.fullmatch(part):
            return "", False
        inner = inner or HEADS.never.fullmatch(part) is not None
        if not inner and HEADS.ends.fullmatch(part):
            if path == f"{end}.{part}":
                return path, True
            end = end or path
    return end, False


class _Finder:
    """Finder of the parameters that patterns match under any of their names."""

    def __init__(self, places: _Places, missing_ok: bool) -> None:
        self._names = {place.full_name: param for param, at in places.items() for place in at}
        self._missing_ok = missing_ok

    def _found(self, keyword: str, pattern: str) -> list[nn.Parameter]:
        found = dict.fromkeys(self._names[name] for name in matching(pattern, self._names))
        if not found and not self._missing_ok:
            raise ValueError(
                f"{keyword}={pattern!r} matches no parameter of the model, which missing_ok=True allows"
                f"{close(pattern, self._names)}"
            )
        return list(found)

    def claims(self, keyword: str, patterns: str | Iterable[str]) -> dict[nn.Parameter, str]:
        """Map each parameter that a pattern matches to that pattern."""
        # A lone string is an iterable of one-letter patterns, "*" among them.
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        return {param: f"{keyword}={pattern!r}" for pattern in patterns for param in self._found(keyword, pattern)}

    def first(self, keyword: str, values: Mapping[str, Any]) -> dict[nn.Parameter, tuple[str, Any]]:
        """Map each parameter that a pattern matches to the first such pattern and its value."""
        found: dict[nn.Parameter, tuple[str, Any]] = {}
        for pattern, value in values.items():
            for param in self._found(keyword, pattern):
                found.setdefault(param, (pattern, value))
        return found

    def splits(self, split: Mapping[str, str]) -> dict[nn.Parameter, tuple[str, str]]:
        """Map each parameter that a pattern matches to that pattern and its split; "auto" gives way to others."""
        said = {pattern: cut for pattern, cut in split.items() if cut != "auto"}
        found = self.first("split", said)
        for pattern, cut in said.items():
            check_split(cut)
            for param in self._found("split", pattern):
                if (other := found[param][0]) != pattern:
                    name = next(name for name, named in self._names.items() if named is param)
                    raise ValueError(f"{name} is claimed by both split={other!r} and split={pattern!r}")
        return {**self.first("split", {pattern: "auto" for pattern in split.keys() - said.keys()}), **found}


_UNKNOWN = " of unknown class"


def _judge(
    param: nn.Parameter, at: Sequence[Place], claims: Mapping[str, Mapping[nn.Parameter, str]], rules: Sequence[Rule]
) -> tuple[str, str]:
    """Return the optimizer of a parameter, and the reason."""
    name = at[0].full_name
    said = [(optimizer, by[param]) for optimizer, by in claims.items() if param in by]
    if len(said) > 1:
        raise ValueError(f"{name} is claimed by both {said[0][1]} and {said[1][1]}")
    if param.requires_grad:
        _check_whole(at[0])
        if not said:
            unknown = _UNKNOWN if any(map(is_unknown, at)) else ""
            kind = f"{_kind(param, at[0].flatten)} in {class_of(at[0].module).__name__}{unknown}"
            otherwise = ("Muon", kind) if param.ndim > 1 else ("AdamW", "vector")
            held = ((rule.optimizer, rule.reason) for rule in rules if any(map(rule.holds, at)))
            said = [next(held, otherwise)]
    if said[:1] and said[0][0] == "Muon" and param.ndim < 2:
        raise ValueError(
            f"Muon takes parameters of 2 or more dimensions, but {said[0][1]} matches {name}, which has {param.ndim}"
        )
    return said[0] if param.requires_grad else ("none", "frozen")


def _check_whole(place: Place) -> None:
    """Raise ValueError or warn if a trainer has flattened or emptied a parameter, so that its shape tells nothing."""
    param, name = place.param, place.full_name
    if is_lazy(param):
        raise ValueError(f"{name} should have a size but is not made yet; run the model once before")
    check_whole(name, param)
    if param.ndim < 2 and name.rpartition(".")[2] == "weight" and issubclass(class_of(place.module), _OF_MATRICES):
        raise ValueError(
            f"{name} should be a matrix, as the weight of {class_of(place.module).__name__} is, but has size "
            f"{tuple(param.shape)}: {FLATTENED}"
        )
    if param.numel() == 0:
        warnings.warn(
            f"{name} of size {tuple(param.shape)} has no elements; if a trainer has emptied it, call param_groups "
            "before that happens, or while its parameters are gathered",
            stacklevel=4,
        )


def _kind(param: nn.Parameter, flatten: bool | None) -> str:
    """Return, in words, what Muon sees in a parameter."""
    if param.ndim == 2:
        return "matrix"
    return "flattened to a matrix" if flattens(param.shape, flatten) else "stack of matrices"


def _number(
    key: str, pattern: str, value: float | str, optimizer: str, halves: Mapping[str, Mapping[str, Any]]
) -> float:
    """Return the number that the value of a pattern stands for."""
    name = f"{key}[{pattern!r}]"
    if key == "lr" and isinstance(value, str):
        match = re.fullmatch(r"(\d+|\d*\.\d+)x", value)
        if match is None:
            raise ValueError(f"{name} should be a number or a multiple such as '0.5x' but is: {value!r}")
        if "lr" not in halves[optimizer]:
            raise ValueError(f"{name} is a multiple, so {optimizer.lower()}_options should hold lr but do not")
        return float(match[1]) * float(halves[optimizer]["lr"])
    check_number(name, value)
    return float(value)


def _stored(at: Sequence[Place], flatten: bool | None, cut: tuple[str, str] | None) -> tuple[bool, str | None]:
    """Return whether a parameter is stored as (inputs, outputs), and its split or None."""
    param = at[0].param
    known = [layer for place in at for layer in known_layers(place)]
    turned = any(transposed for _, transposed in known)
    if cut is None:
        return turned, None
    if cut[1] != "auto":
        try:
            pieces(param.shape, flatten, cut[1])
        except ValueError as error:
            raise ValueError(f"{at[0].full_name}: {error}") from None
        return turned, cut[1]
    return turned, next((split for split, _ in known if split is not None), None)


def _check_splits(
    splits: Mapping[nn.Parameter, tuple[str, str]], places: _Places, assignments: Sequence[Assignment]
) -> None:
    """Raise ValueError for a pattern of `split` that matches only parameters of AdamW."""
    went = dict(zip(places, assignments, strict=True))
    matched: dict[str, list[Assignment]] = {}
    for param, (pattern, cut) in splits.items():
        if cut != "auto":
            matched.setdefault(pattern, []).append(went[param])
    for pattern, found in matched.items():
        if all(assignment.optimizer == "AdamW" for assignment in found):
            raise ValueError(
                f"split={pattern!r} should match a parameter that goes to Muon but matches only, of AdamW's: "
                f"{', '.join(assignment.name for assignment in found)}; missing_ok=True allows that"
            )
