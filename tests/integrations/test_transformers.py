"""transformers' Trainer, however an optimizer gets into it, and the schedules that it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ADAMW, MUON, assert_near, assert_same, parameters
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TOKENS, LENGTH, STEPS = 32, 8, 4


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=TOKENS, n_positions=LENGTH)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=TOKENS
    )
    return transformers.LlamaForCausalLM(config)


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(TOKENS, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            **options,
        },
    )


def both(model: nn.Module) -> MuonAdamW:
    return MuonAdamW(param_groups(model), muon_options=MUON, adamw_options=ADAMW)


def given(model: nn.Module, args: Any) -> Any:
    return transformers.Trainer(model, args, train_dataset=data(), optimizers=(both(model), None))


def by_class(model: nn.Module, args: Any) -> Any:
    options = {"params": param_groups(model), "muon_options": MUON, "adamw_options": ADAMW}
    return transformers.Trainer(model, args, train_dataset=data(), optimizer_cls_and_kwargs=(MuonAdamW, options))


def overridden(model: nn.Module, args: Any) -> Any:
    class Trainer(transformers.Trainer):
        def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
            if self.optimizer is None:
                self.optimizer = both(self.model if model is None else model)
            return self.optimizer

    return Trainer(model, args, train_dataset=data())


WAYS = {"optimizers": given, "optimizer_cls_and_kwargs": by_class, "create_optimizer": overridden}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16-accumulated": {"bf16": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize(
    "make, setting, way",
    [*[(gpt2, "plain", way) for way in WAYS], *[(llama, setting, "optimizers") for setting in SETTINGS]],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_resumed_to_the_bit(make: Callable[[], nn.Module], setting: str, way: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, **SETTINGS[setting])
    whole, model = build(make), build(make, seed=1)
    trainer = WAYS[way](whole, args)
    start = parameters(whole)
    trainer.train()
    assert all(not torch.equal(p, start[name]) for name, p in parameters(whole).items())
    again = WAYS[way](model, args)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same(parameters(model), parameters(whole))
    assert_same(again.optimizer.optimizer.state_dict(), trainer.optimizer.optimizer.state_dict())


def test_all_ways_are_one(tmp_path: Path) -> None:
    weights = []
    for name, way in WAYS.items():
        model = build(llama)
        way(model, arguments(tmp_path / name, save_strategy="no")).train()
        weights.append(parameters(model))
    assert_same(weights[1], weights[0])
    assert_same(weights[2], weights[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_is_that_of_torchs_muon(setting: str, tmp_path: Path) -> None:
    """Matrices alone are trained, embedding and head among them, since torch's Muon takes nothing else."""
    models = []
    for optimizer in (Muon, torch.optim.Muon):
        model = build(llama)
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2)
        hidden = [p for p in model.parameters() if p.requires_grad]
        options = arguments(tmp_path, save_strategy="no", **SETTINGS[setting])
        trainer = transformers.Trainer(
            model, options, train_dataset=data(), optimizers=(optimizer(hidden, **MUON), None)
        )
        trainer.train()
        models.append(model)
    start = build(llama)
    assert_near(*models, start, most=0.06)


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_torchs_muon(schedule: str) -> None:
    """The same rates in the Muon group; AdamW's have the same ratio to where they begin."""
    w = nn.Parameter(torch.randn(4, 4))
    b = nn.Parameter(torch.randn(4))
    groups = [{"params": [w], "use_muon": True}, {"params": [b], "use_muon": False}]
    optimizers = (
        MuonAdamW(groups, muon_options=MUON, adamw_options=ADAMW),
        Muon([w], **MUON),
        torch.optim.Muon([w], **MUON),
    )
    rates = []
    for optimizer in optimizers:
        scheduler = transformers.get_scheduler(
            schedule,
            optimizer,
            num_warmup_steps=2,
            num_training_steps=8,
            scheduler_specific_kwargs=SCHEDULES[schedule],
        )
        series = []
        for step in range(8):
            w.grad, b.grad = torch.randn(4, 4), torch.randn(4)
            optimizer.step()
            series.append([group["lr"] for group in optimizer.param_groups])
            scheduler.step(*([float(step % 3)] if schedule == "reduce_lr_on_plateau" else []))
        rates.append(series)
    assert [muon for muon, _ in rates[0]] == [muon for (muon,) in rates[1]] == [muon for (muon,) in rates[2]]
    for muon, adamw in rates[0]:
        assert adamw / ADAMW["lr"] == pytest.approx(muon / MUON["lr"])


@pytest.mark.parametrize(
    "schedule, options", [("polynomial", None), ("cosine_with_min_lr", {"min_lr": 1e-3})], ids=lambda x: str(x)
)
def test_schedules_that_read_defaults_in_the_trainer(schedule: str, options: Any, tmp_path: Path) -> None:
    model = build(llama)
    args = arguments(tmp_path, save_strategy="no", lr_scheduler_type=schedule, lr_scheduler_kwargs=options)
    trainer = given(model, args)
    trainer.train()
    muon, adamw = trainer.optimizer.param_groups
    least = 1e-3 if options else 1e-7
    assert muon["lr"] == pytest.approx(least)
    assert adamw["lr"] == pytest.approx(least * ADAMW["lr"] / MUON["lr"])
