"""A model that trains in milliseconds, optimizers for it and torch's in their place, and what equality means."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups

WIDTH = 24  # channels, tokens and outputs: gradients have full rank, so that rounding is not what a step amplifies


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """Two layers of matrices with biases between an embedding and a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.Sequential(Block(True), Block(True))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(tokens))))


class Matrices(nn.Module):
    """What torch.optim.Muon can train alone: every parameter is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(False), Block(False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(nn.functional.one_hot(tokens, WIDTH).to(self.layers[0].up.weight.dtype))


MUON = {"lr": 0.02, "weight_decay": 0.1}
ADAMW = {"lr": 3e-3, "weight_decay": 0.05}


def both(model: nn.Module, **options: Any) -> MuonAdamW:
    return MuonAdamW(param_groups(model), muon_options={**MUON, **options}, adamw_options=ADAMW)


# By name: a model, and the optimizer under test for it.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Optimizer]]] = {
    "Muon": (Matrices, lambda model: Muon(model.parameters(), **MUON)),
    "MuonAdamW": (Network, both),
}


def build(case: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model with weights of `seed` and its optimizer."""
    torch.manual_seed(seed)
    make_model, make_optimizer = CASES[case]
    model = make_model()
    return model, make_optimizer(model)


def matrices(optimizer: Callable[..., Optimizer], **options: Any) -> tuple[nn.Module, Optimizer]:
    """The model of matrices with an optimizer: ours, or torch's Muon in its place."""
    torch.manual_seed(0)
    model = Matrices()
    return model, optimizer(model.parameters(), **{**MUON, **options})


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step, on every rank and in every run the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(WIDTH, (64,), generator=generator), torch.randn(64, WIDTH, generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens, targets = batch(step)
    return nn.functional.mse_loss(model(tokens), targets)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def through_disk(value: Any) -> Any:
    """What torch.load, which takes weights only, makes of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gathered(value: Any) -> Any:
    """Plain tensors for DTensors, however deep; every rank has to ask."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(v) for v in value)
    return value


def assert_same(found: Any, expected: Any, at: str = "") -> None:
    """Equal to the bit, however deep in dicts and lists."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.dtype == expected.dtype, at
        assert torch.equal(found, expected), f"{at}: differ by {(found - expected).abs().max()}"
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), at
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{at}/{i}")
    else:
        assert found == expected, f"{at}: {found!r} instead of {expected!r}"


def assert_same_training(model: nn.Module, optimizer: Optimizer, model2: nn.Module, optimizer2: Optimizer) -> None:
    """Weights and all of the optimizer's state are equal to the bit."""
    assert_same(parameters(model), parameters(model2))
    assert_same(optimizer.state_dict(), optimizer2.state_dict())


def assert_near(found: nn.Module, expected: nn.Module, start: nn.Module | None = None, most: float = 0.03) -> None:
    """The ways that two trainings went differ by bf16's rounding of the iteration only: by `most` of their length."""
    begin = parameters(start if start is not None else type(expected)())
    a, b = parameters(found), parameters(expected)
    for name, origin in begin.items():
        way = b[name] - origin
        assert (a[name] - b[name]).norm() <= most * way.norm() + 1e-7, (
            f"{name}: {((a[name] - b[name]).norm() / way.norm()).item():.3g} of its way apart"
        )


def another_accelerator() -> None:
    """Forget accelerate's settings, which are a process's and not an Accelerator's; Trainer of transformers has one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
