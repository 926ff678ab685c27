"""Train a mixture of experts of DeepSeek-V3's kind by Muon: one expert of a stack is one matrix.

    python examples/moe.py

In each layer a shared expert sees every token, and each of the routed ones those that the router sends to it. As in
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) gates are sigmoids, the highest few of which are divided by their sum. No
loss balances the experts. Instead, each has a bias that is added to its gate for the choice alone; after a step the
bias of an expert that had more tokens than the mean goes down, and that of one with fewer goes up.

Weights of all routed experts are one parameter, (experts, out, in). Muon reads it as a stack of matrices and steps all
of them in one batch. The biases are buffers: no optimizer steps them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import logs
from common.arguments import count, rate, seed
from common.gpt import GPT, TINY, GPTConfig, loss_of
from common.tokens import read_folder
from prepare_tokens import standard_library
from torch import Tensor, nn
from torch.nn import functional as F

import muon_kernels
from muon_kernels.split import equal


class Routing(NamedTuple):
    """Number of experts, how many of them a token goes to, and by how much a bias moves in a step."""

    experts: int = 8
    chosen: int = 2
    speed: float = 1e-3


class Mixture(nn.Module):
    """Part of a layer after attention: a shared expert, and routed ones of which each token has a few.

    Attributes:
        load: tokens that each expert has had since the last `rebalance`, (experts,).
    """

    def __init__(self, config: GPTConfig, routing: Routing) -> None:
        super().__init__()
        width, inner = config.n_embd, config.n_embd  # a token meets 1 shared and 2 routed experts of this width
        self.routing = routing
        self.router = nn.Linear(width, routing.experts, bias=False)
        self.shared_up, self.shared_down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.up = nn.Parameter(torch.empty(routing.experts, inner, width))
        self.down = nn.Parameter(torch.empty(routing.experts, width, inner))
        self.register_buffer("bias", torch.zeros(routing.experts))
        self.register_buffer("load", torch.zeros(routing.experts))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, n_embd) to the same size."""
        tokens = x.flatten(0, 1)
        gates = torch.sigmoid(self.router(tokens))
        chosen = (gates + self.bias).topk(self.routing.chosen).indices  # (tokens, chosen)
        weights = gates.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True)
        result = self.shared_down(F.gelu(self.shared_up(tokens)))
        for expert in range(self.routing.experts):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            routed = F.gelu(tokens[rows] @ self.up[expert].mT) @ self.down[expert].mT
            result = result.index_add(0, rows, weights[rows, place, None] * routed)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=self.routing.experts)
        return result.view_as(x)

    @torch.no_grad()
    def rebalance(self) -> list[float]:
        """Move the biases by the load since the last call. Return each expert's share of the tokens, 1 for the mean."""
        share = self.load / self.load.mean()
        self.bias += self.routing.speed * (1 - share).sign()
        self.load.zero_()
        return share.tolist()


def train(args: argparse.Namespace) -> None:
    data = args.out.parent / "python-bytes"
    standard_library(data)
    batches, held_out = read_folder(data, TINY, 128, args.seed)
    torch.manual_seed(args.seed)
    model = GPT(TINY, mlp=partial(Mixture, routing=Routing(args.experts, args.chosen, args.speed)))
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    groups = muon_kernels.param_groups(model, split={"*.c_attn.weight": equal(3)})
    print(groups)
    optimizer = muon_kernels.MuonAdamW(
        groups,
        muon_options={"lr": args.lr, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"},
        adamw_options={"lr": args.lr, "weight_decay": 0.1, "betas": (0.9, 0.95)},
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    with logs.Log(args.out / "log.jsonl", 0, args.steps) as log:
        for step in range(args.steps):
            loss = loss_of(model, batches.draw(16))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loads = [mixture.rebalance() for mixture in mixtures]
            log.step(step + 1, loss=loss.item(), grad_norm=norm.item(), loads=loads)
        model.eval()
        with torch.no_grad():
            losses = [loss_of(model, windows) for windows in held_out.split(16)]
        log.evaluation(args.steps, torch.stack(losses).mean().item())
    draw(args.out)
    print(f"log and picture of the loads: {args.out}")


def draw(out: Path) -> None:
    """Draw the load of the busiest and of the idlest expert of every layer over steps."""
    from matplotlib.figure import Figure

    rows = [row for row in logs.read(out / "log.jsonl") if "loads" in row]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for layer in range(len(rows[0]["loads"])):
        for extreme, style in ((max, "-"), (min, "--")):
            points = [(row["step"], extreme(row["loads"][layer])) for row in rows]
            steps, means = logs.running(points, max(1, len(points) // 50))
            label = f"layer {layer + 1}, {'most' if extreme is max else 'fewest'} tokens"
            axes.plot(steps, means, style, color=f"C{layer}", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    logs.over_steps(axes, "tokens of an expert, 1 for the mean", fontsize=11, ncols=2)
    figure.savefig(out / "loads.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/moe"), help="folder of log and picture")
    parser.add_argument("--steps", type=count, default=200, help="default: 200")
    parser.add_argument("--experts", type=count, default=8, help="routed experts of a layer (default: 8)")
    parser.add_argument("--chosen", type=count, default=2, help="of which a token has so many (default: 2)")
    parser.add_argument("--speed", type=rate, default=1e-2, help="of the biases; 0 balances nothing (default: 0.01)")
    parser.add_argument("--lr", type=rate, default=1e-2, help="default: 0.01")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and the batches (default: 0)")
    args = parser.parse_args(argv)
    if args.chosen > args.experts:
        parser.error(f"--chosen should be at most the {args.experts} --experts but is: {args.chosen}")
    train(args)


if __name__ == "__main__":
    main()
