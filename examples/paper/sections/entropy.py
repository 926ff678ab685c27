"""SVD entropy of the weights of a mixture of experts, after figure 4 of [1]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from configs import Result, loss
from experiments import Entropy, Scale, Seeds
from intervals import Claim, estimate, paired, verdicts

from .decay import STYLES
from .shared import band, figure, interval, legend, losses, mean_rows, number, spread, table

ROUTER = "layers.*.mlp.router.weight"
SHARE = 0.9  # of matrices, in [1]


def show(found: Entropy, scale: Scale, figures: Path) -> Iterator[str]:
    """Show entropies by group over the steps and at the end, what AdamW's rate does to them, and the experts' loads."""
    config = found.variants["Muon"][0]["config"]
    rates = ", ".join(f"{name} {seeds[0]['config']['lr']:.3g}" for name, seeds in found.variants.items())
    yield (
        f"A mixture with {config['experts']} routed experts a layer, of which a byte meets two, and a shared one, "
        f"{config['width']} wide, {config['steps']} steps. Rates, one for all parameters, tuned but for Muon without "
        "decay, which has Muon's: "
        f"{rates}. Experts are matrices of their own; fused projections are taken as the one matrix that they are "
        "stored as. Both optimizers start at the same weights.\n\n"
    )
    yield _figure(found, figures) + _table(found)
    yield verdicts(_claims(found))
    yield "\n### AdamW's learning rate decides the gap\n\n" + _by_rate(found)
    yield "\n### Loads of the experts\n\n" + _loads(found)


def _groups(found: Entropy) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in found.variants["Muon"][0]["spectra"]))


def _means(result: Result, **wanted: Any) -> dict[int, float]:
    """Return by step the mean entropy of matrices, of those that had any."""
    rows = [row for row in result["spectra"] if row["svd_entropy"] is not None]
    return mean_rows({"spectra": rows}, lambda row: float(row["svd_entropy"]), **wanted)


def _end(result: Result, **wanted: Any) -> float:
    """Return the mean entropy after the last recorded step, NaN if the training diverged."""
    return math.nan if math.isinf(loss(result)) else list(_means(result, **wanted).values())[-1]


def _by_step(seeds: Seeds, group: str) -> dict[int, list[float]]:
    by_step: dict[int, list[float]] = {}
    for result in seeds:
        for step, value in _means(result, group=group).items():
            by_step.setdefault(step, []).append(value)
    return by_step


def _figure(found: Entropy, figures: Path) -> str:
    groups = _groups(found)

    def draw(panels: Sequence[Any]) -> None:
        for axes, group in zip(panels, groups, strict=True):
            for name, seeds in found.variants.items():
                by_step = _by_step(seeds, group)
                band(axes, list(by_step), [estimate(x) for x in by_step.values()], name, **STYLES[name])
            axes.set(xlabel="step", ylabel="SVD entropy")
        legend(panels[0])

    titles = [group.removeprefix("layers.*.").removesuffix(".weight") for group in groups]
    return figure(figures / "entropy.png", titles, draw, 4, (3.9, 3.4), legends=False)


def _last(seeds: Seeds, group: str) -> list[float]:
    return [_end(result, group=group) for result in seeds]


def higher(found: Entropy, group: str | None = None) -> list[list[bool]]:
    """Return by seed whether Muon's entropy is higher than AdamW's, for each matrix after the last recorded step.

    Of a seed with which one of them diverged it returns none.
    """

    def final(result: Result) -> dict[tuple[str, int], float]:
        last = max(row["step"] for row in result["spectra"])
        rows = [row for row in result["spectra"] if row["step"] == last and group in (None, row["group"])]
        return {(row["name"], row["index"]): row["svd_entropy"] for row in rows}

    judged = []
    for pair in zip(found.variants["Muon"], found.variants["AdamW"], strict=True):
        muon, adamw = ({} if any(map(math.isinf, map(loss, pair))) else final(of) for of in pair)
        judged.append([muon[place] > adamw[place] for place in muon])
    return judged


def _gap(found: Entropy, group: str) -> list[float]:
    muon, adamw = (_last(found.variants[name], group) for name in ("Muon", "AdamW"))
    return [a - b for a, b in zip(muon, adamw, strict=True)]


def _table(found: Entropy) -> str:
    rows = []
    for group in _groups(found):
        means = [spread(_last(found.variants[name], group)) for name in ("Muon", "AdamW")]
        each = [matrix for seed in higher(found, group) for matrix in seed]
        rows.append([group, *means, interval(estimate(_gap(found, group))), f"{sum(each)} of {len(each)}"])
    every = [spread(losses(found.variants[name])) for name in ("Muon", "AdamW")]
    rows.append(["held-out loss", *every, "", ""])
    return table(["matrices", "Muon", "AdamW", "difference, 95 %", "Muon's is higher, all seeds"], rows)


def _claims(found: Entropy) -> list[Claim]:
    groups = _groups(found)
    shares = [fmean(seed) - SHARE if seed else math.nan for seed in higher(found)]
    gaps = {group: _gap(found, group) for group in groups}
    mean = [fmean(of_seed) for of_seed in zip(*gaps.values(), strict=True)]
    others = [fmean(of_seed) for of_seed in zip(*(gaps[g] for g in groups if g != ROUTER), strict=True)]
    return [
        Claim("Muon's entropy is higher, mean of the groups", estimate(mean), 1, ""),
        Claim(f"it is for more than {SHARE:.0%} of the matrices", estimate(shares), 1, ""),
        Claim("the gap is wider for routers than for others", paired(gaps[ROUTER], others), 1, ""),
    ]


def _by_rate(found: Entropy) -> str:
    """Show the entropies of the search of AdamW's rate, a seed that is not among the others'."""
    rows = []
    for result in sorted(found.rates, key=lambda of: of["config"]["lr"]):
        ends = (number(_end(result)), number(_end(result, group=ROUTER)))
        rows.append([f"{result['config']['lr']:.3g}", number(loss(result)), *ends])
    ours = [_end(result) for result in found.variants["Muon"]]
    return table(["AdamW's lr", "held-out loss", "entropy, mean of all matrices", "of routers"], rows) + (
        f"\nOne seed, of the search of the rate. Muon's mean is {spread(ours)} over the seeds. "
        "No claim of a paper is judged by this table.\n"
    )


def _loads(found: Entropy) -> str:
    rows = []
    for name, seeds in found.variants.items():
        layers = [layer for result in seeds for layer in result["loads"]]
        least, most = min(map(min, layers)), max(map(max, layers))
        unused = sum(share < 0.1 / len(layer) for layer in layers for share in layer)
        ratio = [max(layer) * len(layer) for layer in layers]
        rows.append([name, f"{least:.1%}", f"{most:.1%}", spread(ratio, ".2f"), str(unused)])
    experts = found.variants["Muon"][0]["config"]["experts"]
    heading = [
        "optimizer",
        "least of any",
        "most of any",
        "most, as a multiple of even",
        "experts below a tenth of even",
    ]
    return (
        (
            f"Shares of the choices for the held-out text, nothing balances them: {1 / experts:.1%} would be even. "
            "Over all layers and seeds. An expert that is not used would keep the spectrum of its initialisation.\n\n"
        )
        + table(heading, rows)
        + "\nThe papers give no loads of such a mixture; no claim is judged by this table.\n"
    )
