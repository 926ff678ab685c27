"""Comparisons of the papers, as the trainings that each consists of.

Every function takes `run`, which returns the result of a config, and returns results by what the tables and figures of
the report show. So the same lines say what is trained and what is shown.

[1] "Muon is Scalable for LLM Training", arXiv 2502.16982; [2] "Delving into Muon and Beyond", arXiv 2602.04669;
[3] "Kimi K2", arXiv 2507.20534.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness import Config, Result, Run, active, best, model

DECAY = 0.1  # of [1]
ADAMW_LR = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)

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

# Learning rates for QK-Clip, from one that needs none. TAU is 100 in [3] for heads of 128, and these are 32 wide.
CLIP_LR = (16e-3, 64e-3, 256e-3)
TAU = 30.0

# Optimizer and weight decay of [1]'s comparisons.
VARIANTS = {"AdamW": ("adamw", DECAY), "Muon": ("muon", DECAY), "Muon without decay": ("muon", 0.0)}


@dataclass(frozen=True)
class Scale:
    """Amount of training.

    Args:
        powers: steps of a training in the comparison of [2].
        steps: steps of a model of `width` in the others; other sizes have as many tokens a parameter.
        width: width of all models but those of the scaling law.
        sizes: widths and numbers of layers of the scaling law's models.
        experts: routed experts of a layer of the mixture.
        over: factor by which the over-trained comparison lengthens the training of the smallest model.
        seeds: seeds of fine-tuning.
    """

    powers: int = 240
    steps: int = 480
    width: int = 64
    sizes: tuple[tuple[int, int], ...] = ((32, 2), (64, 2), (96, 2))
    experts: int = 8
    over: int = 20
    seeds: tuple[int, ...] = (0, 1)


QUICK = Scale(powers=4, steps=8, width=32, sizes=((16, 1), (32, 1)), experts=4, over=2, seeds=(0,))


def powers(run: Run, scale: Scale) -> dict[str, dict[float, Result]]:
    """Train with the optimizers of [2], at five learning rates around the best of a coarse scan.

    Returns:
        Results by optimizer and by learning rate, which doubles from one to the next.
    """
    results = {}
    for name, first in PAPER_LR.items():
        short = Config(name, first, max(2, scale.powers // 4), width=scale.width)
        scan = {n: run(replace(short, lr=first * 4.0**n)) for n in (0, 1, 2)}
        # At most three more, until the best has a neighbour on both sides.
        for _ in range(3):
            centre = _place(scan)
            if beyond := {centre - 1, centre + 1} - set(scan):
                scan |= {n: run(replace(short, lr=first * 4.0**n)) for n in beyond}
        lr = first * 4.0 ** _place(scan)
        rates = [lr * 2.0**n for n in (-2, -1, 0, 1, 2)]
        results[name] = {lr: run(replace(short, lr=lr, steps=scale.powers)) for lr in rates}
    return results


def _place(scan: dict[int, Result]) -> int:
    found = best(list(scan.values()))
    return next(n for n, result in scan.items() if result is found)


def adamw(run: Run, config: Config) -> Config:
    """Choose the learning rate of AdamW that is best after a quarter of the steps; return the config with it."""
    config = replace(config, optimizer="adamw", weight_decay=DECAY)
    tried = [replace(config, lr=lr, steps=max(2, config.steps // 4), record_every=0) for lr in ADAMW_LR]
    return replace(config, lr=best([run(each) for each in tried])["config"]["lr"])


def _variants(run: Run, of_adamw: Config) -> dict[str, Result]:
    """Train by AdamW, and by Muon with and without decay at AdamW's learning rate, as in [1]."""
    return {
        name: run(replace(of_adamw, optimizer=optimizer, weight_decay=decay))
        for name, (optimizer, decay) in VARIANTS.items()
    }


def _dense(scale: Scale) -> list[Config]:
    size = active(model(Config("adamw", 0.0, 0, width=scale.width)))
    configs = [Config("adamw", 0.0, 0, width=width, layers=layers) for width, layers in scale.sizes]
    return [replace(config, steps=max(2, scale.steps * active(model(config)) // size)) for config in configs]


def _mixture(scale: Scale) -> Config:
    return Config(
        "adamw", 0.0, scale.steps, width=scale.width, experts=scale.experts, record_every=max(1, scale.steps // 6)
    )


def scaling(run: Run, scale: Scale) -> list[dict[str, Result]]:
    """Train dense models and a mixture of experts; return results by size and variant, the mixture last."""
    configs = [*_dense(scale), _mixture(scale)]
    return [_variants(run, adamw(run, config)) for config in configs]


def over_trained(run: Run, scale: Scale) -> dict[str, Result]:
    """Train the smallest model on many more tokens than its share, where [1] found decay to pay; by variant."""
    config = adamw(run, _dense(scale)[0])
    return _variants(run, replace(config, steps=config.steps * scale.over))


def finetune(run: Run, scale: Scale) -> dict[tuple[str, str], list[dict[float, Result]]]:
    """Pretrain on source code and fine-tune on prose, by the same optimizer and by the other.

    Returns:
        For each pair of optimizers a list by seed, of results by learning rate.
    """
    lr = adamw(run, Config("adamw", 0.0, scale.steps, width=scale.width)).lr
    results: dict[tuple[str, str], list[dict[float, Result]]] = {}
    for seed in scale.seeds:
        for before in ("muon", "adamw"):
            start = Config(before, lr, scale.steps, DECAY, scale.width, text="code", seed=seed)
            run(start)
            for after in ("muon", "adamw"):
                config = replace(start, optimizer=after, steps=max(2, scale.steps // 3), text="prose", start=start)
                rates = [lr * 4.0**n for n in (-2, -1, 0, 1, 2)]
                by_rate = {rate: run(replace(config, lr=rate)) for rate in rates}
                results.setdefault((before, after), []).append(by_rate)
    return results


def entropy(run: Run, scale: Scale) -> dict[str, Result]:
    """Return the mixture of experts of the scaling comparison, whose spectra are recorded, by variant."""
    return _variants(run, adamw(run, _mixture(scale)))


def clip(run: Run, scale: Scale) -> dict[float, dict[float, Result]]:
    """Train by Muon with and without QK-Clip, and without weight decay, which would hold logits too.

    Returns:
        Results by learning rate and by tau, which is 0 for no clipping.
    """
    configs = {lr: Config("muon", lr, scale.steps, width=scale.width) for lr in CLIP_LR}
    return {lr: {tau: run(replace(config, tau=tau)) for tau in (0.0, TAU)} for lr, config in configs.items()}
