"""Shared by tests: small THINGS-EEG2 folders and feature banks whose values say their origin.

EEG = 1000 x subject + 10 x row + repetition + channel / 16 + sample / 1024, exact in float32, where
``channel`` belongs to the name, not to the position. Targets = row + modality / 8 in every column.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datafiles import stimuli
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import Stimulus, list_stimuli
from dataset import DataChoice, TrainingData, open_training
from modalities import NAMES
from rundirs.tensors import load_tensors, save_tensors

CHANNELS = ("Fz", "Cz", "Pz", "O1", "O2")
CLIP = {"model": "tiny", "weights": "0" * 8}
RATE_HZ = 100


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (value % 256, 0, 0)).save(path)


def write_pictures(root: Path, training: int = 6, images: int = 2, test: int = 3) -> None:
    """``training`` concepts x ``images``, and ``test`` other concepts x 1."""
    for concept in range(1, training + 1):
        for image in range(1, images + 1):
            name = f"{concept:05d}_train{concept}/train{concept}_{image}.png"
            write_picture(root / "training_images" / name, concept)
    for concept in range(1, test + 1):
        write_picture(root / "test_images" / f"{concept:05d}_test{concept}" / "a.png", concept)


def eeg_values(
    subject: int, rows: int, repetitions: int, channels: Sequence[str], samples: int
) -> np.ndarray:
    """float64 [rows, repetitions, C, samples], see the module's docstring."""
    row, repetition, sample = np.arange(rows), np.arange(repetitions), np.arange(samples)
    channel = np.array([CHANNELS.index(name) for name in channels])
    return (
        1000.0 * subject
        + 10 * row[:, None, None, None]
        + repetition[:, None, None]
        + channel[:, None] / 16
        + sample / 1024
    )


def published(
    subject: int = 0,
    rows: int = 12,
    repetitions: int = 4,
    channels: Sequence[str] = CHANNELS,
    samples: int = 20,
) -> dict[str, Any]:
    """A published file's content; its times hold 5 more samples, the baseline, as published."""
    return {
        "preprocessed_eeg_data": eeg_values(subject, rows, repetitions, channels, samples),
        "ch_names": list(channels),
        "times": np.arange(-5, samples) / RATE_HZ,
    }


def write_published(path: Path, content: Any, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_subject(root: Path, subject: int = 0, channels: Sequence[str] = CHANNELS) -> str:
    """Training and test EEG of ``sub-0{subject + 1}`` for the pictures below ``root``."""
    name = f"sub-{subject + 1:02d}"
    for partition in stimuli.PARTITIONS:
        content = published(subject, len(list_stimuli(root, partition)), 4, channels)
        write_published(eeg_file(root, name, partition), content)
    return name


def target(row: int, modality: str) -> float:
    return row + NAMES.index(modality) / 8


def bank_tensors(
    stimuli: Sequence[Stimulus], order: Sequence[int] | None = None, dim: int = 3
) -> dict[str, torch.Tensor]:
    """What clip_feature_extractor.write_partition writes, its rows in another ``order`` if any."""
    order = range(len(stimuli)) if order is None else order
    features = {
        name: torch.tensor([[target(row, name)] * dim for row in order], dtype=torch.float32)
        for name in NAMES
    }
    return features | {"stimulus": torch.tensor([stimuli[row].id for row in order])}


def write_bank(folder: Path, root: Path, order: Sequence[int] | None = None) -> Path:
    """A finished bank of the pictures below ``root``; ``order`` permutes the training rows."""
    for partition in stimuli.PARTITIONS:
        permuted = order if partition == "training" else None
        tensors = bank_tensors(list_stimuli(root, partition), permuted)
        save_tensors(folder / f"{partition}.safetensors", tensors, {"clip": CLIP})
    (folder / "DONE").write_text("{}")
    return folder


def write_world(root: Path, channel_orders: Sequence[Sequence[str]] = (CHANNELS,)) -> Path:
    """DATA with one subject per channel order, and its bank in ``root/bank``."""
    write_pictures(root)
    for subject, channels in enumerate(channel_orders):
        write_subject(root, subject, channels)
    write_bank(root / "bank", root)
    return root


def copied_bank(source: Path, target: Path, scale: float = 1.0, **header: object) -> Path:
    """A feature bank with other values or another header."""
    target.mkdir()
    (target / "DONE").write_text("{}")
    for partition in ("training", "test"):
        tensors, old = load_tensors(source / f"{partition}.safetensors")
        rows = {
            name: value * scale if name != "stimulus" else value for name, value in tensors.items()
        }
        save_tensors(target / f"{partition}.safetensors", rows, old | header)
    return target


def open_world(root: Path, **changed: Any) -> TrainingData:
    """The training data of a folder of :func:`write_world`, averaged."""
    given = {
        "data_path": root,
        "clip_feature_path": root / "bank",
        "trials": "average",
        "val_fraction": 0.2,
        "seed": 0,
    }
    return open_training(DataChoice(**(given | changed)))
