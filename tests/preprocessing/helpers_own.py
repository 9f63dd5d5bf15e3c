"""Users' own recordings in miniature: four pictures with known responses, called as users call."""

from __future__ import annotations

from pathlib import Path

import builders
import numpy as np
from helpers_raw import CAP_32, RATE_HZ, response, simulate, write_events

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file

PICTURES = (
    "training_images/00001_face/anna.png",
    "training_images/00001_face/ben.png",
    "training_images/00002_house/barn.png",
    "test_images/00001_boat/boat.png",
)
CODES = [1, 2, 3, 4] * 3  # 1-based places in PICTURES


def write_data(root: Path) -> Path:
    for number, key in enumerate(PICTURES):
        builders.write_picture(root / key, number)
    return root


def recording(names=CAP_32, rate_hz: float = RATE_HZ, codes=CODES):
    """Recording without noise, and its lines (onset_s, stimulus)."""
    noise = np.eye(len(names)) * 1e-9  # no channel is flat
    raw, events = simulate(codes, names, noise, rate_hz=rate_hz)
    lines = [(onset / rate_hz, PICTURES[code - 1]) for onset, _, code in events.tolist()]
    return raw, events, lines


def save(root: Path, raw, lines, head: str = "onset,stimulus", ends: str = "\n") -> tuple[str, ...]:
    """Flags for a FIF file and its table."""
    raw.save(root / "a_raw.fif", overwrite=True, verbose="error")
    rows = [",".join(map(str, line)) for line in lines]
    table = write_events(root / "a.csv", head, rows, ends)
    return ("--raw", str(root / "a_raw.fif"), "--events", str(table))


def run(root: Path, *flags: object) -> int:
    tokens = ["--data_path", root, "--subjects", "sub-01", "--no-whiten", *flags]
    return preprocess.main([str(token) for token in tokens])


def check_responses(root: Path, names=CAP_32, tolerance: float = 0.03) -> None:
    """Every picture's row holds that picture's response."""
    row = 0
    for partition, pictures in (("training", 3), ("test", 1)):
        eeg, found, times = things_eeg2.parse_published(eeg_file(root, "sub-01", partition))[:3]
        assert found == list(names) and len(eeg) == pictures
        for trials in eeg:
            known = response(row + 1, len(names), np.asarray(times))
            assert np.abs(trials - known).max() < tolerance * np.abs(known).max()
            row += 1
