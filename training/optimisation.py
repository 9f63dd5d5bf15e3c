"""What changes the weights: parameter groups, learning rate, moving average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SCHEDULES = ("constant", "cosine")
MOST_EPOCHS = 1000  # of --epochs auto


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; names and units as the flags of ``args.py``.

    ``lr_eeg``: peak learning rate of the encoder; None: as the rest; ``epochs``: ``auto`` for as
    many as validation gets better, ``patience``: epochs that it may not.
    """

    epochs: int | str
    batch_size: int
    learning_rate: float
    lr_eeg: float | None
    schedule: str
    weight_decay: float
    warmup_steps: int
    grad_clip: float
    ema_decay: float
    seed: int
    epochs_per_call: int | None
    save_every: int
    val_every: int
    patience: int = 10

    @property
    def most_epochs(self) -> int:
        """That are trained at most."""
        return MOST_EPOCHS if isinstance(self.epochs, str) else self.epochs

    def enough(self, epochs: int, best: int) -> bool:
        """Whether training ends after so many, the best validation having been after ``best``."""
        return epochs >= self.most_epochs or (
            isinstance(self.epochs, str) and epochs - best >= self.patience
        )

    def share(self, step: int, steps: int) -> float:
        """Of the peak learning rate, at a step of ``steps``: linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def new_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over what is trainable, the encoder with a learning rate of its own.

    Where but a part of a model is adapted nothing decays: subjects share tensors, and those that
    are not trained now must not shrink.
    """
    whole = model.adapted == "all"
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    groups = []
    for of_encoder, peak in (
        (True, schedule.lr_eeg or schedule.learning_rate),
        (False, schedule.learning_rate),
    ):
        chosen = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and (id(parameter) in encoder) == of_encoder
        ]
        if chosen:
            groups.append({"params": chosen, "lr": peak, "peak": peak})
    return torch.optim.AdamW(
        groups, weight_decay=schedule.weight_decay if whole else 0.0, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


class Average:
    """Exponential moving average of a model's floating state, with the usual short start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [value.detach().clone() for value in _state(model)]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.values, _state(model), strict=True))
        moving = [pair for pair in pairs if pair[1].is_floating_point()]
        means, values = zip(*moving, strict=True)
        torch._foreach_lerp_(means, values, 1 - decay)  # on a GPU few kernels, not one for each
        for mean, value in pairs:
            if not value.is_floating_point():
                mean.copy_(value)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights, for validation and saving."""
        own = [value.detach().clone() for value in _state(model)]
        self.write_to(model)
        try:
            yield
        finally:
            _write(model, own)

    def write_to(self, model: nn.Module) -> None:
        """Make the averaged weights the model's own."""
        _write(model, self.values)


def _state(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers themselves, not the state dict, which takes stacks apart."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def _write(model: nn.Module, values: list[torch.Tensor]) -> None:
    for target, value in zip(_state(model), values, strict=True):
        target.copy_(value)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict that later steps do not change."""
    return {name: value.detach().clone() for name, value in state.items()}
