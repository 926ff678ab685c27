"""Every option of a group, defined once: how it is checked, and whether a change prepares a step anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .coefficients import NS_STEPS, resolve
from .newton_schulz import ALGORITHMS
from .powers import check_power
from .scaling import WEIGHT_DECAY_FORMS, rule_name, rule_of
from .split import check_split
from .stages import STAGES

_PLAIN = frozenset((float, int, bool, str, type(None)))


def is_plain(value: Any) -> bool:
    """Whether `plain` would return `value` as it is."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Tensor) or value is NS_STEPS:
        return True
    return kind in (tuple, list) and all(map(is_plain, value))


def plain(value: Any) -> Any:
    """Return an option as any checkpoint can hold it: numbers, text, bool and None, or tuples, lists and dicts of them.

    A dtype becomes its name. Numbers of numpy, which is not imported, become Python's. Tensors, and values that no
    option can have, stay as they are; checks come later.
    """
    if is_plain(value):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        items = map(plain, value)
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, str):  # of an enumeration, whose class a checkpoint would have to import
        return "".join(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def settle(group: dict[str, Any], keys: Iterable[str]) -> None:
    """Replace the options `keys` that a group has by plain values; a function becomes its name.

    Raises:
        ValueError: a function that cannot be found by its name.
    """
    for key in keys:
        value = group.get(key)
        if type(value) not in _PLAIN and not is_plain(value):
            group[key] = rule_name(value) if key == "adjust_lr_fn" and callable(value) else plain(value)
    if group.get("adjust_lr_fn") == "spectral":  # torch's name for the same, so that both read checkpoints alike
        group["adjust_lr_fn"] = "spectral_unclamped"


def settled_checkpoint(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], keys: Iterable[str]
) -> list[dict[str, Any]]:
    """Return the param groups of a checkpoint in plain values.

    Args:
        saved: the groups of the checkpoint.
        groups: the groups that are to load it.
        keys: the options.

    Raises:
        ValueError: `adjust_lr_fn` names a function that the group does not have: no checkpoint should choose what runs.
    """
    found: list[dict[str, Any]] = []
    for i, group in enumerate(saved):
        found.append(dict(group))
        settle(found[-1], keys)
        rule = found[-1].get("adjust_lr_fn")
        own = groups[i]["adjust_lr_fn"] if i < len(groups) else None
        if isinstance(rule, str) and ":" in rule and rule != own:
            raise ValueError(
                f"adjust_lr_fn of a checkpoint should be a rule of muon_kernels or the function that the group has "
                f"already, but is: {rule!r} where the group has {own!r}; give the optimizer that function before"
            )
    return found


# Keys of groups that are no options.
_STRUCTURE = frozenset(("params", "param_names", "initial_lr", "use_muon", "step"))

# Similarity from which a key counts as a misspelt option. One letter wrong, missing or too many reaches 0.87 (nesterow
# and momentun 0.875). Of the keys that frameworks write, "algorithm" comes nearest, to "ns_algorithm", with 0.86. Keys
# that are an option with a further word, like no_weight_decay and max_momentum, are left out by `check_keys`.
_CLOSE = 0.87


# Names that other libraries have for options.
_ALIASES = {"learning_rate": "lr", "wd": "weight_decay", "mu": "momentum"}


def check_keys(group: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError if a key of a group is a misspelt option. Other keys are kept, as by torch's optimizers."""
    for key in group.keys() - set(known) - _STRUCTURE:
        near = meant(str(key), known, _CLOSE)
        if near and f"_{near}_" not in f"_{key}_":
            raise ValueError(
                f"a group has {key!r}, which is no option but close to one: did you mean {near!r}? "
                "Keys of your own are kept, but should differ more from the options"
            )


def check_half(half: str, options: Iterable[str], known: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError unless all of `options` are options of `half`, "Muon" or "AdamW"; `known` has those of both."""
    for key in options:
        if key in known[half]:
            continue
        fixes = [f"it is {other}'s: put it into {other.lower()}_options" for other in known if key in known[other]]
        if near := meant(str(key), known[half], 0.8):  # the similarity of betas and beta2
            fixes.append(f"did you mean {near!r}?")
        fix = ", or ".join(fixes) or "put a key of your own into the groups that you get"
        raise ValueError(f"{half.lower()}_options should hold options of {half} but have {key!r}; {fix}")


def meant(key: str, known: Iterable[str], cutoff: float) -> str | None:
    """Return the option that a key may be another spelling of, or None."""
    from difflib import get_close_matches

    word = key.lower()
    near = get_close_matches(_ALIASES.get(word, word), known, n=1, cutoff=cutoff)
    near = near or [name for name in known if sorted(name) == sorted(word)]
    return near[0] if near else None


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype that an option is, or names."""
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype]


def on_host(value: Any) -> bool:
    """Whether `value` can be read without a synchronisation with a device."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def check_number(name: str, value: Any) -> None:
    """Raise ValueError or TypeError unless `value` is a finite number >= 0, or a tensor of one.

    Of a tensor on a device only the size is looked at.
    """
    if type(value) is float and 0.0 <= value < math.inf:  # nearly always so, and asked in every step
        return
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} should be a number but is: {value!r}")
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(f"{name} should be one real number but is a tensor of size {tuple(value.shape)}")
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided or value.is_quantized):
        raise TypeError(
            f"{name} should be a number but is a tensor of {value.dtype}, {value.layout}, on {value.device}"
        )
    if not on_host(value):
        return
    number = float(value)
    if not 0.0 <= number:
        raise ValueError(f"{name} should be >= 0 but is: {value}")
    if number == math.inf:
        raise ValueError(f"{name} should be finite but is: {value}")


def check_eps(eps: Any) -> None:
    """Raise ValueError or TypeError unless `eps` is in [0, 1)."""
    check_number("eps", eps)
    if eps >= 1:
        raise ValueError(f"eps should be < 1, the smallest norm that it is compared with, but is: {eps}")


def check_fraction(name: str, value: Any) -> None:
    """Raise ValueError or TypeError unless `value` is in [0, 1)."""
    check_number(name, value)
    if value >= 1:
        raise ValueError(f"{name} should be < 1 but is: {value}")


def check_choice(name: str, value: Any, among: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of `among`."""
    if not isinstance(value, (str, type(None))) or value not in among:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, among))} but is: {value!r}")


def check_weight_decay_form(form: Any, peak_lr: Any) -> None:
    """Raise ValueError or TypeError unless `form` exists and has the `peak_lr` that it needs.

    A `peak_lr` of None is one that is still to be set.
    """
    check_choice("weight_decay_form", form, WEIGHT_DECAY_FORMS)
    if peak_lr is not None:
        check_number("peak_lr", peak_lr)
    if form == "scheduled" and on_host(peak_lr) and peak_lr == 0:
        raise ValueError(
            "peak_lr should be > 0 for weight_decay_form='scheduled' but is: 0; give the largest lr of the schedule"
        )


def check_transposed(transposed: Any) -> None:
    """Raise TypeError unless `transposed` is True, False, or a list of names and patterns."""
    if isinstance(transposed, bool):
        return
    if not isinstance(transposed, (list, tuple)) or not all(isinstance(name, str) for name in transposed):
        raise TypeError(f"transposed should be True, False, or a list of names and patterns but is: {transposed!r}")


def check_algorithm(name: Any) -> None:
    """Raise ValueError unless `name` is a form of the iteration, or "auto"."""
    if not isinstance(name, str) or name not in ("auto", *ALGORITHMS):
        raise ValueError(f"ns_algorithm should be 'auto' or one of {', '.join(map(repr, ALGORITHMS))} but is: {name!r}")


def check_workspace(cap: Any) -> None:
    """Raise ValueError or TypeError unless `cap` is a positive int or None."""
    if cap is None:
        return
    if isinstance(cap, bool) or not isinstance(cap, int):
        raise TypeError(f"max_workspace_bytes should be a positive int or None but is: {cap!r}")
    if cap <= 0:
        raise ValueError(f"max_workspace_bytes should be a positive int or None but is: {cap}")


WORKSPACE_DTYPES = ("bfloat16", "float16")
# Dtypes that momentum may be kept in.
MOMENTUM_DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in MOMENTUM_DTYPES}


def check_workspace_dtype(dtype: Any) -> None:
    """Raise ValueError unless `dtype` is one that stacks can be of, or its name."""
    if plain(dtype) not in WORKSPACE_DTYPES:
        raise ValueError(
            f"workspace_dtype should be torch.bfloat16 or torch.float16, or a name of these, but is: {dtype!r}"
        )


def check_momentum_dtype(dtype: Any) -> None:
    """Raise ValueError unless `dtype` is one that momentum can be kept in, or its name, or None for the gradient's."""
    if dtype is not None and plain(dtype) not in MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype should be a floating-point dtype, torch.int8, a name of these, or None but is: {dtype!r}"
        )


def _of(check: Callable[[Any], object]) -> Callable[[str, Any, Mapping[str, Any]], None]:
    """Return a check of (name, value, group) that calls `check` with the value."""

    def checked(name: str, value: Any, group: Mapping[str, Any]) -> None:
        check(value)

    return checked


def _called(word: str) -> Callable[[str, Any, Mapping[str, Any]], None]:
    """Return a check for a number >= 0 that calls the option by torch's word for it."""
    return lambda name, value, group: check_number(word, value)


def _lr(name: str, value: Any, group: Mapping[str, Any]) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    check_number("Learning rate", value)


def _boolean(name: str, value: Any, group: Mapping[str, Any]) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be True or False but is: {value!r}")


def _choice_of(choices: tuple[Any, ...]) -> Callable[[str, Any, Mapping[str, Any]], None]:
    """Return a check that a value is True or False, or one of the choices."""
    return _boolean if choices == (False, True) else lambda name, value, group: check_choice(name, value, choices)


def _flatten(name: str, value: Any, group: Mapping[str, Any]) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"flatten should be True, False or None but is: {value!r}")


def _split(name: str, value: Any, group: Mapping[str, Any]) -> None:
    for cut in value.values() if isinstance(value, Mapping) else (value,):
        check_split(cut)


def _backend(name: str, value: Any, group: Mapping[str, Any]) -> None:
    if value != "auto":
        backends.get(value)


def _coefficients(name: str, value: Any, group: Mapping[str, Any]) -> None:
    resolve(value, group["ns_steps"])


def _period(name: str, value: Any, group: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} should be an int >= 1 but is: {value!r}")


class Option(NamedTuple):
    """An option of a group.

    Attributes:
        check: raises ValueError or TypeError for (name, value, group) unless the value can be used.
        prepared: whether `prepare` looks at it, so that tasks are made anew when it changes.
    """

    check: Callable[[str, Any, Mapping[str, Any]], None]
    prepared: bool = False


STRATEGIES = ("owner", "gram", "blocks")  # see distributed/strategies/

# The options of `Muon`; other optimizers have some of them. Defaults are in the signatures of the constructors.
OPTIONS: dict[str, Option] = {
    "lr": Option(_lr),
    "weight_decay": Option(_called("weight decay")),
    "momentum": Option(_called("momentum")),
    "nesterov": Option(_boolean),
    "ns_coefficients": Option(_coefficients, prepared=True),
    "eps": Option(_of(check_eps)),
    "ns_steps": Option(lambda name, value, group: None, prepared=True),  # checked with ns_coefficients
    "adjust_lr_fn": Option(_of(rule_of), prepared=True),
    "use_addmm": Option(_boolean),
    "dampened": Option(_boolean),
    "flatten": Option(_flatten, prepared=True),
    "split": Option(_split, prepared=True),
    "transposed": Option(_of(check_transposed), prepared=True),
    "ns_algorithm": Option(_of(check_algorithm), prepared=True),
    "backend": Option(_backend, prepared=True),
    "max_workspace_bytes": Option(_of(check_workspace), prepared=True),
    "workspace_dtype": Option(_of(check_workspace_dtype), prepared=True),
    "momentum_dtype": Option(_of(check_momentum_dtype), prepared=True),
    "maximize": Option(_boolean),
    "power": Option(_of(check_power), prepared=True),
    "weight_decay_form": Option(lambda name, value, group: check_weight_decay_form(value, group["peak_lr"])),
    "peak_lr": Option(lambda name, value, group: None),  # checked with weight_decay_form
    "cautious": Option(_boolean),
    "stochastic_rounding": Option(_boolean, prepared=True),
    **{stage.option: Option(_choice_of(stage.choices), prepared=True) for stage in STAGES},
    "beta2": Option(lambda name, value, group: check_fraction(name, value)),
    "strategy": Option(lambda name, value, group: check_choice(name, value, STRATEGIES), prepared=True),
    "block_period": Option(_period),
    "block_lr_ratio": Option(lambda name, value, group: check_number(name, value), prepared=True),
}
PREPARED_OPTIONS = tuple(name for name, option in OPTIONS.items() if option.prepared)


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless each option that a group has can be used by itself."""
    for name, option in OPTIONS.items():
        if name in group:
            option.check(name, group[name], group)


def check_together(group: Mapping[str, Any]) -> None:
    """Raise ValueError if options of a group, each of which can be used by itself, cannot be used together."""
    power = group["power"]
    asked = [stage for stage in STAGES if group[stage.option] != stage.choices[0]]
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError("stochastic_rounding should be False where master_weights is True, which rounds nothing away")
    for stage in asked:
        wanted = f"{stage.option} should be {stage.choices[0]}"
        if stage.needs_whole() and group["strategy"] == "gram":
            raise ValueError(f"{wanted} for strategy='gram', in which no rank has a whole direction")
        if stage.normalizes and power:
            raise ValueError(f"{wanted} where power is above 0, as updates have any scale then")
    if power and group["workspace_dtype"] != "bfloat16":
        raise ValueError(
            "workspace_dtype should be bfloat16 where power is above 0, as updates have any scale then, but is: "
            f"{group['workspace_dtype']}"
        )
    if power != 1:
        return
    for stage in asked:
        default, value = stage.choices[0], group[stage.option]
        but = "" if value is True else f", but is: {value!r}"
        raise ValueError(f"{stage.option} should be {default} where power is 1, which is SGD in torch{but}")
    for name in ("cautious", "stochastic_rounding"):
        if group[name]:
            raise ValueError(f"{name} should be False where power is 1, which is SGD in torch")
    if group["momentum_dtype"] == "int8":
        raise ValueError(
            "momentum_dtype should be floating-point where power is 1, which is SGD in torch, but is: int8"
        )
