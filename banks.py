"""Feature banks, the output of stage 1: embeddings joined to stimuli by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import util
from modalities import NAMES
from stimuli import Stimulus
from util import DataError


@dataclass(frozen=True)
class Bank:
    """Embeddings {modality: float32 [N, D]} of a partition, with the stimulus id of each row."""

    features: dict[str, torch.Tensor]
    ids: list[int]
    clip: dict[str, Any]
    hash: str
    path: Path

    def rows_for(self, stimuli: Sequence[Stimulus]) -> dict[str, torch.Tensor]:
        """Features in the order of ``stimuli``, joined by id. DataError for stimuli it lacks."""
        if [item.id for item in stimuli] == self.ids:
            return self.features  # the usual case: no copy of what may be half of all memory
        place = {stimulus: row for row, stimulus in enumerate(self.ids)}
        lost = [item.key for item in stimuli if item.id not in place]
        if lost:
            raise DataError(
                self.path,
                f"no features of {len(lost)} of {len(stimuli)} pictures, e.g. {lost[0]}",
                "features of every picture",
                "run clip_feature_extractor.py on this DATA again",
            )
        rows = torch.tensor([place[item.id] for item in stimuli])
        return {name: features[rows] for name, features in self.features.items()}


def open_bank(folder: Path, partition: str) -> Bank:
    """A partition of the output of stage 1. DataError for an unfinished, damaged or NaN bank."""
    folder = Path(folder)
    path = folder / f"{partition}.safetensors"
    if not (folder / "DONE").exists():
        raise DataError(
            folder,
            "no finished feature bank" if folder.exists() else "no such folder",
            "the output of clip_feature_extractor.py",
            "run that stage; it goes on where it stopped",
        )
    features, header = util.load_tensors(path)
    stimulus = features.pop("stimulus", torch.empty(0, 0))
    ids = stimulus.flatten().tolist()
    whole = stimulus.ndim == 1 and stimulus.dtype == torch.int64 and len(set(ids)) == len(ids)
    identity = header.get("clip")
    if sorted(features) != sorted(NAMES) or not whole or not isinstance(identity, dict):
        raise DataError(
            path,
            f"tensors {sorted(features)}",
            f"{', '.join(NAMES)} and stimulus ids",
            "run clip_feature_extractor.py again",
        )
    for name, rows in features.items():
        fits = rows.ndim == 2 and len(rows) == len(ids) and rows.dtype == torch.float32
        if not fits or not torch.isfinite(rows).all():
            raise DataError(
                path,
                f"{name}: shape {tuple(rows.shape)}, or NaN",
                f"finite [{len(ids)}, D]",
                "run clip_feature_extractor.py again",
            )
    return Bank(features, ids, identity, util.file_hash(path), path)
