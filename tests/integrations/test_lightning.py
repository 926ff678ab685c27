"""Lightning's Trainer and Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ADAMW, CASES, MUON, assert_near, assert_same, build, loss_of, matrices, parameters
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from muon_kernels import Muon, MuonAdamW, param_groups

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|suggested|already exists|tensorboard|deprecated)")

STEPS_AN_EPOCH = 3


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: Any = None) -> None:
        super().__init__()
        self.model = model
        self.made = {"optimizer": optimizer}
        if scheduler is not None:
            self.made["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}

    def training_step(self, step: Tensor, _: int) -> Tensor:
        return loss_of(self.model, int(step))

    def configure_optimizers(self) -> dict[str, Any]:
        return self.made


def fit(module: Module, folder: Path, epochs: int = 2, resume: Path | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": epochs,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **options,
        }
    )
    steps = DataLoader(range(STEPS_AN_EPOCH), batch_size=None)
    trainer.fit(module, steps, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return trainer


PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_clipped_and_resumed_to_the_bit(case: str, precision: str, tmp_path: Path) -> None:
    options = {"precision": precision, "gradient_clip_val": 0.05, "accumulate_grad_batches": 1}

    def module(seed: int) -> Module:
        model, optimizer = build(case, seed)
        return Module(model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 10))

    half = module(0)
    fit(half, tmp_path, epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    whole = module(0)
    fit(whole, tmp_path, epochs=2, **options)
    again = module(1)
    fit(again, tmp_path, epochs=2, resume=tmp_path / "half.ckpt", **options)
    assert_same(parameters(again), parameters(whole))
    assert_same(again.made["optimizer"].state_dict(), whole.made["optimizer"].state_dict())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_is_that_of_torchs_muon(precision: str, tmp_path: Path) -> None:
    models = []
    for optimizer in (Muon, torch.optim.Muon):
        model, made = matrices(optimizer)
        module = Module(model, made)
        fit(module, tmp_path, precision=precision, gradient_clip_val=0.05, accumulate_grad_batches=STEPS_AN_EPOCH)
        models.append(model)
    assert_near(*models, matrices(Muon)[0], most=0.05 if precision == "32-true" else 0.08)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_momentum(name: str, tmp_path: Path) -> None:
    model, optimizer = build("MuonAdamW")
    if name == "OneCycleLR":
        scheduler = lr_scheduler.OneCycleLR(optimizer, [0.02, 0.003], total_steps=10)
    else:
        scheduler = lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=3)
    before = optimizer.param_groups[0]["momentum"]
    fit(Module(model, optimizer, scheduler), tmp_path, epochs=1)
    assert optimizer.param_groups[0]["momentum"] != before


def test_rates_of_named_groups_are_logged(tmp_path: Path) -> None:
    """LearningRateMonitor reads the key `name` of a group; with it, every rate, momentum and decay has a column."""
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    torch.manual_seed(0)
    model = CASES["MuonAdamW"][0]()
    hidden, rest = param_groups(model, muon_options=MUON, adamw_options=ADAMW)
    optimizer = MuonAdamW([{**hidden, "name": "hidden"}, {**rest, "name": "rest"}])
    module = Module(model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5))
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    trainer = fit(module, tmp_path, epochs=1, logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1)
    rates = {key.rsplit("/")[-1]: values for key, values in monitor.lrs.items()}
    assert rates["hidden"] == [MUON["lr"] * 0.5**i for i in range(STEPS_AN_EPOCH)]
    assert rates["rest"] == [ADAMW["lr"] * 0.5**i for i in range(STEPS_AN_EPOCH)]
    logged = {key.rsplit("/")[-1]: value.item() for key, value in trainer.callback_metrics.items()}
    assert logged["hidden-momentum"] == pytest.approx(0.95)
    assert logged["hidden-weight_decay"] == pytest.approx(MUON["weight_decay"])
    assert logged["rest-weight_decay"] == pytest.approx(ADAMW["weight_decay"])


@pytest.mark.parametrize("case", CASES)
def test_stochastic_weight_averaging(case: str, tmp_path: Path) -> None:
    """The callback ends with the average of the weights with which its epochs began."""
    from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

    ends = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            ends.append(parameters(module.model))

    model, optimizer = build(case)
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    fit(Module(model, optimizer), tmp_path, epochs=3, callbacks=[Ends(), average])
    assert all(group["lr"] == pytest.approx(0.01) for group in optimizer.param_groups)
    for name, p in parameters(model).items():
        torch.testing.assert_close(p, (ends[0][name] + ends[1][name]) / 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_fabric(case: str, precision: str, tmp_path: Path) -> None:
    """Clipped, saved, loaded and trained on to the bit."""

    def begin(seed: int) -> tuple[Any, nn.Module, Optimizer, nn.Module, Optimizer]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        inner, made = build(case, seed)
        model, optimizer = fabric.setup(inner, made)
        return fabric, model, optimizer, inner, made

    def advance(fabric: Any, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            fabric.backward(loss_of(model, step))
            fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()

    fabric, model, optimizer, inner, made = begin(0)
    advance(fabric, model, optimizer, range(2))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    advance(fabric, model, optimizer, range(2, 4))
    expected, state = parameters(inner), made.state_dict()

    fabric, model, optimizer, inner, made = begin(1)
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    advance(fabric, model, optimizer, range(2, 4))
    assert_same(parameters(inner), expected)
    assert_same(made.state_dict(), state)


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    """Manual optimization with Muon and AdamW apart goes where MuonAdamW goes."""

    class Two(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def training_step(self, step: Tensor, _: int) -> None:
            optimizers = self.optimizers()
            loss = loss_of(self.model, int(step))
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> list[Optimizer]:
            hidden, rest = param_groups(self.model)
            return [Muon(hidden["params"], **MUON), torch.optim.AdamW(rest["params"], fused=True, **ADAMW)]

    torch.manual_seed(0)
    model = CASES["MuonAdamW"][0]()
    fit(Two(model), tmp_path)
    together, optimizer = build("MuonAdamW")
    fit(Module(together, optimizer), tmp_path)
    assert_same(parameters(model), parameters(together))
