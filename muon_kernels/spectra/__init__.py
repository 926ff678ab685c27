"""Spectra of weights, momenta and updates: numbers of their singular values, records of a training, and pictures.

    recorder = spectra.Recorder(optimizer, model.named_parameters(), every=100)
    ...  # train
    recorder.save("muon.jsonl")
    spectra.plot({"Muon": recorder.rows, "AdamW": spectra.load("adamw.jsonl")}, "entropy.png")

`plot` needs matplotlib; all else needs torch alone.
"""

from .picture import plot
from .quantities import QUANTITIES as QUANTITIES
from .quantities import Summary, condition, effective_rank, rms, stable_rank, summary, svd_entropy
from .recorder import TENSORS as TENSORS
from .recorder import Recorder
from .rows import Row, describe, load, save

__all__ = [
    "Recorder",
    "Row",
    "Summary",
    "condition",
    "describe",
    "effective_rank",
    "load",
    "plot",
    "rms",
    "save",
    "stable_rank",
    "summary",
    "svd_entropy",
]
