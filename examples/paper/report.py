"""Writer of REPORT.md and its figures, from results.jsonl alone. Only the papers' numbers are typed by hand.

    python examples/paper/report.py

run.py calls it after the trainings. Alone it takes seconds, to see a change of the text or of a figure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import experiments
import torch
from harness import TOKENS, Config, Result, Results, best, loss

from muon_kernels import spectra

HERE = Path(__file__).parent

# Best final losses in [2], of GPT-2 124M and 100 billion tokens of OpenWebText (github.com/Ocram7/BeyondMuon).
PAPER_LOSS = {
    "msgd": 3.092,
    "msgd_s": 2.895,
    "msgd_q": 2.876,
    "msgd_z": 2.887,
    "adam": 2.871,
    "adam_s": 2.870,
    "adam_q": 2.872,
    "adam_z": 2.879,
}

# Table 6 of [1], by the optimizers of pretraining and of fine-tuning: MMLU, HumanEval, MBPP, GSM8K.
PAPER_SFT = {
    ("muon", "muon"): (55.7, 57.3, 55.6, 68.0),
    ("adamw", "muon"): (55.3, 53.7, 55.5, 62.1),
    ("muon", "adamw"): (50.2, 52.4, 55.2, 64.9),
    ("adamw", "adamw"): (52.0, 53.1, 55.2, 64.6),
}

# Okabe and Ito's colours, by power and by variant.
POWERS = {"": "1", "_s": "1/2", "_q": "1/4", "_z": "0"}
POWER_STYLES: dict[str, dict[str, Any]] = {
    "": {"color": "#6b6b6b", "marker": "o", "linestyle": "-"},
    "_s": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "_q": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "_z": {"color": "#0072B2", "marker": "D", "linestyle": "-"},
}
VARIANT_STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "Muon": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "Muon without decay": {"color": "#009E73", "marker": "^", "linestyle": ":"},
}
FAMILIES = {"msgd": "momentum (mSGD)", "adam": "RMS-normalised (Adam)"}

INTRODUCTION = """\
# Three papers' claims, at a size for a laptop

[1] "Muon is Scalable for LLM Training", arXiv 2502.16982. [2] "Delving into Muon and Beyond", arXiv 2602.04669.
[3] "Kimi K2", arXiv 2507.20534.

`python examples/paper/report.py` writes this page and its figures from results.jsonl, which
`python examples/paper/run.py all` makes; an interrupted run goes on where it was. Numbers of the papers are marked so.
Times are as they came, on a machine that may have had other work; what several comparisons need counts in each.
"""

LIMITS = """\
## What runs of this size can show, and what not

The model is the demo's byte-level GPT with {width} channels, a thousand times smaller than the papers', its text the
language reference and the standard library of the Python that runs it, a step {tokens} bytes. Losses are nats per byte
of held-out documents, and cannot be compared with the papers' nats per token.

They can show whether the optimizers do what they are meant to: that each trains and over which learning rates, whether
one that suits AdamW suits Muon with "match_rms_adamw", how the best one moves with the power, how flat spectra stay.
Where one method is better than another by tenths of a nat, it is, for this model and this length of training.

They cannot show what the papers claim of large models: exponents of scaling laws from three sizes within a decade of
parameters say nothing of billions; weight decay pays after long training; fine-tuning on another kind of text is not
instruction tuning. Learning rates are chosen in shorter runs than they are used in, and may be too large for long ones;
momenta and warm-up are nobody's best. Every number is of one seed but for fine-tuning, whose table shows what two seeds
differ by: smaller differences than that, in any table, mean nothing. Short contexts and small batches are noisy, which
helps methods that average and normalise.
"""


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table as Markdown, whose first column is of words and whose others are of numbers."""
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float | None) -> str:
    return "diverged" if x is None or not math.isfinite(x) else f"{x:.3f}"


def figure(path: Path, titles: Sequence[str], draw: Callable[[Sequence[Any]], object], sharey: bool = False) -> None:
    """Save a row of panels, which `draw` fills."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figures need matplotlib; install it with: pip install 'muon-kernels[demo]', then "
            "python examples/paper/report.py: the trainings are kept",
            name="matplotlib",
        ) from error
    picture = Figure(figsize=(5.2 * len(titles), 4.0), layout="constrained", dpi=110)
    panels = picture.subplots(1, len(titles), squeeze=False, sharey=sharey)[0]
    draw(panels)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    picture.savefig(path)


def powers(results: dict[str, dict[float, Result]], figures: Path) -> Iterator[str]:
    losses = {name: [loss(result) for result in by_rate.values()] for name, by_rate in results.items()}
    spread = {name: max(each) - min(each) for name, each in losses.items()}

    def draw(panels: Sequence[Any]) -> None:
        for axes, family in zip(panels, FAMILIES, strict=True):
            for suffix, power in POWERS.items():
                name = family + suffix
                axes.plot(list(results[name]), losses[name], label=f"{name}, p = {power}", **POWER_STYLES[suffix])
            axes.set(xscale="log", xlabel="learning rate of the matrices")
        finite = [x for each in losses.values() for x in each if math.isfinite(x)]
        # Losses that explode are cut off: they would flatten all others to a line.
        panels[0].set(
            ylabel="held-out loss, nats per byte", ylim=(min(finite) - 0.03, min(max(finite), min(finite) + 1) + 0.03)
        )

    figure(figures / "powers.png", list(FAMILIES.values()), draw, sharey=True)
    of = next(iter(results["adam"].values()))
    yield (
        f"The eight optimizers of [2], {of['config']['steps']} steps of {TOKENS} bytes each, {of['active_parameters']} "
        "parameters in the layers, no weight decay. A coarse scan by factors of 4 finds where each is best; around it, "
        "five learning rates, each twice the one before.\n\n![loss against learning rate](figures/powers.png)\n\n"
    )
    rows = []
    for name, each in losses.items():
        middle = list(results[name])[2]
        cells = [f"**{number(x)}**" if x == min(each) else number(x) for x in each]
        rows.append([name, f"{middle:.3g}", *cells, number(spread[name]), f"{PAPER_LOSS[name]:.3f}"])
    factors = ["÷4", "÷2", "×1", "×2", "×4"]
    yield table(["optimizer", "middle lr", *factors, "spread", "best in [2], per token"], rows)
    for family, title in FAMILIES.items():
        of_family = [spread[family + suffix] for suffix in POWERS]
        order = sorted(POWERS, key=lambda suffix: min(losses[family + suffix]))
        yield (
            f"\n{title}: mean spread {number(mean(of_family))}; from best to worst "
            f"{', '.join(f'{family + s} {number(min(losses[family + s]))}' for s in order)}."
        )
    muon, adam = min(losses["msgd_z"]), min(losses["adam"])
    gain, paper_gain = (of["msgd"] - of["msgd_s"] for of in ({n: min(x) for n, x in losses.items()}, PAPER_LOSS))
    yield (
        "\n\nSpread is the largest loss less the smallest, over rates sixteen times apart. msgd_z, which is Muon, "
        f"is {abs(muon - adam):.3f} {'better' if muon < adam else 'worse'} than Adam, each at its best rate; in [2] "
        f"Adam is {PAPER_LOSS['msgd_z'] - PAPER_LOSS['adam']:.3f} better. "
        "There the momentum family gains most by compressed "
        f"spectra: p = 1/2 is {paper_gain:.3f} better than p = 1. Here it is {gain:.3f}.\n"
    )


def compute(result: Result) -> float:
    """Compute of the layers in FLOP, 6·N·tokens, as scaling laws count it."""
    return 6.0 * result["active_parameters"] * result["config"]["steps"] * TOKENS


def law(results: Sequence[Result]) -> tuple[float, float]:
    """Fit a and b of loss = a·C^b, by least squares of logarithms."""
    x = torch.tensor([[1.0, math.log(compute(result))] for result in results], dtype=torch.float64)
    y = torch.tensor([math.log(loss(result)) for result in results], dtype=torch.float64)
    log_a, b = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()
    return math.exp(log_a), b


def scaling(results: list[dict[str, Result]], over: dict[str, Result], figures: Path) -> Iterator[str]:
    *dense, mixture = results
    laws = {name: law([size[name] for size in dense]) for name in experiments.VARIANTS}

    def draw(panels: Sequence[Any]) -> None:
        for name, style in VARIANT_STYLES.items():
            x = [compute(size[name]) for size in dense]
            panels[0].plot(x, [loss(size[name]) for size in dense], **{**style, "linestyle": ""}, label=name)
            a, b = laws[name]
            panels[0].plot(x, [a * c**b for c in x], color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
            panels[0].plot(
                compute(mixture[name]),
                loss(mixture[name]),
                color=style["color"],
                marker="*",
                markersize=12,
                linestyle="",
            )
            curve = [point for point in over[name]["curve"] if point[0] > over[name]["config"]["steps"] / 12]
            panels[1].plot(*zip(*curve, strict=True), **{**style, "markersize": 3}, label=name)
        panels[0].plot([], [], color="black", marker="*", markersize=10, linestyle="", label="mixture of experts")
        panels[0].set(
            xscale="log", yscale="log", xlabel="compute, 6·N·tokens, FLOP", ylabel="held-out loss, nats per byte"
        )
        panels[0].yaxis.set_major_formatter("{x:.1f}")
        panels[0].yaxis.set_minor_formatter("{x:.1f}")
        panels[1].set(xlabel="step", ylabel="training loss, nats per byte, mean of a stretch")

    short, long = loss(dense[0]["AdamW"]), over["AdamW"]["config"]["steps"]
    figure(figures / "scaling.png", ["equal bytes per parameter", f"the smallest model, {long} steps"], draw)
    of = dense[0]["AdamW"]
    yield (
        'Muon with the settings of [1]: weight decay 0.1 and adjust_lr_fn="match_rms_adamw"; the learning rate is the '
        f"best for AdamW, of {len(experiments.ADAMW_LR)} tried for a quarter of the steps, and Muon takes it over. "
        f"Dense models get {of['config']['steps'] * TOKENS / of['active_parameters']:.1f} bytes a parameter. "
        "The mixture of experts has "
        f"{mixture['AdamW']['config']['experts']} routed experts a layer, of which a byte meets two, and a shared "
        "one; its experts are 3-D parameters, N counts what a byte meets.\n\n"
        "![loss against compute](figures/scaling.png)\n\n"
    )
    rows = []
    for title, size in [*[("dense", size) for size in dense], ("mixture", mixture), ("over-trained", over)]:
        first = size["AdamW"]
        rows.append(
            [
                title,
                f"{first['active_parameters'] / 1e3:.0f}k",
                f"{first['config']['steps'] * TOKENS / 1e6:.2f}M",
                f"{compute(first):.1e}",
                f"{first['config']['lr']:.3g}",
                *(number(loss(size[name])) for name in experiments.VARIANTS),
                *(number(size[name]["weight_rms"]) for name in experiments.VARIANTS),
            ]
        )
    names = list(experiments.VARIANTS)
    yield table(
        ["model", "N", "bytes", "FLOP", "lr", *(f"loss, {n}" for n in names), *(f"weight RMS, {n}" for n in names)],
        rows,
    )
    (a, b), (c, d) = laws["AdamW"], laws["Muon"]
    ratios = []
    for size in dense:
        target = loss(size["AdamW"])
        ratios.append((target / c) ** (1 / d) / compute(size["AdamW"]))
    yield (
        f"\nFits: AdamW {a:.3f}·C^{b:.4f}, Muon {c:.3f}·C^{d:.4f} (paper: 2.608·C^-0.054 and 2.506·C^-0.052). By "
        "Muon's, it reaches AdamW's loss of the "
        f"{len(dense)} sizes with {', '.join(f'{ratio:.0%}' for ratio in ratios)} of the compute (paper: 52 %). Decay "
    )
    decayed, plain = loss(over["Muon"]), loss(over["Muon without decay"])
    after = loss(dense[0]["Muon"]) - loss(dense[0]["Muon without decay"])
    yield (
        f"changes Muon's loss by {after:+.3f} in the smallest model and by {decayed - plain:+.3f} after "
        f"{long // of['config']['steps']} times as many steps "
        f"(AdamW goes from {short:.3f} to {loss(over['AdamW']):.3f} there). "
        "In [1], Muon without decay is ahead at first and behind in the over-trained regime. "
    )
    at_end = sum(size["AdamW"]["config"]["lr"] == experiments.ADAMW_LR[-1] for size in results)
    yield (
        f"In {at_end} of {len(results)} cases AdamW's best rate is the largest that was tried, where a larger one may "
        "be better still.\n"
    )


def finetune(results: dict[tuple[str, str], list[dict[float, Result]]], figures: Path) -> Iterator[str]:
    def bests(cell: tuple[str, str]) -> list[Result]:
        return [best(list(by_rate.values())) for by_rate in results[cell]]

    def of(cell: tuple[str, str]) -> list[float]:
        return [loss(result) for result in bests(cell)]

    names = {"muon": "Muon", "adamw": "AdamW"}
    rates = list(results["muon", "muon"][0])
    first = results["muon", "muon"][0][rates[0]]["config"]

    def draw(panels: Sequence[Any]) -> None:
        for before, after in results:
            style = VARIANT_STYLES[names[before]]
            seeds = results[before, after]
            panels[0].plot(
                list(seeds[0]),
                [mean(loss(seed[lr]) for seed in seeds) for lr in seeds[0]],
                color=style["color"],
                marker=VARIANT_STYLES[names[after]]["marker"],
                linestyle=VARIANT_STYLES[names[after]]["linestyle"],
                label=f"{names[before]}, then {names[after]}",
            )
        panels[0].set(xscale="log", xlabel="learning rate of fine-tuning", ylabel="held-out loss, nats per byte")
        panels[0].set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        panels[0].set_xticks([], minor=True)

    figure(figures / "finetune.png", ["pretrained on source code, fine-tuned on prose"], draw)
    yield (
        f"Pretrained for {first['start']['steps']} steps on the standard library's sources, fine-tuned for "
        f"{first['steps']} on the language reference's prose, as table 6 of [1] matches and crosses optimizers. "
        "Rows start from different models: compare within a row. "
        f"Held-out loss on prose at the best of {len(rates)} learning rates, mean of the seeds in brackets.\n\n"
        "![loss against learning rate of fine-tuning](figures/finetune.png)\n\n"
    )
    rows = []
    for before in names:
        cells = [of((before, after)) for after in names]
        rows.append(
            [f"pretrained by {names[before]}"]
            + [f"{number(mean(cell))} ({', '.join(map(number, cell))})" for cell in cells]
            + [f"{mean(PAPER_SFT[before, after]):.2f}" for after in names]
        )
    by = [f"fine-tuned by {name}" for name in names.values()]
    yield table(["", *by, *(f"[1], {words}" for words in by)], rows)
    matched = mean(of(("muon", "muon")) + of(("adamw", "adamw")))
    crossed = mean(of(("muon", "adamw")) + of(("adamw", "muon")))
    at_end = [result["config"]["lr"] in (rates[0], rates[-1]) for cell in results for result in bests(cell)]
    yield (
        f"\nMean of the matched: {number(matched)}, of the crossed: {number(crossed)}. The columns of [1] are means of "
        "MMLU, HumanEval, MBPP and GSM8K, where more is better: there Muon for both is best. "
        f"The best rate is the smallest or the largest that was tried in {sum(at_end)} of {len(at_end)} cases.\n"
    )


def entropy(results: dict[str, Result], figures: Path) -> Iterator[str]:
    rows = {name: results[name]["spectra"] for name in ("Muon", "AdamW")}
    spectra.plot(rows, figures / "entropy.png")
    last = max(row["step"] for row in rows["Muon"])
    final = {
        name: {(row["group"], row["name"], row["index"]): row["svd_entropy"] for row in own if row["step"] == last}
        for name, own in rows.items()
    }
    groups = dict.fromkeys(group for group, *_ in final["Muon"])
    yield (
        "SVD entropy of every matrix of the mixture of experts above, by `spectra.Recorder`; fused projections are "
        "taken as the one matrix that they are stored as.\n\n![SVD entropy](figures/entropy.png)\n\n"
    )
    lines, higher_of_all = [], []
    for group in groups:
        keys = [key for key in final["Muon"] if key[0] == group]
        higher = [final["Muon"][key] > final["AdamW"][key] for key in keys]
        higher_of_all += higher
        means = [mean(final[name][key] for key in keys) for name in final]
        lines.append(
            [group, *(f"{x:.4f}" for x in means), f"{means[0] - means[1]:+.4f}", f"{sum(higher)} of {len(keys)}"]
        )
    yield table(["matrices", "Muon", "AdamW", "difference", "Muon's is higher"], lines)
    yield (
        f"\nAfter {last} steps Muon's is higher for {mean(higher_of_all):.0%} of the matrices. "
        "In [1] it is for over 90 %, and for all groups at all checkpoints; the gap is widest for routers.\n"
    )


def clip(results: dict[float, dict[float, Result]], figures: Path) -> Iterator[str]:
    colours = [POWER_STYLES[suffix]["color"] for suffix in ("_z", "_s", "_q")]
    largest = {lr: {tau: max(x for _, x in of["logits"]) for tau, of in own.items()} for lr, own in results.items()}
    tau = experiments.TAU

    def draw(panels: Sequence[Any]) -> None:
        for (lr, own), color in zip(results.items(), colours, strict=True):
            for each, of in own.items():
                style = {"color": color, "linestyle": "-" if each else "--"}
                # Colours are rates, in the one legend, dashes are without clipping, in the other.
                panels[0].plot(*zip(*of["logits"], strict=True), **style, label=f"lr {lr:g}" if each else None)
                panels[1].plot(*zip(*of["curve"], strict=True), **style)
        for name, line in (("no clipping", "--"), (f"tau {tau:g}", "-")):
            panels[1].plot([], [], color="black", linestyle=line, label=name)
        panels[0].axhline(tau, color="black", linewidth=0.8)
        panels[0].set(yscale="log", xlabel="step", ylabel="largest attention logit of a stretch")
        panels[1].set(xlabel="step", ylabel="training loss, nats per byte, mean of a stretch")

    figure(figures / "clip.png", ["attention logits", "loss"], draw)
    config = results[experiments.CLIP_LR[0]][0.0]["config"]
    yield (
        f"Muon for {config['steps']} steps without weight decay and without normalised queries and keys, at a learning "
        f"rate that suits it and at 4 and 16 times that; with `max_logits` in every forward pass and `qk_clip_` at tau "
        f"= {tau:g} after every step, or without. The largest logit is that of all heads, layers and steps, as the "
        "forward pass has it: before that step's clipping.\n\n"
        "![attention logits and loss](figures/clip.png)\n\n"
    )
    rows = []
    for lr, own in results.items():
        logits = [f"{largest[lr][each]:.4g}" for each in own]
        rows.append([f"{lr:g}", *logits, *(number(loss(of)) for of in own.values())])
    heads = [f"{what}, {how}" for what in ("largest logit", "loss") for how in ("no clipping", f"tau {tau:g}")]
    yield table(["lr", *heads], rows)
    over = [own[tau] / tau for own in largest.values()]
    first = best([of for own in results.values() for of in own.values()])["config"]
    yield (
        f"\nWith clipping the largest logit is {', '.join(f'{x:.2f}' for x in over)} times tau: a step may take it "
        "beyond, before the clipping that follows, which goes by the batch that was seen. Where no logit passes tau, "
        "the two runs are the same to the bit. This shows that without decay logits grow with the learning rate, that "
        "clipping holds them, and what that costs or gains in loss in a model of two layers. It cannot show what [3] "
        "clips for: that logits grow at the learning rate of a well-tuned run and, after many thousands of steps of a "
        f"large model, make its loss leap. The best loss is that at lr {first['lr']:g}"
        f"{', where nothing had to be clipped' if largest[first['lr']][tau] < tau else ''}.\n"
    )


Section = tuple[str, str, Callable[[Callable[[Config], Result], experiments.Scale, Path], Iterator[str]]]
SECTIONS: list[Section] = [
    (
        "powers",
        "Powers of the spectrum, against the learning rate",
        lambda run, scale, figures: powers(experiments.powers(run, scale), figures),
    ),
    (
        "scaling",
        "Muon and AdamW at equal tokens",
        lambda run, scale, figures: scaling(
            experiments.scaling(run, scale), experiments.over_trained(run, scale), figures
        ),
    ),
    (
        "finetune",
        "Fine-tuning by the optimizer of pretraining and by the other",
        lambda run, scale, figures: finetune(experiments.finetune(run, scale), figures),
    ),
    (
        "entropy",
        "SVD entropy of the weights",
        lambda run, scale, figures: entropy(experiments.entropy(run, scale), figures),
    ),
    (
        "clip",
        "QK-Clip where attention logits grow",
        lambda run, scale, figures: clip(experiments.clip(run, scale), figures),
    ),
]


def write(out: Path, scale: experiments.Scale) -> None:
    """Write REPORT.md and figures/ to `out`, of the experiments whose trainings `out`/results.jsonl has all."""
    results = Results(out / "results.jsonl", learn=False)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    page = [INTRODUCTION]
    for name, title, section in SECTIONS:
        used: dict[str, Result] = {}

        def run(config: Config, used: dict[str, Result] = used) -> Result:
            used[repr(config)] = results(config)
            return used[repr(config)]

        try:
            lines = list(section(run, scale, figures))
        except LookupError:
            lines = ["Not complete yet.\n"]
        page.append(f"\n## {title}\n\n`python examples/paper/run.py {name}`")
        if lines[0] != "Not complete yet.\n":
            seconds = sum(result["seconds"] for result in used.values())
            machines = dict.fromkeys(result["machine"] for result in used.values())
            page.append(f": {len(used)} trainings, {seconds / 60:.1f} minutes on {' and '.join(machines)}.")
        page += ["\n\n", *lines]
    page.append("\n" + LIMITS.format(width=scale.width, tokens=TOKENS))
    (out / "REPORT.md").write_text("".join(page))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.jsonl")
    write(parser.parse_args().out, experiments.Scale())
