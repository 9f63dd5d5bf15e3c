"""What a training run is asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import util
from datafiles.eeg_files import list_subjects
from dataset import Batch
from masking import Masking
from modalities import EACH
from rundirs.folds import WITHOUT
from training.optimisation import Schedule
from util import Part

UNKNOWN_SHARE = 0.2  # of samples whose subject stays unknown, where one is left out


@dataclass(frozen=True)
class Computing:
    """How a step is computed; names as the flags of ``args.py``."""

    precision: str
    accumulate: int
    compile: bool
    data_on_device: str
    report_to: str


@dataclass(frozen=True)
class Disturbance:
    """What is hidden from the model while it learns; names as the flags of ``args.py``."""

    mask_channel: float
    mask_time: float
    mask_patch: float
    mask_span: int
    subject_dropout: float | None
    leave_out: str | None

    def masking(self) -> Masking:
        """A subject that is left out is unknown: its token must have been trained."""
        unknown = self.subject_dropout
        if unknown is None:
            unknown = UNKNOWN_SHARE if self.leave_out else 0.0
        return Masking(self.mask_channel, self.mask_time, self.mask_patch, self.mask_span, unknown)


@dataclass(frozen=True)
class Procedure:
    """How a model is fitted, whatever it is."""

    schedule: Schedule
    computing: Computing
    masking: Masking


@dataclass(frozen=True)
class Fold:
    """One of a call's runs: its seed, whom it leaves out, where it is; names as ``args.py``'s."""

    data_path: Path
    subjects: list[str] | None
    dataset: str
    leave_out: str | None
    seed: int
    seeds: list[int] | None
    output_dir: Path


class Objective(Protocol):
    """What is learned: ``losses`` of a part of a batch, with the total under ``loss``.

    ``validate``, on held-out concepts, returns scores and, under ``select``, the one that chooses
    ``best`` (higher is better); nothing at all where no concepts are held out.
    """

    def losses(
        self, batch: Batch, generator: torch.Generator, part: Part
    ) -> dict[str, torch.Tensor]: ...

    def validate(self) -> dict[str, float]: ...


class Trainable(Protocol):
    """A module that says how to rebuild it, and which of its networks compute most."""

    encoder: nn.Module
    adapted: str  # what of it is trained, as ``--trainable``

    def header(self) -> dict[str, Any]: ...

    def recall(self, header: Mapping[str, Any]) -> None: ...

    def networks(self) -> list[nn.Module]: ...


def folds(asked: Fold) -> Iterator[Fold]:
    """The runs of a call: one, or one with each of ``--seeds``, without each subject in turn.

    Raises UserError for a subject that is not there, or the only one.
    """
    for seed in asked.seeds or ():
        folder = asked.output_dir / f"seed_{seed}"
        yield from folds(replace(asked, seed=seed, seeds=None, output_dir=folder))
    if asked.seeds:
        return
    if asked.leave_out is None:
        yield asked
        return
    names = list_subjects(asked.data_path, asked.subjects, asked.dataset)
    each = asked.leave_out == EACH
    if len(names) < 2 or not (each or asked.leave_out in names):
        raise util.UserError(
            "--leave_out",
            asked.leave_out,
            f"{EACH}, or one of at least two subjects, here {', '.join(names)}",
            "check --data_path and --subjects",
        )
    for name in names if each else [asked.leave_out]:
        yield replace(
            asked,
            leave_out=name,
            subjects=[other for other in names if other != name],
            output_dir=asked.output_dir / f"{WITHOUT}{name}" if each else asked.output_dir,
        )
