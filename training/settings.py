"""What a training run is asked to do, and the data it opens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

import util
from cli.config import Options
from datafiles.eeg_files import list_subjects
from dataset import Batch, TrainingData, open_training
from masking import Masking
from modalities import EACH
from rundirs.folds import WITHOUT
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

    def header(self) -> dict[str, Any]: ...

    def networks(self) -> list[nn.Module]: ...


def folds(options: Options) -> Iterator[Options]:
    """The runs of a call: one, or one without each subject in turn (``--leave_out each``).

    Raises UserError for a subject that is not there, or the only one.
    """
    values = options.values
    if values.leave_out is None:
        yield options
        return
    names = list_subjects(values.data_path, values.subjects)
    each = values.leave_out == EACH
    if len(names) < 2 or not (each or values.leave_out in names):
        raise util.UserError(
            "--leave_out",
            values.leave_out,
            f"{EACH}, or one of at least two subjects, here {', '.join(names)}",
            "check --data_path and --subjects",
        )
    for name in names if each else [values.leave_out]:
        changed = vars(values) | {
            "leave_out": name,
            "subjects": [other for other in names if other != name],
            "output_dir": values.output_dir / f"{WITHOUT}{name}" if each else values.output_dir,
        }
        yield replace(options, values=argparse.Namespace(**changed))


def open_data(values: argparse.Namespace, layer: str | None = None) -> TrainingData:
    """What the flags ask for, of ``subjects`` only; ``layer``: as of ``open_training``."""
    return open_training(
        values.data_path,
        values.clip_feature_path,
        values.subjects,
        values.channels,
        values.time_window,
        values.trials,
        values.val_fraction,
        values.seed,
        values.cache_dir,
        layer,
    )


def masking_from(values: argparse.Namespace) -> Masking:
    """A subject that is left out is unknown: its token must have been trained."""
    unknown = values.subject_dropout
    if unknown is None:
        unknown = UNKNOWN_SHARE if values.leave_out else 0.0
    return Masking(
        values.mask_channel, values.mask_time, values.mask_patch, values.mask_span, unknown
    )
