"""Fine-tune a language model by LoRA whose adapters Muon steps: they are matrices, and all else is frozen.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --model HuggingFaceTB/SmolLM2-135M --text my_texts/*.txt

Without --model it first trains a Llama of 0.5 million parameters on the sources of Python's standard library, and then
fine-tunes it on Python's language reference: from code to prose. The table has the loss on both texts before and after,
so it shows what was learnt and what was forgotten. The adapters go to --out; peft loads them.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.arguments import count, rate, seed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import muon_kernels

try:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs peft and transformers (pip install peft transformers): {error}") from None

LENGTH, BATCH = 128, 8
Encoder = Callable[[str], Tensor]


def make_optimizer(model: nn.Module, lr: float) -> Optimizer:
    """Return Muon for the matrices that are trained, and AdamW for what else is. Frozen weights are nobody's."""
    groups = muon_kernels.param_groups(model)
    print(groups)
    options = {"lr": lr, "weight_decay": 0.0}
    return muon_kernels.MuonAdamW(
        groups,
        muon_options={**options, "adjust_lr_fn": "match_rms_adamw"},  # updates as large as AdamW's
        adamw_options={**options, "betas": (0.9, 0.95)},
    )


def train(model: nn.Module, tokens: Tensor, steps: int, lr: float, seed: int, what: str) -> None:
    """Train what is not frozen on random windows of the tokens."""
    optimizer = make_optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in track(range(steps), what):
        starts = torch.randint(len(tokens) - LENGTH + 1, (BATCH, 1), generator=generator)
        windows = tokens[starts + torch.arange(LENGTH)]
        model(input_ids=windows, labels=windows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor, batches: int = 16) -> float:
    """Return the mean loss over windows that are spread evenly over the tokens."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - LENGTH, batches * BATCH).long()
    windows = tokens[starts[:, None] + torch.arange(LENGTH)]
    return torch.stack([model(input_ids=rows, labels=rows).loss for rows in windows.split(BATCH)]).mean().item()


def parted(documents: Sequence[str], encode: Encoder) -> tuple[Tensor, Tensor]:
    """Return the tokens to train on and those of every tenth document, which are held out."""
    if len(documents) < 10:  # too few of them: the last tenth of the whole
        tokens = torch.cat([encode(text) for text in documents])
        parts = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    else:
        train = [encode(text) for n, text in enumerate(documents) if n % 10 != 9]
        parts = torch.cat(train), torch.cat([encode(text) for text in documents[9::10]])
    if len(parts[1]) < LENGTH:
        raise ValueError(f"a text should have at least {10 * LENGTH} tokens but has {len(parts[0]) + len(parts[1])}")
    return parts


def code() -> list[str]:
    """Return the sources of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def reference() -> list[str]:
    """Return Python's language reference, as pydoc has it."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def encode_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def tiny_llama(seed: int) -> nn.Module:
    """Return a new Llama on bytes."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model of transformers")
    parser.add_argument("--text", type=Path, nargs="+", help="files to fine-tune on (default: the language reference)")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder for the adapters")
    parser.add_argument("--pretrain-steps", type=count, default=200, help="of the small model (default: 200)")
    parser.add_argument("--steps", type=count, default=100, help="of fine-tuning (default: 100)")
    parser.add_argument("--rank", type=count, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--lr", type=rate, default=1e-2, help="of fine-tuning (default: 0.01)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and windows (default: 0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # if that cannot be, nothing should have been trained

    encode: Encoder = encode_bytes
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encode = lambda text: torch.tensor(tokenizer(text).input_ids)
    old, old_held_out = parted(code(), encode)
    new, new_held_out = parted(
        [path.read_text(encoding="utf-8") for path in args.text] if args.text else reference(), encode
    )
    if not args.model:
        model = tiny_llama(args.seed)
        train(model, old, args.pretrain_steps, 1e-2, args.seed, "train on code")

    def losses() -> list[float]:
        return [loss_on(model, old_held_out), loss_on(model, new_held_out)]

    before = losses()
    torch.manual_seed(args.seed)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    model.print_trainable_parameters()
    train(model, new, args.steps, args.lr, args.seed + 1, "fine-tune")
    results = {"before": before, "after": losses()}
    model.save_pretrained(args.out)

    table = Table("", "code, the old text", "the new text", title="held-out loss, nats per token")
    for name, found in results.items():
        table.add_row(name, *(f"{loss:.3f}" for loss in found))
    Console().print(table)
    print(f"adapters: {args.out}")
    return results


if __name__ == "__main__":
    main()
