"""Stage 0 on damaged, incomplete and hostile files of THINGS-EEG2's layout, and on full disks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_preprocess import NOISE, run
from helpers_raw import (
    published_raw,
    session_file,
    shuffled_codes,
    simulate,
    write_raw,
    write_subject,
)

from preprocessing import sessions
from preprocessing.channels import THINGS_CHANNELS


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """DATA with one subject of two noisy sessions."""
    return write_subject(tmp_path_factory.mktemp("noisy"), noise=NOISE)


def _refused(capsys, code: int, root: Path, *flags: object, sessions: int = 1) -> str:
    """The message of a refusal, with nothing written but a run's own records."""
    assert run(root, *flags, sessions=sessions) == code
    told = capsys.readouterr().err
    assert "expected:" in told and "cure:" in told
    assert not list(root.rglob("preprocessed_eeg_*"))
    return told


def _change(content):
    """{fault: (change to the content of a training file, what is told)}."""
    data, names = content["raw_eeg_data"], content["ch_names"]

    def broken(row: int, value: float):
        copy = data.copy()
        copy[row, 100:] = value
        if value == 0:
            copy[row] = 3.0
        return {"raw_eeg_data": copy}

    other = [name if name != "stim" else "status" for name in names]
    twice = ["Cz" if name == "Pz" else name for name in names]
    fz = ["Fz" if name == "Cz" else name for name in names]
    few = data.copy()
    few[-1] = np.where(few[-1] == 2, 0, few[-1])
    blank = data.copy()
    blank[-1] = 0
    once = data.copy()
    once[-1, np.flatnonzero(once[-1] == 2)[0]] = 0
    return {
        "no rate": ({"sfreq": "fast"}, "values of another kind"),
        "rate 0": ({"sfreq": 0}, "sfreq 0"),
        "rate NaN": ({"sfreq": float("nan")}, "sfreq nan"),
        "duplicate": ({"ch_names": twice}, "duplicate channel names: Cz"),
        "flat": (broken(3, 0), "flat channels: AF3"),
        "NaN": (broken(3, np.nan), "NaN or infinity in channel AF3 at sample 100"),
        "no stim": ({"ch_names": other, "ch_types": ["eeg"] * 63 + ["misc"]}, "no channel stim"),
        "Fz for Cz": ({"ch_names": fz}, "no channel Cz"),
        "shape": ({"raw_eeg_data": data[:5]}, "for 64 names"),
        "picture lost": ({"raw_eeg_data": few}, "no trial of 1 pictures, e.g. picture 2"),
        "no trials": ({"raw_eeg_data": blank}, "no trial of 1 pictures"),
        "shown once": ({"raw_eeg_data": once}, "picture 2 was shown 1 times"),
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Raw content of a noisy session by partition."""
    made = {}
    for partition, pictures, repetitions in (("training", 3, 2), ("test", 1, 20)):
        raw, events = simulate(shuffled_codes(pictures, repetitions, 1), THINGS_CHANNELS, NOISE)
        made[partition] = published_raw(raw, events)
    return made


FAULTS = (
    "no rate",
    "rate 0",
    "rate NaN",
    "duplicate",
    "flat",
    "NaN",
    "no stim",
    "no trials",
    "Fz for Cz",
    "shape",
    "picture lost",
    "shown once",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_raw_file_are_told(clean, tmp_path, capsys, fault):
    change, told = _change(clean["training"])[fault]
    write_raw(session_file(tmp_path, "sub-01", 1, "training"), clean["training"] | change)
    write_raw(session_file(tmp_path, "sub-01", 1, "test"), clean["test"])
    message = _refused(capsys, 1, tmp_path)
    assert told in message
    assert "raw_eeg_training.npy" in message or "sub-01: training trials" in message


def _bomb(path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'ran'}",)

    np.save(path, {"raw_eeg_data": Bomb()}, allow_pickle=True)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other(path: Path) -> None:
    np.save(path, np.zeros(3))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_bomb, "refused: the file asks to load"),
        (_cut_short, "unreadable"),
        (_empty, "0 bytes"),
        (_other, "without channel names"),
        (Path.unlink, "no such file; there are ses-01"),
    ],
)
def test_damaged_files_are_told_and_never_run(clean, tmp_path, capsys, damage, told):
    path = session_file(tmp_path, "sub-01", 1, "training")
    write_raw(path, clean["training"])
    write_raw(session_file(tmp_path, "sub-01", 1, "test"), clean["test"])
    damage(path)
    message = _refused(capsys, 1, tmp_path)
    assert told in message and "raw_eeg_training.npy" in message
    assert not list(tmp_path.rglob("ran"))


def test_a_missing_session_is_named(noisy, tmp_path, capsys):
    assert run(noisy, "--output_path", tmp_path, sessions=4) == 1
    told = capsys.readouterr().err
    assert "ses-03" in told and "there are ses-01, ses-02" in told and "--sessions N" in told


def test_no_raw_data_and_unknown_subjects_are_told(noisy, tmp_path, capsys):
    assert run(tmp_path) == 1
    assert "--raw" in capsys.readouterr().err
    assert run(noisy, "--subjects", "sub-09") == 2
    assert "some of sub-01" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_told(noisy, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(noisy, "--output_path", tmp_path / "file") == 2
    assert "a directory that can be written" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_told(noisy, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert run(noisy, "--output_path", tmp_path / "out") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_full_disk_is_told_before_it_is_full(noisy, tmp_path, capsys, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(sessions.shutil, "disk_usage", lambda _: Usage)
    assert run(noisy, "--output_path", tmp_path) == 1
    assert "GB free" in capsys.readouterr().err


def test_too_few_sessions_are_refused_before_the_first_is_cut(tmp_path, capsys):
    """Each session of THINGS-EEG2 shows a part of the pictures."""
    for session, codes in ((1, [1, 1, 2, 2]), (2, [3, 3, 4, 4])):
        for partition in ("training", "test"):
            shown = codes if partition == "training" else [*[1] * 20, *[2] * 20]
            raw, events = simulate(shown, THINGS_CHANNELS, NOISE, seed=session)
            write_raw(session_file(tmp_path, "sub-01", session, partition),
                      published_raw(raw, events))  # fmt: skip
    later = session_file(tmp_path, "sub-01", 1, "training")
    later.unlink()
    raw, events = simulate([1, 1, 4, 4], THINGS_CHANNELS, NOISE, seed=9)
    write_raw(later, published_raw(raw, events))
    told = _refused(capsys, 1, tmp_path)
    assert "no trial of 2 pictures, e.g. picture 2" in told and "--sessions" in told
    assert not (tmp_path / "Preprocessed_data_250Hz").exists()
    told = _refused(capsys, 1, tmp_path, sessions=2)
    assert "no trial of 1 pictures, e.g. picture 2" in told


@pytest.mark.parametrize("other", ["session", "partition", "subject"])
def test_a_file_that_is_another_s_copy_is_refused(tmp_path, capsys, other):
    write_subject(tmp_path, noise=NOISE)
    write_subject(tmp_path, "sub-02", noise=0.9 * NOISE)
    source = session_file(tmp_path, "sub-01", 1, "training")
    copy = {
        "session": session_file(tmp_path, "sub-01", 2, "training"),
        "partition": session_file(tmp_path, "sub-01", 1, "test"),
        "subject": session_file(tmp_path, "sub-02", 1, "training"),
    }[other]
    shutil.copy(source, copy)
    told = _refused(capsys, 1, tmp_path, sessions=2)
    assert f"the same signal as {source}" in told or f"the same signal as {copy}" in told


def test_sessions_in_another_unit_are_refused(tmp_path, capsys):
    write_subject(tmp_path, noise=NOISE, sessions=1)
    for partition, codes in (("training", [1, 1, 2, 2, 3, 3, 4, 4]), ("test", [1] * 20 + [2] * 20)):
        raw, events = simulate(codes, THINGS_CHANNELS, 150 * NOISE, seed=4, height_v=1e-3)
        write_raw(session_file(tmp_path, "sub-01", 2, partition), published_raw(raw, events))
    assert "one unit for all sessions" in _refused(capsys, 1, tmp_path, sessions=2)
