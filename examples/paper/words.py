"""Sentences of the docs whose numbers are of trainings, written from results.jsonl.

They stand between `<!-- paper: NAME -->` and `<!-- end -->`, and `report.py` rewrites them; tests/test_paper_report.py
tells which are stale.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

from configs import Run
from experiments import BOTH, MUON, ONE, TAKEN, TWO, Scale, accuracy, entropy, rms, scaling
from intervals import paired
from sections.entropy import higher
from sections.rms import mean_size
from sections.scaling import mean_of_sizes
from sections.shared import interval, number

ROOT = Path(__file__).parents[2]
WIDTH = 138  # of lines of the docs


def _accuracy(run: Run, scale: Scale) -> str:
    rows = [row for seeds in accuracy(run, scale).values() for result in seeds for row in result["errors"]]
    _, ours, theirs, below = zip(*rows, strict=True)
    return (
        f"Of momenta and of Adam's updates, recorded in small trainings, the power is off by {median(ours):.1%} in the "
        f"median and {max(ours):.1%} at worst (relative, in the Frobenius norm), the authors' coupled iteration by "
        f"{median(theirs):.1%} and {max(theirs):.1%}. Below a thousandth of the largest are {fmean(below):.0%} of the "
        f"singular values in the mean of the matrices, and {max(below):.0%} in the worst."
    )


def _rates(run: Run, scale: Scale) -> str:
    of = scaling(run, scale)
    taken, both, own, one, two = (mean_of_sizes(of, name) for name in (TAKEN, BOTH, MUON, ONE, TWO))
    adamw, muon = (fmean(mean_size(rms(run, scale).targets[target])) for target in (None, 0.2))
    leads = [interval(paired(*pair), "+.3f") for pair in ((one, taken), (own, both), (two, own))]
    return (
        f"In small trainings AdamW's updates had RMS {number(adamw)}·`lr` and Muon's {number(muon)}·`lr`. AdamW's loss "
        f"less that of Muon at AdamW's rate was {leads[0]} nats a byte, with one rate for all parameters. With a "
        f"second one for embeddings and head, the same for both, Muon's loss at a rate of its own for matrices less "
        f"that at AdamW's was {leads[1]}, and AdamW's less that of Muon at its own rate {leads[2]} (means over "
        f"{len(of)} sizes, 95 % intervals in brackets)."
    )


def _entropy(run: Run, scale: Scale) -> str:
    each = [matrix for seed in higher(entropy(run, scale)) for matrix in seed]
    return (
        "In a small mixture of experts, each optimizer at its best rate, one for all parameters, Muon's entropy was "
        f"the higher one in {sum(each)} of {len(each)} matrices."
    )


# By page, and by name of the block in it.
BLOCKS: dict[str, dict[str, Callable[[Run, Scale], str]]] = {
    "docs/powers.md": {"accuracy": _accuracy},
    "docs/options.md": {"rates": _rates},
    "docs/spectra.md": {"entropy": _entropy},
}


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- paper: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def written(page: str, text: str, run: Run, scale: Scale) -> str:
    """Return the text of a page with its blocks as the results have it; one whose results are not complete stays.

    Raises:
        ValueError: the page lacks a block.
    """
    for name, sentence in BLOCKS[page].items():
        if not _place(name).search(text):
            raise ValueError(f"{page} should have a block <!-- paper: {name} --> ... <!-- end --> but has none")
        try:
            words = textwrap.fill(sentence(run, scale), WIDTH) + "\n"
        except (LookupError, RuntimeError):  # as in `report.write`
            continue
        text = _place(name).sub(lambda _, words=words: words, text)
    return text


def write(run: Run, scale: Scale) -> None:
    """Rewrite the blocks of all pages."""
    for page in BLOCKS:
        path = ROOT / page
        path.write_text(written(page, path.read_text(), run, scale))
