"""Comparisons of the papers, as the trainings that each consists of.

Every function takes `run`, which returns the results of tasks, and returns results by what the tables and figures of
the report show. So the same lines say what is trained and what is shown.

A learning rate is chosen on the seed TUNING, at the length at which it is used, among powers of two times a first
guess, until the best has worse neighbours on both sides; what is reported is of other seeds.

[1] "Muon is Scalable for LLM Training", arXiv 2502.16982; [2] "Delving into Muon and Beyond", arXiv 2602.04669;
[3] "Kimi K2", arXiv 2507.20534.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from configs import Config, Result, Run, active, loss

DECAY = 0.1  # of [1]
TUNING = 1000
FIRST_LR = {"adamw": 32e-3, "muon": 64e-3}
MOVES = 24

# Learning rates to try first: the best of [2] for GPT-2 and 100 billion tokens.
PAPER_LR = {
    "msgd": 5.0,
    "msgd_s": 0.2,
    "msgd_q": 0.04,
    "msgd_z": 7e-3,
    "adam": 4e-3,
    "adam_s": 1e-2,
    "adam_q": 2e-2,
    "adam_z": 7e-3,
}
WINDOW = (0.25, 0.5, 1.0, 2.0, 4.0)
RECORDS = 6  # points of a curve of spectra

# Target RMS of table 8 of [1].
TARGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
SHAPES = ((64, 64), (256, 64), (64, 256), (768, 768), (2304, 768), (768, 3072), (1024, 128))
# Learning rates for QK-Clip, from one that needs none. TAU is 100 in [3] for heads of 128, and these are 32 wide.
CLIP_LR = (16e-3, 64e-3, 256e-3)
TAU = 30.0
# What is transformed by powers, and a learning rate at which it trains.
ACCURACY_LR = {"msgd": 0.3, "adam": 8e-3}
POWERS = (0.5, 0.25)
# Fine-tuning at the best rate, and at a gentle one that keeps more of the pretraining.
SHARES = {"best": 1.0, "gentle": 1 / 8}

T = TypeVar("T")
Seeds = list[Result]


@dataclass(frozen=True)
class Scale:
    """Amount of training. Sizes are widths and numbers of layers.

    Args:
        sizes: models of the scaling law.
        size: model of the comparisons that do not say another; one of `sizes`.
        powers: model of the comparison of [2].
        decay: model of the over-trained comparison.
        accuracy: model whose momenta are looked at.
        looks: steps after which they are.
        bytes: bytes a parameter of the layers; 80 are about 20 tokens, compute-optimal.
        over: factor by which the over-trained comparison is longer: 6.25 in [1].
        experts: routed experts of a layer of the mixture.
        seeds: seeds of all that is reported.
        context: bytes that a model reads at once.
        batch: contexts of a step.
        held_out: bytes that a held-out loss is of, at least.
        text: text of all comparisons but fine-tuning; see `Config`.
    """

    sizes: tuple[tuple[int, int], ...] = ((16, 2), (24, 2), (32, 2), (40, 2), (48, 2))
    size: tuple[int, int] = (32, 2)
    powers: tuple[int, int] = (24, 2)
    decay: tuple[int, int] = (16, 2)
    accuracy: tuple[int, int] = (64, 2)
    looks: tuple[int, ...] = (5, 50, 400)
    bytes: float = 80.0
    over: int = 6
    experts: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    context: int = 64
    batch: int = 16
    held_out: int = 102_400
    text: str = "both"

    def config(self, optimizer: str, lr: float, size: tuple[int, int] | None = None, **others: Any) -> Config:
        """Make a config, as long as `bytes` says."""
        width, layers = size or self.size
        steps = max(2, math.ceil(self.bytes * active(width, layers) / (self.context * self.batch)))
        defaults = {"steps": steps, "context": self.context, "batch": self.batch}
        defaults |= {"held_out": self.held_out, "text": self.text}
        return Config(optimizer, lr, width=width, layers=layers, **{**defaults, **others})


SCALES = {
    "laptop": Scale(),
    "quick": Scale(
        sizes=((16, 1), (24, 1), (32, 1)),
        size=(16, 1),
        powers=(16, 1),
        decay=(16, 1),
        accuracy=(16, 1),
        looks=(1, 3),
        bytes=1.5,
        over=2,
        experts=4,
        seeds=(0, 1),
        batch=4,
        held_out=4096,
    ),
    # For a GPU, and a text of a few gigabytes.
    "10m": Scale(
        sizes=((128, 4), (160, 5), (192, 6), (256, 8), (320, 8)),
        size=(192, 6),
        powers=(192, 6),
        decay=(128, 4),
        accuracy=(320, 8),
        context=256,
        batch=64,
    ),
    "124m": Scale(
        sizes=((384, 6), (512, 8), (640, 10), (768, 12)),
        size=(512, 8),
        powers=(768, 12),
        decay=(384, 6),
        accuracy=(768, 12),
        context=1024,
        batch=128,
    ),
}


def together(function: Callable[[T], Any], items: Iterable[T]) -> dict[T, Any]:
    """Return function(item) by item. Each waits for its own trainings, so that there is always one to do."""
    items = list(items)
    with ThreadPoolExecutor(len(items)) as threads:
        return dict(zip(items, threads.map(function, items), strict=True))


class Tuned(NamedTuple):
    """A config with the rates that were best on the seed TUNING, and the results of all that were tried."""

    config: Config
    tried: list[Result]


def tune(run: Run, config: Config, *names: str) -> Tuned:
    """Choose rates among powers of two times the config's, until neither half nor double of any is better.

    Raises:
        RuntimeError: there is no such place within MOVES moves, or all have diverged.
    """
    first = replace(config, seed=TUNING)
    tried: dict[tuple[int, ...], Result] = {}

    def at(place: tuple[int, ...]) -> Config:
        rates = {name: getattr(first, name) * 2.0**n for name, n in zip(names, place, strict=True)}
        found = replace(first, **rates)
        return replace(found, rest_lr=None) if found.rest_lr == found.lr else found

    place = (0,) * len(names)
    for _ in range(MOVES):
        near = [place, *(_moved(place, n, by) for n in range(len(names)) for by in (-1, 1))]
        missing = [other for other in near if other not in tried]
        tried |= zip(missing, run([at(other) for other in missing]), strict=True)
        best = min(near, key=lambda other: loss(tried[other]))
        if best == place and loss(tried[best]) < math.inf:
            return Tuned(replace(at(place), seed=config.seed), list(tried.values()))
        place = best
    raise RuntimeError(f"rates should have a best within {MOVES} moves from the first ones but have not: {config}")


def _moved(place: tuple[int, ...], which: int, by: int) -> tuple[int, ...]:
    return tuple(n + by * (index == which) for index, n in enumerate(place))


def seeds(run: Run, scale: Scale, config: Config) -> Seeds:
    """Train with every seed of the scale."""
    return run([replace(config, seed=seed) for seed in scale.seeds])


class Power(NamedTuple):
    """What was trained with an optimizer of [2].

    Attributes:
        coarse: results of the scan on TUNING at a quarter of the steps, by rate, four times apart.
        lr: best rate at full length on TUNING.
        window: results of all seeds, by the factors of WINDOW of that rate.
    """

    coarse: dict[float, Result]
    lr: float
    window: dict[float, Seeds]


def powers(run: Run, scale: Scale) -> dict[str, Power]:
    """Train with the optimizers of [2], at five learning rates around the best of each."""
    return together(lambda name: _power(run, scale, name), PAPER_LR)


def _power(run: Run, scale: Scale, name: str) -> Power:
    first = PAPER_LR[name]
    config = scale.config(name, first, scale.powers)
    short = replace(config, steps=max(2, config.steps // 4), seed=TUNING)
    coarse: dict[int, Result] = {}
    wanted = {0, 1, 2}
    while wanted - set(coarse):
        missing = sorted(wanted - set(coarse))
        coarse |= zip(missing, run([replace(short, lr=first * 4.0**n) for n in missing]), strict=True)
        best = min(coarse, key=lambda n: loss(coarse[n]))
        wanted = {n for n in (best - 1, best, best + 1) if abs(n) <= MOVES // 4}
    tuned = tune(run, replace(config, lr=first * 4.0**best), "lr").config
    window = {factor: replace(tuned, lr=tuned.lr * factor) for factor in WINDOW}
    window[1.0] = recorded(window[1.0], "update")
    found = together(lambda factor: seeds(run, scale, window[factor]), WINDOW)
    return Power({first * 4.0**n: coarse[n] for n in sorted(coarse)}, tuned.lr, found)


def recorded(config: Config, *tensors: str) -> Config:
    """Return the config with the spectra of tensors recorded."""
    return replace(config, record=tensors, record_every=max(1, config.steps // RECORDS))


def adamw(run: Run, scale: Scale, size: tuple[int, int], **others: Any) -> Tuned:
    """Tune AdamW with one rate for all parameters."""
    return tune(run, scale.config("adamw", FIRST_LR["adamw"], size, weight_decay=DECAY, **others), "lr")


def muon(run: Run, scale: Scale, size: tuple[int, int], **others: Any) -> Tuned:
    """Tune Muon with one rate for all parameters."""
    return tune(run, scale.config("muon", FIRST_LR["muon"], size, weight_decay=DECAY, **others), "lr")


def matched(run: Run, scale: Scale, size: tuple[int, int], **others: Any) -> tuple[Config, Config, Config]:
    """Tune AdamW with one rate and with two, and Muon with a rate of its own beside AdamW's second one.

    The last two differ in nothing but what steps the matrices, and by which rate.
    """
    one = adamw(run, scale, size, **others).config
    two = tune(run, replace(one, rest_lr=one.lr), "lr", "rest_lr").config
    rest = two.lr if two.rest_lr is None else two.rest_lr
    return one, two, tune(run, replace(one, optimizer="muon", lr=FIRST_LR["muon"], rest_lr=rest), "lr").config


ONE, TWO, MUON = "AdamW, one rate", "AdamW", "Muon"
TAKEN, BOTH = "Muon, AdamW's one rate", "Muon, AdamW's two rates"


def scaling(run: Run, scale: Scale) -> dict[tuple[int, int], dict[str, Seeds]]:
    """Train models of all sizes; return results by size and variant.

    AdamW has one rate for all parameters, or two, of which the second is for embeddings, head and norms. Muon takes
    over the one rate, as [1] does, or both, or has a rate of its own beside AdamW's second one; see `matched`.
    """
    return together(lambda size: _variants(run, scale, size), scale.sizes)


def _variants(run: Run, scale: Scale, size: tuple[int, int]) -> dict[str, Seeds]:
    one, two, own = matched(run, scale, size)
    taken, both = (replace(config, optimizer="muon") for config in (one, two))
    variants = {ONE: one, TWO: two, TAKEN: taken, BOTH: both, MUON: own}
    if size == scale.size:
        variants = {name: recorded(config, "weight", "update") for name, config in variants.items()}
    return together(lambda name: seeds(run, scale, variants[name]), variants)


# Optimizer and weight decay of the over-trained comparison of [1].
DECAYS = {"AdamW": ("adamw", DECAY), "Muon": ("muon", DECAY), "Muon without decay": ("muon", 0.0)}
DTYPES = ("float32", "bfloat16")


def decay(run: Run, scale: Scale) -> dict[tuple[str, str], Seeds]:
    """Train a small model on many times its share of text, where [1] found decay to pay; by variant and dtype.

    Rates are tuned in fp32, two of each; see `matched`. Muon without decay has Muon's, as in [1].
    """
    steps = scale.config("adamw", 1.0, scale.decay).steps * scale.over
    _, two, own = matched(run, scale, scale.decay, steps=steps)
    configs = {}
    for name, (optimizer, amount) in DECAYS.items():
        config = replace(two if optimizer == "adamw" else own, weight_decay=amount)
        configs |= {(name, dtype): replace(config, dtype=dtype) for dtype in DTYPES}
    return together(lambda place: seeds(run, scale, configs[place]), configs)


class Rms(NamedTuple):
    """What was measured of the RMS of updates.

    Attributes:
        probes: RMS of an update of lr 1 by coefficient set, whether it is made exact, and shape; one for each seed.
        targets: results by target RMS, with AdamW's rate; AdamW's own have the target None.
        rules: results by a name of `training.RMS_RULES`.
    """

    probes: dict[tuple[str, bool, tuple[int, int]], Seeds]
    targets: dict[float | None, Seeds]
    rules: dict[str, Seeds]


def rms(run: Run, scale: Scale) -> Rms:
    """Measure the RMS of updates by shape and coefficient set, and train with others than 0.2 and by other rules."""
    from probes import UpdateRms

    from muon_kernels import COEFFICIENTS

    places = [(name, False, shape) for name in COEFFICIENTS for shape in SHAPES]
    places += [("keller", True, shape) for shape in SHAPES]
    probes = together(lambda place: run([UpdateRms(*place, seed) for seed in scale.seeds]), places)
    one = recorded(adamw(run, scale, scale.size).config, "weight", "update")
    taken = replace(one, optimizer="muon")
    targets = together(lambda target: seeds(run, scale, replace(taken, target_rms=target)), TARGETS)
    rules = together(lambda name: seeds(run, scale, replace(taken, rms=name)), ("width", "exact", "adjusted"))
    return Rms(probes, {None: seeds(run, scale, one), **targets}, rules)


def accuracy(run: Run, scale: Scale) -> dict[tuple[str, float, int], Seeds]:
    """Compare powers with the authors' on matrices of trainings; by what is transformed, power and step."""
    from probes import Accuracy

    places = [(name, p, step) for name in ACCURACY_LR for p in POWERS for step in scale.looks]

    def of(place: tuple[str, float, int]) -> Seeds:
        name, p, step = place
        start = scale.config(name, ACCURACY_LR[name], scale.accuracy, steps=2 * max(scale.looks))
        return run([Accuracy(replace(start, seed=seed), step, p) for seed in scale.seeds])

    return together(of, places)


class Finetuned(NamedTuple):
    """Models before fine-tuning, and after it at the rates of SHARES, a result for each seed."""

    before: Seeds
    after: dict[str, Seeds]


def finetune(run: Run, scale: Scale) -> dict[tuple[str, str], Finetuned]:
    """Pretrain on source code and fine-tune on prose, by the same optimizer and by the other."""
    starts = together(lambda of: of(run, scale, scale.size, text="code").config, (adamw, muon))
    by_name = {config.optimizer: config for config in starts.values()}
    pairs = [(before, after) for before in ("muon", "adamw") for after in ("muon", "adamw")]
    return together(lambda pair: _finetuned(run, scale, by_name[pair[0]], pair[1]), pairs)


def _finetuned(run: Run, scale: Scale, start: Config, after: str) -> Finetuned:
    def from_seed(seed: int) -> Config:
        of = replace(start, seed=seed)
        return replace(of, optimizer=after, start=of, text="prose", steps=max(2, of.steps // 3))

    tuned = tune(run, from_seed(TUNING), "lr").config
    rates = {name: tuned.lr * share for name, share in SHARES.items()}
    before = seeds(run, scale, start)
    return Finetuned(
        before,
        together(lambda name: run([replace(from_seed(seed), lr=rates[name]) for seed in scale.seeds]), rates),
    )


class Entropy(NamedTuple):
    """Mixtures of experts, whose spectra are recorded, by variant; and all that were tried of AdamW's rates."""

    variants: dict[str, Seeds]
    rates: list[Result]


def entropy(run: Run, scale: Scale) -> Entropy:
    """Train a mixture of experts by AdamW and by Muon, each at its best rate, and by Muon without decay."""
    width, layers = scale.size
    steps = scale.config("adamw", 1.0, scale.size).steps
    others = {"experts": scale.experts, "record_every": max(1, steps // RECORDS)}
    tuned = together(lambda of: of(run, scale, (width, layers), **others), (adamw, muon))
    configs = {
        name: replace(tuned[adamw if optimizer == "adamw" else muon].config, weight_decay=amount)
        for name, (optimizer, amount) in DECAYS.items()
    }
    return Entropy(together(lambda name: seeds(run, scale, configs[name]), configs), tuned[adamw].tried)


def clip(run: Run, scale: Scale) -> dict[float, dict[float, Seeds]]:
    """Train by Muon with and without QK-Clip, and without weight decay, which would hold logits too.

    Returns:
        Results by learning rate and by tau, which is 0 for no clipping.
    """
    config = scale.config("muon", CLIP_LR[0])
    config = replace(config, steps=max(2, config.steps // 2))
    places = [(lr, tau) for lr in CLIP_LR for tau in (0.0, TAU)]
    found = together(lambda place: seeds(run, scale, replace(config, lr=place[0], tau=place[1])), places)
    return {lr: {tau: found[lr, tau] for tau in (0.0, TAU)} for lr in CLIP_LR}


EXPERIMENTS: dict[str, Callable[[Run, Scale], Any]] = {
    "powers": powers,
    "scaling": scaling,
    "decay": decay,
    "rms": rms,
    "accuracy": accuracy,
    "finetune": finetune,
    "entropy": entropy,
    "clip": clip,
}
