"""Train GPT-2 by Muon, AdamW or one of the eight optimizers of "Delving into Muon and Beyond" (arXiv 2602.04669).

    python examples/train_gpt.py --tiny
    python examples/train_gpt.py --tiny --optimizer msgd_q
    python examples/train_gpt.py --data data/openwebtext
    torchrun --nproc-per-node 8 examples/train_gpt.py --data data/openwebtext --parallel fsdp

--tiny is a model of 0.8 million parameters on bytes of Python's standard library, for a CPU. Without it the model is
GPT-2's with 124 million, on token files that prepare_tokens.py or nanoGPT has made. The folder --out gets the log, the
checkpoints and a picture of the losses. A training that was stopped goes on with --resume, to the bit on as many
ranks; on other numbers of ranks it sees the same tokens in the same order, and sums are rounded otherwise.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from common import checkpoints, logs, ranks
from common.arguments import bound, count, rate, seed, whole
from common.gpt import GPT, GPT2_124M, TINY, loss_of
from common.presets import RATES, RUN, TINY_RATES, TINY_RUN, Rates
from common.tokens import read_folder
from prepare_tokens import standard_library
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import muon_kernels
from muon_kernels.split import equal

# What decides the numbers of a training; a checkpoint of others is refused.
DECISIVE = ("optimizer", *Rates._fields, "steps", "warmup", "batch_size", "accumulate", "clip", "dtype", "seed")


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """Return the optimizer that `args` name. Copies of a model on several ranks share Muon's and the paper's work."""
    group = dist.group.WORLD if args.parallel == "ddp" else None
    if args.optimizer == "adamw":
        hidden, rest = muon_kernels.param_groups(model)
        groups = [{"params": hidden["params"], "lr": args.lr}, {"params": rest["params"], "lr": args.lr_vector}]
        return AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "muon":
        decay = {"weight_decay": args.weight_decay}
        return muon_kernels.MuonAdamW(
            muon_kernels.param_groups(model, split={"*.c_attn.weight": equal(3)}),
            muon_options={"lr": args.lr, "adjust_lr_fn": "match_rms_adamw", "process_group": group, **decay},
            adamw_options={"lr": args.lr_vector, "betas": (0.9, 0.95), **decay},
        )
    rates = {"lr": args.lr, "lr_vector": args.lr_vector, "weight_decay": args.weight_decay}
    return muon_kernels.paper_optimizer(args.optimizer, model, **rates, process_group=group)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of learning rates: it rises to 1 over the warm-up, then falls along a cosine to 0.1."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup if warmup else 1, 0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def evaluate(net: nn.Module, held_out: Sequence[Tensor], here: ranks.Ranks, autocast: torch.autocast) -> float:
    """Return the mean loss over all ranks' held-out windows."""
    total = torch.zeros((), device=here.device)
    for windows in held_out:
        with autocast:
            total += loss_of(net, windows.to(here.device))
    return here.mean(total / len(held_out))


def backward(net: nn.Module, windows: Tensor, batch_size: int, autocast: torch.autocast) -> Tensor:
    """Add up the gradients of all windows, `batch_size` at a time; return their mean loss."""
    parts = windows.split(batch_size)
    total = torch.zeros((), device=windows.device)
    for n, part in enumerate(parts):
        with ranks.summed(net, n == len(parts) - 1):
            with autocast:
                loss = loss_of(net, part) / len(parts)
            loss.backward()
        total += loss.detach()
    return total


def finite(number: float, what: str, step: int) -> None:
    """Raise FloatingPointError unless a number of a step, the same on all ranks, is finite."""
    if not math.isfinite(number):
        raise FloatingPointError(f"{what} of step {step} should be finite but is {number}; give a lower --lr")


def train(args: argparse.Namespace, here: ranks.Ranks) -> None:
    if args.accumulate % here.count or args.eval_batches % here.count:
        raise ValueError(
            f"--accumulate and --eval-batches should be multiples of the {here.count} ranks, which share them, but "
            f"are: {args.accumulate} and {args.eval_batches}"
        )
    sizes = {"block_size": args.block_size, "vocab_size": args.vocab_size}
    config = replace(TINY if args.tiny else GPT2_124M, **{key: size for key, size in sizes.items() if size})
    data = args.data or args.out.parent / "python-bytes"
    if here.first and args.data is None:
        standard_library(data)
    here.wait()
    batches, held_out = read_folder(data, config, args.batch_size * args.eval_batches, args.seed, here)
    decisive = {key: getattr(args, key) for key in DECISIVE} | asdict(config) | {"tokens": batches.tokens}
    about, checkpoint = checkpoints.begin(args.out, args.resume, decisive)
    here.wait()  # until all have looked: the first rank writes there

    torch.manual_seed(args.seed)
    model = GPT(config).to(here.device)
    if args.compile:
        for block in model.transformer.h:
            block.compile()
    if args.parallel == "fsdp":
        ranks.shard(model, model.transformer.h)
    optimizer = make_optimizer(args, model)
    net = DistributedDataParallel(model) if args.parallel == "ddp" else model
    peaks = [group["lr"] for group in optimizer.param_groups]
    if checkpoint:
        checkpoints.load(checkpoint, model, optimizer, about, here)
        batches.position = about["position"]
    autocast = torch.autocast(here.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    with logs.Log(args.out / "log.jsonl", about["step"], args.steps, here.first) as log:
        for step in range(about["step"], args.steps):
            began = time.perf_counter()
            factor = schedule(step, args.steps, args.warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            windows = batches.draw(args.batch_size * args.accumulate, here.rank, here.count)
            loss = here.mean(backward(net, windows.to(here.device), args.batch_size, autocast))
            finite(loss, "loss", step + 1)
            norm = ranks.whole(nn.utils.clip_grad_norm_(model.parameters(), args.clip)).item()
            finite(norm, "norm of the gradients", step + 1)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            log.step(step + 1, loss=loss, grad_norm=norm, lr=args.lr * factor, seconds=seconds)
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                val_loss = evaluate(net, held_out.split(args.batch_size), here, autocast)
                finite(val_loss, "held-out loss", step + 1)  # or a lost model would replace the last good one
                log.evaluation(step + 1, val_loss)
                about |= {"step": step + 1, "position": batches.position}
                checkpoints.save(args.out, model, optimizer, about, here)
    if here.first:
        logs.draw({args.optimizer: args.out / "log.jsonl"}, args.out / "loss.png")
        print(f"log, checkpoint and picture: {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a small model and few steps, for a CPU")
    add("--data", type=Path, help="folder of train.bin and val.bin (default: bytes of Python's library)")
    add("--out", type=Path, help="folder of this training (default: runs/SIZE-OPTIMIZER)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--optimizer", choices=RATES, default="muon", help="default: muon")
    add("--parallel", choices=("ddp", "fsdp"), help="how ranks share the model, under torchrun (default there: ddp)")
    kinds = {**dict.fromkeys(Rates._fields, rate), **dict.fromkeys(RUN, count), "warmup": whole}
    for name, kind in kinds.items():
        given = f"{RUN[name]}, with --tiny {TINY_RUN[name]}" if name in RUN else "by optimizer"
        add(f"--{name.replace('_', '-')}", type=kind, help=f"default: {given}")
    add("--block-size", type=count, help="tokens that the model sees at once")
    add("--vocab-size", type=count, help="number of tokens that there are")
    add("--clip", type=bound, default=1.0, help="largest norm of the gradients (default: 1)")
    default = "bfloat16" if torch.cuda.is_available() else "float32"
    add("--dtype", choices=("bfloat16", "float32"), default=default, help=f"of products; here: {default}")
    add("--compile", action="store_true", help="compile the layers by torch.compile")
    add("--seed", type=seed, default=0, help="of the model and the order of the text (default: 0)")
    args = parser.parse_args(argv)
    if args.data is None and not args.tiny:
        parser.error("--data should be a folder of token files, which prepare_tokens.py makes; or begin with --tiny")
    rates = (TINY_RATES if args.tiny else RATES)[args.optimizer]
    for name, value in {**rates._asdict(), **(TINY_RUN if args.tiny else RUN)}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs", f"{'tiny' if args.tiny else '124M'}-{args.optimizer}")
    with ranks.started(args.parallel) as here:
        args.parallel = args.parallel or ("ddp" if here.count > 1 else None)
        train(args, here)


if __name__ == "__main__":
    main()
