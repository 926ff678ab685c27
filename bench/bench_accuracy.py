"""Relative Frobenius error of orthogonalize and of torch's bf16 loop against float64, for every set and spectrum.

The spectra are those of muon_kernels/checks/matrices.py; "gaussian" is that of a square Gaussian matrix, which is
harder than a wide one's. Ours is the backend that "auto" takes.

    python bench/bench_accuracy.py [name of a coefficient set ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from test_newton_schulz import relative_error

from muon_kernels import COEFFICIENTS, orthogonalize
from muon_kernels.checks.matrices import SPECTRA, factors, spectral_truth
from muon_kernels.checks.yardsticks import bf16_loop
from muon_kernels.coefficients import resolve

M, N = 256, 1024


def table(name: str) -> str:
    """Return a table of errors in percent, torch's loop and ours, with a column for every spectrum."""
    schedule = resolve(name, None)
    spectra = [s for s in SPECTRA if s != "zero"]
    torchs, ours, halves = [], [], []
    for spectrum in spectra:
        U, s, V = factors(spectrum, M, N, (1,))
        G = ((U * s) @ V.mT).float()
        truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
        torchs.append(relative_error(bf16_loop(G, schedule), truth))
        ours.append(relative_error(orthogonalize(G, name, None), truth))
        halves.append(relative_error(orthogonalize(G, name, None, workspace_dtype=torch.float16), truth))

    def row(label: str, errors: list[float]) -> str:
        return f"| {label} | " + " | ".join(f"{100 * e:.1f} %" for e in errors) + " |"

    head = f"| {name} | " + " | ".join(spectra) + " |"
    rows = row("torch's loop", torchs), row("ours", ours), row("ours, fp16 workspace", halves)
    return "\n".join([head, "|---" * (len(spectra) + 1) + "|", *rows])


if __name__ == "__main__":
    for name in sys.argv[1:] or COEFFICIENTS:
        print(table(name) + "\n")
