"""Adapters of peft, sorted and trained; LoRA+ with its two rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ADAMW, MUON, assert_near, assert_same, parameters, through_disk
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
TOKENS = 32


def llama(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=TOKENS
    )
    adapter = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)


def advance(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(TOKENS, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def both(model: nn.Module) -> MuonAdamW:
    return MuonAdamW(param_groups(model), muon_options=MUON, adamw_options=ADAMW)


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "head too": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_and_resume_to_the_bit(kind: str) -> None:
    whole, model = llama(**KINDS[kind]), llama(**KINDS[kind])
    optimizer, again = both(whole), both(model)
    start = parameters(whole)
    advance(whole, optimizer, range(2))
    for name, p in whole.named_parameters():
        assert p.requires_grad == (not torch.equal(p, start[name])), name
    model.load_state_dict(whole.state_dict())
    again.load_state_dict(through_disk(optimizer.state_dict()))
    advance(whole, optimizer, range(2, 4))
    advance(model, again, range(2, 4))
    assert_same(parameters(model), parameters(whole))
    assert_same(again.state_dict(), optimizer.state_dict())


def test_who_trains_what() -> None:
    groups = param_groups(llama(use_dora=True, modules_to_save=["lm_head"]))
    went = {a.name: a.optimizer for a in groups.assignments}
    for name, optimizer in went.items():
        if ".lora_A." in name or ".lora_B." in name:
            assert optimizer == "Muon", name
        elif "magnitude" in name or "modules_to_save" in name:
            assert optimizer == "AdamW", name
        else:
            assert optimizer == "none", name
    assert sum(optimizer == "Muon" for optimizer in went.values()) == 6


def test_a_by_adamw_and_b_by_muon() -> None:
    model = llama()
    optimizer = MuonAdamW(param_groups(model, adamw="*lora_A*"), muon_options=MUON, adamw_options=ADAMW)
    hidden, rest = optimizer.param_groups
    assert all("lora_B" in name for name in hidden["param_names"])
    assert all("lora_A" in name for name in rest["param_names"])
    advance(model, optimizer, range(2))


def plus(optimizer_class: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, optimizer_class, lr=1e-3, loraplus_lr_ratio=16.0)


def test_lora_plus_is_that_of_torchs_muon() -> None:
    models, rates = [], []
    for optimizer_class in (Muon, torch.optim.Muon):
        model = llama()
        optimizer = plus(optimizer_class, model)
        advance(model, optimizer, range(3))
        models.append(model)
        rates.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
    assert rates[0] == rates[1] and len(set(rates[0])) > 1
    assert_near(*models, llama(), most=0.1)
