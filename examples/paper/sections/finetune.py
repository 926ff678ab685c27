"""Fine-tuning by the optimizer of pretraining and by the other, after table 6 of [1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import SHARES, Finetuned, Scale
from intervals import Claim, estimate, paired, verdicts

from .shared import BLUE, ORANGE, figure, losses, spread, table

# Table 6 of [1], by the optimizers of pretraining and of fine-tuning: MMLU, HumanEval, MBPP, GSM8K.
PAPER = {
    ("muon", "muon"): (55.7, 57.3, 55.6, 68.0),
    ("adamw", "muon"): (55.3, 53.7, 55.5, 62.1),
    ("muon", "adamw"): (50.2, 52.4, 55.2, 64.9),
    ("adamw", "adamw"): (52.0, 53.1, 55.2, 64.6),
}
NAMES = {"muon": "Muon", "adamw": "AdamW"}
COLORS = {"muon": BLUE, "adamw": ORANGE}
MARKERS = {"muon": "o", "adamw": "s"}
FILLS = {"best": "full", "gentle": "none"}

Found = dict[tuple[str, str], Finetuned]


def show(found: Found, scale: Scale, figures: Path) -> Iterator[str]:
    """Show the losses on both texts, after fine-tuning at the best rate and at a gentle one."""
    of = found["muon", "muon"].after["best"][0]
    config = of["config"]
    yield (
        f"Pretrained for {config['start']['steps']} steps on the standard library's sources, fine-tuned for "
        f"{config['steps']} on the language reference's prose ({of['passes']:.1f} passes over the part that is not "
        f"held out), as table 6 of [1] matches and crosses optimizers. Losses are of {config['held_out'] / 1e3:.0f} kB "
        "of held-out prose, and of as much held-out source code, which shows what is forgotten. Rates are "
        "one for all parameters, tuned for the loss on prose; "
        f"the gentle one is {SHARES['gentle']:g} of the best. Rows of another pretraining start "
        "from another model.\n\n"
    )
    yield _figure(found, figures) + _table(found)
    yield verdicts(_claims(found))


def _figure(found: Found, figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        for axes, before in zip(panels, NAMES, strict=True):
            for after in NAMES:
                for share, fill in FILLS.items():
                    seeds = found[before, after].after[share]
                    x, y = (estimate(losses(seeds, text)) for text in ("code", "prose"))
                    label = f"by {NAMES[after]}, {share} rate"
                    style = {"color": COLORS[after], "marker": MARKERS[after], "fillstyle": fill, "markersize": 9}
                    axes.errorbar(x.mean, y.mean, xerr=x.sd, yerr=y.sd, linestyle="", label=label, capsize=3, **style)
            axes.set(xlabel="held-out loss on code, nats per byte", ylabel="held-out loss on prose, nats per byte")

    return figure(figures / "finetune.png", [f"pretrained by {name}, ± sd" for name in NAMES.values()], draw)


def _table(found: Found) -> str:
    rows = []
    for before in NAMES:
        start = found[before, "muon"].before
        rows.append([f"{NAMES[before]}, before", "", "", spread(losses(start)), "", "", ""])
        for after in NAMES:
            cell = found[before, after]
            cells = [spread(losses(cell.after[share], text)) for share in SHARES for text in ("prose", "code")]
            lr = f"{cell.after['best'][0]['config']['lr']:.3g}"
            paper = f"{fmean(PAPER[before, after]):.2f}"
            rows.append([f"{NAMES[before]}, then {NAMES[after]}", lr, *cells, paper])
    heading = ["optimizers", "best lr", *(f"{share}: {text}" for share in SHARES for text in ("prose", "code"))]
    return (
        table([*heading, "[1], more is better"], rows)
        + "\nThe column of [1] is the mean of MMLU, HumanEval, MBPP and GSM8K.\n"
    )


def _lead(found: Found, before: str) -> list[float]:
    """Return by seed how far fine-tuning by Muon is ahead of that by AdamW, in nats on prose."""
    muon, adamw = (losses(found[before, after].after["best"], "prose") for after in NAMES)
    return [b - a for a, b in zip(muon, adamw, strict=True)]


def _forgot(found: Found, before: str, after: str) -> list[float]:
    cell = found[before, after]
    return [x - y for x, y in zip(losses(cell.after["best"], "code"), losses(cell.before), strict=True)]


def _claims(found: Found) -> list[Claim]:
    after_muon, after_adamw = (_lead(found, before) for before in NAMES)
    forgot = paired(_forgot(found, "muon", "muon"), _forgot(found, "muon", "adamw"))
    return [
        Claim("after Muon, fine-tuning by Muon is better than by AdamW", estimate(after_muon), 1),
        Claim("Muon's lead in fine-tuning is smaller after AdamW", paired(after_muon, after_adamw), 1),
        Claim("[ours] after Muon, fine-tuning by Muon forgets less of the code", forgot, -1),
    ]
