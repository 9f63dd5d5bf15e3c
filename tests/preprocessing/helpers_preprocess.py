"""Preprocessing of raw THINGS-EEG2 in miniature, called as users call it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file

NOISE = np.eye(63) * 1e-6 + np.random.default_rng(0).normal(size=(63, 63)) * 3e-7


def run(root: Path, *flags: object, sessions: int = 2) -> int:
    return preprocess.main(
        ["--data_path", str(root), "--sessions", str(sessions), *map(str, flags)]
    )


def read(root: Path, partition: str, subject: str = "sub-01"):
    return things_eeg2.parse_published(eeg_file(root, subject, partition))[:3]
