"""Writer of REPORT.md and its figures, from results.jsonl alone. Only the papers' numbers are typed by hand.

    python examples/paper/report.py

run.py calls it after the trainings. Alone it takes seconds, to see a change of the text or of a figure.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import arguments
import estimate
import words
from configs import Result, active
from experiments import EXPERIMENTS, SCALES, TUNING, Scale
from intervals import OPEN, OPPOSITE, REPRODUCED, RULE
from results import Results
from sections import accuracy, clip, decay, entropy, finetune, powers, rms, scaling
from sections.shared import table

SECTIONS: dict[str, tuple[str, Callable[[Any, Scale, Path], Iterator[str]]]] = {
    "powers": ("Powers of the spectrum, against the learning rate", powers.show),
    "scaling": ("Muon and AdamW at compute-optimal lengths", scaling.show),
    "decay": ("Weight decay in the over-trained regime", decay.show),
    "rms": ("The RMS of updates", rms.show),
    "accuracy": ("Powers of recorded matrices, beside the authors' iteration", accuracy.show),
    "finetune": ("Fine-tuning by the optimizer of pretraining and by the other", finetune.show),
    "entropy": ("SVD entropy of the weights", entropy.show),
    "clip": ("QK-Clip where attention logits grow", clip.show),
}

INTRODUCTION = """\
# Three papers' claims, at a size for a laptop

[1] "Muon is Scalable for LLM Training", arXiv 2502.16982. [2] "Delving into Muon and Beyond", arXiv 2602.04669.
[3] "Kimi K2", arXiv 2507.20534.

`python examples/paper/report.py` writes this page and its figures from results.jsonl, which
`python examples/paper/run.py` makes; an interrupted run goes on where it was. No number is typed but the papers', and
they are marked so. Losses are nats per byte of held-out documents, mean ± standard deviation over {count} seeds; bands
are the same. Times are as they came, on a machine that may have had other work.

## How it is judged

{rule}

A claim marked [ours] is of this project, not of a paper.

Learning rates are chosen on a seed of their own ({tuning}), at the full length at which they are used, among powers of
two times a first guess, until neither half nor double of the best is better. What is reported is of other seeds, so
that no rate is better for the luck of the seed that chose it.
"""

INCOMPLETE = "\n**{done} of {of} sections complete.** The rest waits for trainings.\n"

LIMITS = """
## What runs of this size can show, and what not

The model is the demo's byte-level GPT with {widths} channels, thousands of times smaller than the papers', its text
the language reference and the standard library of the Python that runs it, a step {tokens} bytes. Losses cannot be
compared with the papers' nats per token.

They can show whether the optimizers do what they are meant to: that each trains and over which learning rates, whether
one that suits AdamW suits Muon with "match_rms_adamw", how the best one moves with the power, how flat spectra stay.
Where an interval excludes 0, the difference is there, for this model, this text and this length of training.

They cannot show what the papers claim of large models. Sizes within a decade of parameters say nothing of billions,
whatever the interval of an exponent; fine-tuning on another kind of text is not instruction tuning, and reinforcement
learning was not tried; momenta, warm-up and initialisation are torch's or the papers' defaults and nobody's best. Short
contexts and small batches are noisy, which helps methods that average and normalise.

## What a GPU would add

The same comparisons are ready for models of {least:.1f} to {most:.0f} million parameters in the layers, on a text that
one brings:

```
python examples/paper/run.py --size 10m --text corpus.txt --out /tmp/10m --estimate
python examples/paper/run.py --size 10m --text corpus.txt --out /tmp/10m
```

| size | models, millions of parameters in the layers | trainings | compute, EFLOP | days at 100 TFLOP/s |
| --- | --: | --: | --: | --: |
{sizes}

Compute is of layers, heads and Muon's iterations, without those of the powers; the number of trainings is a guess,
since rates are searched. With `--size 10m` the law has {decades:.1f} decades of compute to hold on, contexts are of
some words, and batches have less noise. `--bytes` makes trainings shorter: fewer bytes a parameter.
"""


def _gpu() -> dict[str, Any]:
    """Return what the last section says of the sizes for GPUs."""
    rows, every = [], []
    for name in ("10m", "124m"):
        scale = SCALES[name]
        tasks = list(dict.fromkeys(task for tasks in estimate.plan(scale).values() for task in tasks))
        millions = [active(*size) / 1e6 for size in scale.sizes]
        every += millions
        total = estimate.flop(tasks)
        days = total / 1e14 / 86400
        cells = [", ".join(f"{n:.1f}" for n in millions), str(len(tasks)), f"{total / 1e18:.3g}"]
        rows.append(f"| {' | '.join([name, *cells, f'{days:.2f}' if days < 1 else f'{days:.0f}'])} |")
    most, least = (estimate.flop([SCALES["10m"].config("adamw", 1.0, of(SCALES["10m"].sizes))]) for of in (max, min))
    return {"sizes": "\n".join(rows), "least": min(every), "most": max(every), "decades": math.log10(most / least)}


def write(out: Path, scale: Scale) -> None:
    """Write REPORT.md and figures/ to `out`, of the experiments whose results `out`/results.jsonl has all.

    Into the folder of this file it is written together with the docs' sentences that have numbers of it.

    Raises:
        ValueError: results.jsonl is of another format.
    """
    results = Results(out / "results.jsonl")
    page: list[str] = []
    counts: dict[str, list[int]] = {}
    for name, (title, show) in SECTIONS.items():
        used: dict[int, Result] = {}

        def run(tasks: Sequence[Any], used: dict[int, Result] = used) -> list[Result]:
            found = results(tasks)
            used |= {id(result): result for result in found}
            return found

        page.append(f"\n## {title}\n\n`python examples/paper/run.py {name}`")
        try:
            found = EXPERIMENTS[name](run, scale)
        except LookupError:
            page.append(": not complete yet.\n")
            continue
        except RuntimeError as error:  # of the search of a rate
            page.append(f": not complete, {error}.\n")
            continue
        text = "".join(show(found, scale, out / "figures"))
        page += [_cost(list(used.values())), text]
        counts[title] = [len(_claims(text, judged)) for judged in (REPRODUCED, OPPOSITE, OPEN)]
    widths = f"{min(scale.sizes)[0]} to {max(scale.sizes)[0]}"
    page.append(LIMITS.format(widths=widths, tokens=scale.context * scale.batch, **_gpu()))
    introduction = INTRODUCTION.format(count=len(scale.seeds), rule=RULE, tuning=TUNING)
    left = "" if len(counts) == len(SECTIONS) else INCOMPLETE.format(done=len(counts), of=len(SECTIONS))
    (out / "REPORT.md").write_text("".join([introduction, left, _summary(counts), *page]))
    if out == arguments.HERE:
        words.write(results, scale)


def _claims(text: str, judged: str) -> list[str]:
    """Return the papers' claims that a section judges so."""
    return [words for words in re.findall(rf"([^;.]+): \*\*{judged}\*\*", text) if "[ours]" not in words]


def _summary(counts: dict[str, list[int]]) -> str:
    """Return a table of how many claims of each section are judged how."""
    if not counts:
        return ""
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [[title, *map(str, of)] for title, of in [*counts.items(), ("all", total)]]
    return "\n" + table(["the papers' claims", REPRODUCED, OPPOSITE, OPEN], rows)


def _cost(used: Sequence[Result]) -> str:
    trainings = [result for result in used if "seconds" in result]
    hours = sum(result["seconds"] for result in trainings) / 3600
    machines = " and ".join(dict.fromkeys(result["machine"] for result in trainings))
    others = f", {len(used) - len(trainings)} measurements" if len(used) > len(trainings) else ""
    time = f", {hours:.2f} core hours on {machines}" if trainings else ""
    return f": {len(trainings)} trainings{others}{time}.\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add(parser)
    scale, out = arguments.scale_and_folder(parser, parser.parse_args())
    write(out, scale)


if __name__ == "__main__":
    main()
