"""QK-Clip where attention logits grow, after [3]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs import heads
from experiments import TAU, Scale, Seeds
from intervals import Claim, estimate, paired, verdicts

from .shared import BLUE, GREEN, ORANGE, band, end, figure, losses, series, spread, table

COLORS = (BLUE, GREEN, ORANGE)

Found = dict[float, dict[float, Seeds]]


def show(found: Found, scale: Scale, figures: Path) -> Iterator[str]:
    """Show the largest logits and the losses, with and without clipping."""
    config = next(iter(found.values()))[0.0][0]["config"]
    head = config["width"] // heads(config["width"])
    yield (
        f"Muon for {config['steps']} steps without weight decay and without normalised queries and keys, at a learning "
        "rate, one for all parameters, that suits it and at 4 and 16 times that; "
        "with `max_logits` in every forward pass and `qk_clip_` at tau "
        f"= {TAU:g} after every step, or without. [3] has tau 100 for heads of 128; these are {head} wide. The largest "
        "logit is that of all heads, layers and steps, as the forward pass has it: before that step's clipping.\n\n"
    )
    yield _figure(found, figures) + _table(found)
    yield verdicts(_claims(found))
    quiet = [lr for lr, own in found.items() if max(_largest(own[0.0])) < TAU]
    lr = min(found, key=lambda lr: min(estimate(losses(seeds)).mean for seeds in found[lr].values()))
    yield (
        f"\nWhere no logit passes tau, at {', '.join(f'{x:g}' for x in quiet) or 'none of the rates'}, the two runs "
        f"are the same to the bit. The best loss is at lr {lr:g}{', where nothing had to be clipped' * (lr in quiet)}. "
        "This cannot show what [3] clips for: that logits grow at the learning rate of a well-tuned run and, after "
        "many thousands of steps of a large model, make its loss leap.\n"
    )


def _largest(seeds: Seeds) -> list[float]:
    """Return by seed the largest logit of all steps, infinite if the training diverged."""
    return [max([end(of, "logits"), *(math.inf if x is None else x for _, x in of["logits"])]) for of in seeds]


def _figure(found: Found, figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        for (lr, own), color in zip(found.items(), COLORS, strict=True):
            for tau, seeds in own.items():
                style = {"color": color, "linestyle": "-" if tau else "--"}
                # Colours are rates, in the one legend, dashes are without clipping, in the other.
                band(panels[0], *series(seeds, "logits"), f"lr {lr:g}" if tau else None, **style)
                band(panels[1], *series(seeds, "curve"), **style)
        for name, line in (("no clipping", "--"), (f"tau {TAU:g}", "-")):
            panels[1].plot([], [], color="black", linestyle=line, label=name)
        panels[0].axhline(TAU, color="black", linewidth=0.8)
        panels[0].set(yscale="log", xlabel="step", ylabel="largest attention logit")
        panels[1].set(xlabel="step", ylabel="training loss, nats per byte")

    return figure(figures / "clip.png", ["attention logits", "loss"], draw)


def _table(found: Found) -> str:
    rows = []
    for lr, own in found.items():
        largest = [spread(_largest(seeds), ".3g") for seeds in own.values()]
        rows.append([f"{lr:g}", *largest, *(spread(losses(seeds)) for seeds in own.values())])
    heads = [f"{what}, {how}" for what in ("largest logit", "loss") for how in ("no clipping", f"tau {TAU:g}")]
    return table(["lr", *heads], rows)


def _claims(found: Found) -> list[Claim]:
    fast = found[max(found)]
    logits = [[math.log2(x) for x in _largest(fast[tau])] for tau in (TAU, 0.0)]
    return [
        Claim("at the largest rate clipping holds the logits", paired(*logits), -1, " doublings"),
        Claim("[ours] there it makes the loss smaller", paired(losses(fast[TAU]), losses(fast[0.0])), -1),
    ]
