"""Effect of 8-bit momentum on a training: the demo's GPT with momentum in fp32, bf16 and int8, same model and batches.

Beside the training with fp32 momentum, each other precision follows the same gradients. Printed are how far its
momentum is off, and the cosine between what Muon makes of both: median and worst over the hidden matrices. Then follow
the losses of a training with each precision.

    python bench/bench_quantized.py [--steps 160] [--width 128]
"""

from __future__ import annotations

import argparse
import copy
from statistics import median

import torch
from torch import Tensor, nn

from muon_kernels import Muon, MuonAdamW, orthogonalize, param_groups
from muon_kernels.cli import demo
from muon_kernels.stages.quantize import dequantize

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}


class Shadow:
    """The momentum that a precision would have after the same gradients."""

    def __init__(self, params: list[Tensor], dtype: torch.dtype | None) -> None:
        self.copies = [nn.Parameter(p.detach().clone()) for p in params]
        self.muon = Muon(self.copies, lr=0.0, weight_decay=0.0, momentum_dtype=dtype)

    def step(self, params: list[Tensor]) -> None:
        for copied, p in zip(self.copies, params, strict=True):
            copied.grad = p.grad
        self.muon.step()

    def momenta(self) -> list[Tensor]:
        states = [self.muon.state[copied] for copied in self.copies]
        return [
            dequantize(s["momentum_buffer"], s["momentum_scale"])
            if "momentum_scale" in s
            else s["momentum_buffer"].float()
            for s in states
        ]


def state_bytes(run: demo.Run) -> float:
    """Return the bytes of momentum for an element of the hidden matrices."""
    (optimizer,) = run.optimizers
    matrices = optimizer.param_groups[0]["params"]
    kept = sum(t.nbytes for p in matrices for t in optimizer.state[p].values())
    return kept / sum(p.numel() for p in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, held_out = demo.parted(demo.prose() + demo.source_code())
    model = demo.GPT(arguments.width, demo.LAYERS, demo.HEADS, demo.CONTEXT)
    for name, dtype in PRECISIONS.items():
        options = {**demo.MUON_OPTIONS, "momentum_dtype": dtype}
        demo.OPTIMIZERS[name] = lambda of, options=options: [
            MuonAdamW(param_groups(of), muon_options=options, adamw_options=demo.BESIDE_MUON_OPTIONS)
        ]
    runs = {name: demo.Run(name, copy.deepcopy(model), arguments.steps) for name in PRECISIONS}
    followed = runs["fp32"].optimizers[0].param_groups[0]["params"]
    shadows = {name: Shadow(followed, dtype) for name, dtype in PRECISIONS.items()}
    print(
        "| step | momentum | momentum off by, median | worst | cosine of updates, median | worst |\n|---"
        + "|---" * 5
        + "|"
    )
    for step, text in enumerate(demo.batches(train, arguments.steps), start=1):
        for name, run in runs.items():
            if name == "fp32":
                run.model(text).backward()
                for shadow in shadows.values():
                    shadow.step(followed)
                run.model.zero_grad()
            run.step(text)
        if step in (1, 10, arguments.steps // 4, arguments.steps):
            exact = shadows["fp32"].momenta()
            updates = [orthogonalize(M) for M in exact]
            for name in ("bf16", "int8"):
                momenta = shadows[name].momenta()
                off = [float((M - E).norm() / E.norm()) for M, E in zip(momenta, exact, strict=True)]
                cosines = [
                    float(torch.cosine_similarity(orthogonalize(M).flatten(), U.flatten(), 0))
                    for M, U in zip(momenta, updates, strict=True)
                ]
                row = step, name, f"{100 * median(off):.2f} %", f"{100 * max(off):.2f} %"
                print(
                    "|", " | ".join(map(str, (*row, f"{median(cosines):.4f}", f"{min(cosines):.4f}"))), "|", flush=True
                )
    batches = list(demo.even_batches(held_out))
    print("\n| momentum | bytes an element | training loss, last tenth | held-out loss |\n|---|---|---|---|")
    for name, run in runs.items():
        run.evaluate(batches)
        last = run.losses[-max(1, arguments.steps // 10) :]
        print(f"| {name} | {state_bytes(run):.3f} | {sum(last) / len(last):.4f} | {run.held_out_loss:.4f} |")


if __name__ == "__main__":
    main()
