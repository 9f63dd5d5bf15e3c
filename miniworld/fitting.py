"""The loop that trains one part of the miniatures: saved, resumed, averaged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import util
from miniworld import models
from rundirs.files import append_jsonl
from rundirs.tensors import save_torch
from training import optimisation

SAVE_EVERY_S = 30
WARMUP_STEPS = 100
COOLDOWN = 0.3  # share of the steps over which the learning rate falls to nothing


class Pretrained(Protocol):
    """Something to train: ``model`` holds all trained parameters."""

    name: str
    model: nn.Module
    learning_rate: float
    weight_decay: float  # of matrices and kernels; norms and biases have none
    ema_decay: float

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Losses of a batch, the total under ``loss``; torch's global generator is seeded."""
        ...

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        """Write the model, trained, where its users expect it."""
        ...


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, constant, linear cool-down."""
    left = (steps - step) / max(1, round(COOLDOWN * steps))
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


class Training:
    """Optimiser, averaged weights and step of a part, saved as one file."""

    def __init__(self, part: Pretrained, path: Path) -> None:
        self.part, self.path, self.step = part, path, 0
        every = list(part.model.parameters())
        groups = [
            {"params": [p for p in every if p.ndim > 1], "weight_decay": part.weight_decay},
            {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, part.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.average = optimisation.Average(part.model, part.ema_decay)
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=every[0].device)
            part.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values = state["average"]
            self.step = state["step"]

    def save(self, mean_loss: float) -> None:
        """Raises DataError if ``mean_loss``, of all steps since the last time, is not finite."""
        if not math.isfinite(mean_loss):
            raise util.DataError(
                f"{self.part.name}, before step {self.step}",
                "a loss that is not finite",
                "finite numbers",
                f"the last checkpoint is kept in {self.path}; lower the learning rate",
            )
        state = {
            "model": self.part.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
        }
        save_torch(self.path, state)

    def update(self, steps: int, seed: int) -> dict[str, torch.Tensor]:
        """One optimiser step; returns its losses."""
        torch.manual_seed(util.seed_for(seed, self.part.name, self.step))
        random = util.numpy_generator_for(seed, self.part.name, "batch", self.step)
        losses = self.part.losses(self.step, random)
        for group in self.optimizer.param_groups:
            group["lr"] = self.part.learning_rate * rate_share(self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.part.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.part.model, self.step)
        return losses


def fit_part(part: Pretrained, steps: int, folder: Path, seed: int, stops: Sequence[str]) -> None:
    """Train to ``steps``, resuming; leaves the averaged weights in ``part.model``.

    ``stops``: signals received; Preempted is raised after saving. Raises DataError, too.
    """
    from rundirs.progress import Progress

    training = Training(part, folder / part.name / "state.pt")
    saved, sums, first = time.monotonic(), {}, training.step
    part.model.train()
    with Progress(total=steps, initial=first, desc=part.name, unit="step") as bar:
        while training.step < steps:
            for name, value in training.update(steps, seed).items():
                # not as a number, which a GPU would be waited for
                sums[name] = sums.get(name, 0.0) + value.detach()
            bar.update()
            late = time.monotonic() - saved > SAVE_EVERY_S
            if late or stops or training.step == steps:
                done = training.step - first
                means = {name: float(value) / done for name, value in sums.items()}
                training.save(means["loss"])
                record = {"part": part.name, "step": training.step, **means}
                append_jsonl(folder / "metrics.jsonl", record)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
                saved, sums, first = time.monotonic(), {}, training.step
            if stops and training.step < steps:
                raise util.Preempted(
                    f"{part.name}: saved at step {training.step} of {steps}; "
                    "the same command goes on"
                )
    training.average.write_to(part.model)
    part.model.eval()
