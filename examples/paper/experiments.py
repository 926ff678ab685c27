"""The papers' comparisons: which trainings each consists of.

Every function takes `run`, which gives the result of a config, and returns results by what the report's tables and
figures are made of; so the same lines say what is to be trained and what is to be shown.

[1] "Muon is Scalable for LLM Training", arXiv 2502.16982; [2] "Delving into Muon and Beyond", arXiv 2602.04669;
[3] "Kimi K2", arXiv 2507.20534.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness import Config, Result, Run, active, best, model

DECAY = 0.1  # of [1]
ADAMW_LR = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)

# Where to look first: the best of [2] for GPT-2 and 100 billion tokens.
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

# Of QK-Clip's: from a rate that needs none. [3] has 100 for heads of 128, and these are 32 wide.
CLIP_LR = (16e-3, 64e-3, 256e-3)
TAU = 30.0

# Optimizer and weight decay of [1]'s comparisons.
VARIANTS = {"AdamW": ("adamw", DECAY), "Muon": ("muon", DECAY), "Muon without decay": ("muon", 0.0)}


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Args:
        powers: steps of a training of [2]'s comparison.
        steps: of a model of `width` elsewhere; other sizes have as many tokens a parameter.
        width: of all models but those of the scaling law.
        sizes: width and layers of the scaling law's.
        over: how many times as many steps as its share the smallest of them does in the over-trained comparison.
        seeds: of fine-tuning.
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
    """By optimizer of [2] and learning rate, which doubles from one to the next, around the best of a coarse scan."""
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
    """AdamW with the best of these learning rates, each tried for a quarter of the steps."""
    config = replace(config, optimizer="adamw", weight_decay=DECAY)
    tried = [replace(config, lr=lr, steps=max(2, config.steps // 4), record_every=0) for lr in ADAMW_LR]
    return replace(config, lr=best([run(each) for each in tried])["config"]["lr"])


def _variants(run: Run, of_adamw: Config) -> dict[str, Result]:
    """Muon takes over AdamW's learning rate, as in [1]."""
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
    """By size and variant: dense models, then a mixture of experts."""
    configs = [*_dense(scale), _mixture(scale)]
    return [_variants(run, adamw(run, config)) for config in configs]


def over_trained(run: Run, scale: Scale) -> dict[str, Result]:
    """By variant, the smallest model for many more tokens than its share, where [1] found decay to pay."""
    config = adamw(run, _dense(scale)[0])
    return _variants(run, replace(config, steps=config.steps * scale.over))


def finetune(run: Run, scale: Scale) -> dict[tuple[str, str], list[dict[float, Result]]]:
    """By optimizers of pretraining, on source code, and fine-tuning, on prose: for every seed, by learning rate."""
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
    """By variant, the scaling comparison's mixture of experts, of which spectra were recorded."""
    return _variants(run, adamw(run, _mixture(scale)))


def clip(run: Run, scale: Scale) -> dict[float, dict[float, Result]]:
    """By learning rate and by tau, 0 for no clipping: Muon without weight decay, which would hold logits too."""
    configs = {lr: Config("muon", lr, scale.steps, width=scale.width) for lr in CLIP_LR}
    return {lr: {tau: run(replace(config, tau=tau)) for tau in (0.0, TAU)} for lr, config in configs.items()}
