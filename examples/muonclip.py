"""Train by Muon at a rate at which attention logits grow, with QK-Clip and without: MuonClip of Kimi K2 (2507.20534).

    python examples/muonclip.py

The largest logit of each head is noted in the forward pass. After the step, the rows of queries and keys that belong to
a head whose largest logit passed tau are scaled down, so that it would have been tau. Other heads stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import logs
from common.arguments import bound, count, rate, seed
from common.gpt import GPT, TINY, CausalSelfAttention, loss_of
from common.tokens import read_folder
from prepare_tokens import standard_library
from torch import Tensor, nn

import muon_kernels
from muon_kernels.split import equal


class ClippedAttention(CausalSelfAttention):
    """Attention that notes its largest logits, (heads,), and can hold them.

    For long sequences do that in some steps only: `max_logits` multiplies queries and keys once more.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.max_logits = muon_kernels.max_logits(q, k, causal=True)
        return super().attend(q, k, v)

    def clip(self, tau: float) -> None:
        """Scale queries and keys of heads whose logits passed tau."""
        width = self.c_attn.in_features
        q, k = (self.c_attn.weight[start : start + width] for start in (0, width))  # views: they are written
        muon_kernels.qk_clip_(q, k, self.max_logits, tau)


def train(tau: float | None, args: argparse.Namespace, data: Path) -> Path:
    """Train without QK-Clip for tau None; return the log."""
    name = "without clip" if tau is None else f"tau {tau:g}"
    batches, held_out = read_folder(data, TINY, 128, args.seed)
    torch.manual_seed(args.seed)
    model = GPT(TINY, attention=ClippedAttention)
    attentions = [module for module in model.modules() if isinstance(module, ClippedAttention)]
    optimizer = muon_kernels.MuonAdamW(
        muon_kernels.param_groups(model, split={"*.c_attn.weight": equal(3)}),
        muon_options={"lr": args.lr, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
        adamw_options={"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.95)},
    )
    path = args.out / f"{name}.jsonl"
    print(name)
    with logs.Log(path, 0, args.steps) as log:
        for step in range(args.steps):
            loss = loss_of(model, batches.draw(16))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            largest = [attention.max_logits.tolist() for attention in attentions]
            if tau is not None:
                for attention in attentions:
                    attention.clip(tau)
            log.step(step + 1, loss=loss.item(), max_logit=max(map(max, largest)))
        with torch.no_grad():
            losses = [loss_of(model, windows) for windows in held_out.split(16)]
        log.evaluation(args.steps, torch.stack(losses).mean().item())
    return path


def draw(runs: dict[str, Path], tau: float, to: Path) -> None:
    """Draw the largest logit of each training, and its loss, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    logits, losses = figure.subplots(1, 2)
    for name, path in runs.items():
        rows = [row for row in logs.read(path) if "loss" in row]
        window = max(1, len(rows) // 50)
        logits.plot([row["step"] for row in rows], [row["max_logit"] for row in rows], label=name)
        losses.plot(*logs.running([(row["step"], row["loss"]) for row in rows], window), label=name)
    logits.axhline(tau, color="black", linewidth=1, linestyle=":", label=f"tau = {tau:g}")
    logits.set_yscale("log")
    logs.over_steps(logits, "largest attention logit")
    logs.over_steps(losses, "training loss, nats per byte")
    figure.savefig(to)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/muonclip"), help="folder of logs and picture")
    parser.add_argument("--steps", type=count, default=150, help="default: 150")
    parser.add_argument("--lr", type=rate, default=0.1, help="of Muon, high on purpose (default: 0.1)")
    parser.add_argument("--tau", type=bound, default=30.0, help="largest logit; Kimi K2 has 100 (default: 30)")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and the batches (default: 0)")
    args = parser.parse_args(argv)
    data = args.out.parent / "python-bytes"
    standard_library(data)
    runs = {name: train(tau, args, data) for name, tau in {"without QK-Clip": None, "with QK-Clip": args.tau}.items()}
    draw(runs, args.tau, args.out / "logits.png")
    print(f"logs and picture of the logits: {args.out}")


if __name__ == "__main__":
    main()
