"""Checkpoints by torch.distributed.checkpoint: every rank writes its part, and any number of ranks reads them.

A checkpoint is a folder, `step-00000120`, which has its name only once it is complete.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from .ranks import Ranks

ABOUT = "about.json"


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, None without one."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
    return max(found, default=None)


def save(folder: Path, model: nn.Module, optimizer: Optimizer, about: dict[str, Any], ranks: Ranks) -> Path:
    """Write model, optimizer, this rank's random state and `about`; remove older checkpoints.

    Args:
        folder: where checkpoints are.
        about: what JSON can hold: "step" and "config", and what else the training needs to go on.

    Returns:
        The folder of this checkpoint.
    """
    writing, done = folder / "writing", folder / f"step-{about['step']:08d}"
    if ranks.first:
        shutil.rmtree(writing, ignore_errors=True)  # of a run that was stopped as it wrote
        writing.mkdir(parents=True)
    ranks.wait()
    weights, state = get_state_dict(model, optimizer)
    random = {str(ranks.rank): _random_state(ranks)}
    with _alone():
        dcp.save({"model": weights, "optimizer": state, "random": random}, checkpoint_id=writing)
    if ranks.first:
        about = {**about, "ranks": ranks.count, "device": ranks.device.type}
        (writing / ABOUT).write_text(json.dumps(about, indent=1))
        writing.rename(done)
        for older in folder.glob("step-*"):
            if older != done:
                shutil.rmtree(older)
    ranks.wait()
    return done


def begin(folder: Path, resume: bool, config: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Return where a training begins, as `save` was told it, and the checkpoint that it goes on from, None without.

    Args:
        folder: of the training.
        resume: whether to go on from its newest checkpoint; else the folder has to be new.
        config: what decides the numbers of this training; that of the checkpoint has to be equal.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: there is a training already, or none, or one of another
            configuration, or its checkpoint is damaged.
    """
    newest = latest(folder)
    if not resume:
        if newest is not None or (folder / "log.jsonl").exists():
            mend = "go on with it by --resume" if newest else "it has no checkpoint yet, so remove it"
            raise FileExistsError(f"{folder} should be new but holds a training; {mend}, or give another --out")
        return {"step": 0, "position": 0, "config": config}, None
    if newest is None:
        raise FileNotFoundError(
            f"{folder} should hold a checkpoint to go on from but holds none; begin a training without --resume"
        )
    with _whole(newest):
        about: dict[str, Any] = json.loads((newest / ABOUT).read_text())
        was = {**about["config"]}
    pairs = {key: (was.get(key), config.get(key)) for key in {**was, **config}}
    other = [f"{key} is {there!r} there and {here!r} here" for key, (there, here) in pairs.items() if there != here]
    if other:
        raise ValueError(
            f"{newest} should be of this training but is of another: {'; '.join(other)}. "
            "Give the arguments that it was started with, or another --out"
        )
    return about, newest


def load(path: Path, model: nn.Module, optimizer: Optimizer, about: dict[str, Any], ranks: Ranks) -> None:
    """Load what `save` wrote. Random states are loaded where the ranks are as many, on the same kind of device.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    weights, state = get_state_dict(model, optimizer)
    read: dict[str, Any] = {"model": weights, "optimizer": state}
    alike = (about["ranks"], about["device"]) == (ranks.count, ranks.device.type)
    if alike:
        read["random"] = {str(ranks.rank): _random_state(ranks)}
    with _alone(), _whole(path):
        dcp.load(read, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    if alike:
        random = read["random"][str(ranks.rank)]
        torch.set_rng_state(random["cpu"])
        if ranks.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say which checkpoint it is that cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, CheckpointException) as error:
        raise ValueError(
            f"{path} should be a whole checkpoint but cannot be read, as the error above says; "
            f"remove {path.parent} and begin again, or give another --out"
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Say nothing of it that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if ranks.device.type == "cuda" else state
