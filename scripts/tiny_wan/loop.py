"""One training loop for every stage: a budget of minutes, EMA weights, checkpoints to resume from, a loss curve."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .optim import build_optimizers, learning_rate


@dataclass
class Stage:
    """A training stage; `step(progress, generator)` returns the loss, progress runs from 0 to 1.

    The schedule follows minutes of work instead of a number of steps, so that it also completes on a slow machine.
    Therefore two runs with the same seed draw the same data, but may differ in their number of steps.
    """

    name: str
    modules: list[nn.Module]
    step: Callable[[float, torch.Generator], torch.Tensor]
    minutes: float
    lr: float
    adam_names: tuple[str, ...] = ()
    ema_decay: float = 0.99
    losses: list[tuple[float, float]] = field(default_factory=list)  # (minutes, loss)


def train(stage: Stage, folder: Path, seed: int, save_every: float = 30.0) -> None:
    """Trains until the budget is used up; resumes `folder/<name>.pt` if it exists, and writes the result there.

    Side effect: `stage.losses` is filled.
    """
    path = folder / f"{stage.name}.pt"
    averages = [copy.deepcopy(module).requires_grad_(False).eval() for module in stage.modules]
    optimizers = build_optimizers(stage.modules, stage.lr, stage.adam_names)
    generator = torch.Generator().manual_seed(seed)
    count, elapsed = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for target, state in zip(stage.modules + averages + optimizers, saved["states"], strict=True):
            target.load_state_dict(state)
        generator.set_state(saved["generator"])
        count, elapsed, stage.losses = saved["count"], saved["elapsed"], saved["losses"]

    def save() -> None:
        states = [item.state_dict() for item in stage.modules + averages + optimizers]
        saved = {"states": states, "generator": generator.get_state(), "count": count, "elapsed": elapsed}
        torch.save(saved | {"losses": stage.losses}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    device = next(stage.modules[0].parameters()).device
    budget = stage.minutes * 60
    last_save = elapsed
    with tqdm(total=round(budget), initial=round(elapsed), desc=stage.name, unit="s", mininterval=5) as bar:
        while elapsed < budget:
            start = work_seconds(device)
            progress = elapsed / budget
            loss = stage.step(progress, generator)
            _update(stage, optimizers, loss, learning_rate(progress, stage.lr))
            count += 1
            _average(averages, stage.modules, min(stage.ema_decay, count / (count + 10)))
            elapsed += work_seconds(device) - start
            stage.losses.append((elapsed / 60, loss.item()))
            bar.set_postfix(step=count, loss=f"{_recent(stage.losses):.4f}", refresh=False)
            bar.update(round(elapsed) - bar.n)
            if elapsed - last_save > save_every:
                save()
                last_save = elapsed
    save()


def work_seconds(device: torch.device) -> float:
    """A clock. On a CPU it counts processor time per thread, so that other load and pauses do not use up the budget."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()


def load_averages(path: Path, modules: list[nn.Module]) -> list[nn.Module]:
    """Loads the EMA weights of a stage's checkpoint into new `modules`, and sets eval mode."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run the stage {path.stem!r} first")
    states = torch.load(path, weights_only=True, map_location="cpu")["states"]
    for module, state in zip(modules, states[len(modules) :]):
        module.load_state_dict(state)
        module.requires_grad_(False).eval()
    return modules


def _update(stage: Stage, optimizers: list[torch.optim.Optimizer], loss: torch.Tensor, lr: float) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{stage.name}: the loss is {loss.item()}; resume from the checkpoint with a lower lr")
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss.backward()
    for module in stage.modules:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _average(averages: list[nn.Module], modules: list[nn.Module], decay: float) -> None:
    for average, module in zip(averages, modules):
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def _recent(losses: list[tuple[float, float]], window: int = 50) -> float:
    values = [loss for _, loss in losses[-window:]]
    return sum(values) / len(values)
