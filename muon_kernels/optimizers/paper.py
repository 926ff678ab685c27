"""The eight optimizers of "Delving into Muon and Beyond" (arXiv 2602.04669) by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from ..rules import Rule, class_of
from ..split import equal, matching
from .muon_adamw import OPTIONS, MuonAdamW
from .param_groups import param_groups
from .spectral import SpectralAdam, SpectralMomentum

# (class, power) by the paper's names.
PAPER: dict[str, tuple[type[Optimizer], float]] = {
    "msgd": (SpectralMomentum, 1.0),
    "msgd_s": (SpectralMomentum, 0.5),
    "msgd_q": (SpectralMomentum, 0.25),
    "msgd_z": (SpectralMomentum, 0.0),
    "adam": (SpectralAdam, 1.0),
    "adam_s": (SpectralAdam, 0.5),
    "adam_q": (SpectralAdam, 0.25),
    "adam_z": (SpectralAdam, 0.0),
}

_MATRIX = Rule("matrix of the paper", "Muon", when=lambda place: place.param.ndim > 1)
_FUSED = equal(3)
# Names of fused queries, keys and values: timm's and MPT's, GPT-2's, torch's, GPT-NeoX's and Falcon's, Baichuan's.
_QKV = re.compile(r"(?i)qkv|c_attn|in_proj|query_key_value|w_pack")
_OF_MATRICES_ONLY = OPTIONS["Muon"] - OPTIONS["AdamW"]

_Group = dict[str, Any]


def paper_optimizer(
    name: str,
    params: nn.Module | ParamsT,
    lr: float | Tensor,
    *,
    lr_vector: float | Tensor = 3e-4,
    split: str | Mapping[str, str] | None = "auto",
    **options: Any,
) -> Optimizer:
    """Return one of the eight optimizers of arXiv 2602.04669 by its name, with its settings, for a whole model.

        optimizer = paper_optimizer("msgd_q", model, lr=0.04)

    As in the authors' code, every parameter of two or more dimensions is a matrix, embeddings and heads too. All others
    are vectors, which torch's AdamW steps at `lr_vector`, with betas (0.9, 0.95) and no weight decay. To step only
    hidden matrices by powers, and AdamW's parameters of `param_groups` as vectors, give `param_groups(model)`.

    Source: github.com/Ocram7/BeyondMuon, optimizer_factory.py and optimizers/spectral_ns.py.

    Args:
        name: "msgd", "msgd_s", "msgd_q", "msgd_z", "adam", "adam_s", "adam_q" or "adam_z".
        params: a model, parameters, (name, parameter) pairs, or groups of them. An option in a group holds for its
            matrices and vectors and wins over the same option below. `use_muon=False` in a group makes all its
            parameters vectors.
        lr: learning rate of matrices.
        lr_vector: learning rate of vectors. The authors' configurations have 3e-4, and 6e-4 for "adam_q".
        split: "auto" cuts fused projections of queries, keys and values, as the authors' configurations do: matrices
            with three times as many rows as columns whose names say so, such as "qkv", "c_attn" and "in_proj"; those
            without a name by their shape alone; and of a model also what `param_groups(split="auto")` knows, but no
            nn.Embedding. Give names, or a model, where other matrices have that shape. Else the option of `Muon`; None
            cuts nothing. A split or `transposed` in a group wins.
        options: other keywords of `SpectralMomentum` or `SpectralAdam`, for matrices; those of `SpectralAdam` which
            vectors have, such as `betas`, for both.

    Returns:
        A `SpectralAdam` for the names with "adam". For those with "msgd" a `SpectralMomentum` if there are only
            matrices, else a `MuonAdamW` that has its options.

    Raises:
        ValueError: an unknown name, or a group without "params" or with another number of names, or what the optimizer
            raises.
        TypeError: something in `params` is no parameter, or what the optimizer raises.
    """
    if name not in PAPER:
        raise ValueError(f"name should be one of {', '.join(map(repr, PAPER))} but is: {name!r}")
    kind, power = PAPER[name]
    matrices: list[_Group] = []
    vectors: list[_Group] = []
    tables = _tables(params) if isinstance(params, nn.Module) else set()
    for group in _groups(params, split):
        _divide(group, split == "auto", tables, matrices, vectors)
    options = {"lr": lr, "power": power, "split": None if split == "auto" else split, **options}
    vectors = [{"lr": lr_vector, "weight_decay": 0.0, **group} for group in vectors]
    if kind is SpectralAdam:
        # At power 1 it is AdamW for matrices too, which `use_muon=False` may have made vectors.
        return SpectralAdam([*matrices, *({**group, "power": 1.0} for group in vectors)], **options)
    if not vectors:
        return SpectralMomentum(matrices, **options)
    ranks = {"process_group": options.pop("process_group", None)}
    return MuonAdamW(
        [
            *({**group, "use_muon": True} for group in matrices),
            *({**group, "use_muon": False} for group in vectors),
        ],
        muon_options={**SpectralMomentum([{"params": []}], **options).defaults, **ranks},
        adamw_options={"betas": (0.9, 0.95)},
    )


def _groups(params: nn.Module | ParamsT, split: str | Mapping[str, str] | None) -> Iterable[_Group]:
    """Return parameters, in whatever form they are given, as groups."""
    if isinstance(params, nn.Module):
        return param_groups(params, rules=[_MATRIX], split="auto" if split == "auto" else None)
    if isinstance(params, Tensor | str) or not isinstance(params, Iterable):
        what = "one tensor" if isinstance(params, Tensor) else f"of type {type(params).__name__}"
        raise TypeError(f"params should be a model, or an iterable of parameters or groups, but is {what}")
    entries: list[Any] = list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        return [{"params": entries}]
    for entry in entries:
        if not isinstance(entry, dict):
            raise TypeError(
                f"params should be groups alone, or parameters, but beside groups has: {type(entry).__name__}"
            )
        if "params" not in entry:
            raise ValueError(f"a group should have 'params' but has only: {', '.join(map(repr, entry)) or 'nothing'}")
    return entries


def _named(group: _Group) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield the parameters of a group: as they are given, their names, "" without one, and the tensors."""
    given = group["params"]
    params = [given] if isinstance(given, Tensor) else list(given)
    if "param_names" in group:
        names = group["param_names"]
        if len(names) != len(params):
            raise ValueError(f"param_names should have {len(params)} names, one a parameter, but has {len(names)}")
        params = list(zip(names, params, strict=True))
    for entry in params:
        name, p = entry if isinstance(entry, tuple) else ("", entry)
        if not isinstance(p, Tensor):
            raise TypeError(f"params should be parameters, or (name, parameter) pairs, but one is: {type(p).__name__}")
        yield entry, name, p


def _tables(model: nn.Module) -> set[Tensor]:
    """Return the weights of a model's embeddings."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {p for of in model.modules() if issubclass(class_of(of), kinds) for p in of.parameters(recurse=False)}


def _is_fused(name: str, p: Tensor) -> bool:
    """Whether a matrix is fused projections, by its shape and, where it has a name, by that as well."""
    shaped = p.ndim == 2 and p.shape[0] == 3 * p.shape[1]
    # An MLP may be three times as wide as the model, as Qwen3's 3072 x 1024 is.
    return shaped and (not name or _QKV.search(".".join(name.split(".")[-2:])) is not None)


def _divide(group: _Group, cut: bool, tables: set[Tensor], matrices: list[_Group], vectors: list[_Group]) -> None:
    """Append the parts of a group: its matrices, those of them that are fused projections to `cut`, and its vectors."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names", "use_muon")}
    whole: list[Any] = []
    fused: list[Any] = []
    rest: list[Any] = []
    for entry, at, p in _named(group):
        own = any(_applies(options.get(key), at) for key in ("split", "transposed"))
        if p.ndim < 2 or group.get("use_muon") is False:
            rest.append(entry)
        elif cut and not own and p not in tables and _is_fused(at, p):
            fused.append(entry)
        else:
            whole.append(entry)
    plain = {key: value for key, value in options.items() if key not in ("split", "transposed")}
    matrices += [{**options, "params": whole}] if whole else []
    matrices += [{**plain, "params": fused, "split": _FUSED}] if fused else []
    vector_options = {key: value for key, value in options.items() if key not in _OF_MATRICES_ONLY}
    vectors += [{**vector_options, "params": rest}] if rest else []


def _applies(option: Any, name: str) -> bool:
    """Whether the option `split` or `transposed` of a group is about the parameter of this name."""
    if option is None or isinstance(option, bool | str):
        return bool(option)
    return any(matching(pattern, [name]) for pattern in option)
