"""Distributed Muon, algorithm 1 of "Muon is Scalable for LLM Training" (arXiv 2502.16982): ZeRO-1 on a flat buffer.

All parameters of a group follow one another in a flat buffer, see flat.py. Each rank keeps the state, and the fp32
master copy, of an equal slice of it, wherever that begins and ends. In a step

    gradients are reduced and scattered in fp32        4 bytes an element to send
    the slices' momenta are updated
    matrices are gathered in bf16                      2 bytes an element of those that a slice boundary divides
    whole matrices go through Newton-Schulz, and all but the slice of the result is dropped
    the slices of the parameters are updated
    parameters are gathered                            2 or 4 bytes an element

each times (k-1)/k for k ranks. The paper gathers all matrices on every rank. Here a rank gathers only those of which
its slice has elements, so that the others are sent nowhere and orthogonalized once. AdamW goes element by element, and
so does Muon with power 1: then no matrices are gathered. `Muon`, in contrast, sends no gradients, which have been
averaged before it sees them, and keeps whole momenta.
"""

from .adamw import ZeroMuonAdamW
from .muon import ZeroMuon

__all__ = ["ZeroMuon", "ZeroMuonAdamW"]
