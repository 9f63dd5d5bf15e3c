"""Every flag of preprocess.py changes what it writes, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_flags import Stage, idle_flags
from helpers_own import CODES, PICTURES, save, write_data
from helpers_raw import CAP_32, RATE_HZ, simulate, write_subject

import preprocess


def own_recordings(root: Path) -> Stage:
    """A recording with noise, one of whose channels lies apart, and a marked segment."""
    write_data(root)
    raw, events = simulate(CODES, CAP_32, np.eye(len(CAP_32)) * 1e-6)
    raw.annotations.append(events[0, 0] / RATE_HZ, 0.1, "BAD_blink")
    lines = [(onset / RATE_HZ, PICTURES[code - 1]) for onset, _, code in events.tolist()]
    flags = save(root, raw, lines)
    return Stage(
        "preprocess", preprocess.main, "output_path",
        ["--data_path", root, "--subjects", "sub-01", *flags],
        {"subjects": "sub-07", "unit": "mV", "channels": "O1", "reference": "average",
         "band_pass": ["--band_pass", 1, 40], "epoch": ["--epoch", -0.1, 0.8], "rate": 100,
         "min_distance": 5, "interpolate_missing": (["--channels", "O1", "Fpz", "PO7"],
                                                    ["--interpolate_missing"]),
         "sessions": 3, "epochs_file": "nowhere-epo.fif"},
    )  # fmt: skip


def published(root: Path) -> Stage:
    """Two sessions in THINGS-EEG2's form."""
    write_subject(root, "sub-01", sessions=2)
    return Stage(
        "preprocess", preprocess.main, "output_path", ["--data_path", root, "--sessions", 2], {}
    )


OF_THE_PUBLISHED = {"sessions", "seed"}  # whose order of repetitions is drawn


def test_no_flag_is_idle(tmp_path: Path) -> None:
    assert idle_flags(own_recordings(tmp_path / "data"), tmp_path) == ([], [])


@pytest.mark.parametrize("flag", sorted(OF_THE_PUBLISHED))
def test_no_flag_of_the_published_form_is_idle(tmp_path: Path, flag: str) -> None:
    stage = published(tmp_path / "data")
    code, plain = stage.run(tmp_path / "plain")
    changed = stage.run(tmp_path / "changed", f"--{flag}", 3)
    assert code == 0 and plain and changed != (0, plain)
