"""Trials that MNE cut already: joined by name, in the same files as from the recording."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mne
import numpy as np
import pytest
from helpers_own import PICTURES, write_data

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import list_stimuli

ORDER = (2, 0, 3, 1, 0, 3, 2, 1, 3, 0, 2)  # places in PICTURES; 1 has two trials, the others three
SENSORS = ["MLC11-1609", "MRT23-1609", "MZO01-1609"]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path)


def value(number: int) -> np.ndarray:
    """Of the trial of a number, float32 [3, 21], in tesla."""
    return 1e-13 * (number + np.arange(63, dtype=np.float32).reshape(3, 21) / 100)


def epochs(names: list[str], column: str | None = "image_path", kind: str = "mag"):
    """Trials of ``names``, which are in the metadata, or the names of the events."""
    info = mne.create_info([*SENSORS, "UPPT001"], 200, [*[kind] * 3, "stim"])
    eeg = np.stack([value(number) for number in range(len(names))])
    eeg = np.concatenate([eeg, np.ones((len(names), 1, 21))], axis=1)
    known = sorted(set(names))
    codes = [known.index(name) + 1 for name in names]
    events = np.c_[np.arange(len(names)) * 100, np.zeros(len(names)), codes].astype(int)
    metadata = None
    if column:
        metadata = [{"trial_type": "exp", column: name} for name in names]
        if importlib.util.find_spec("pandas"):
            import pandas

            metadata = pandas.DataFrame(metadata)
    event_id = {name: known.index(name) + 1 for name in known}
    return mne.EpochsArray(eeg, info, events, 0.0, event_id, metadata=metadata, verbose="error")


def shown(extra: list[str]) -> list[str]:
    names = [f"images_meg/thing/{PICTURES[place].rsplit('/', 1)[1]}" for place in ORDER]
    return [*extra, *names]


def run(data: Path, *flags: object) -> int:
    call = ["--data_path", data, "--subjects", "sub-01", *flags]
    return preprocess.main([str(flag) for flag in call])


def saved(path: Path, of: mne.BaseEpochs) -> Path:
    of.save(path, overwrite=True, verbose="error")
    return path


@pytest.mark.parametrize("column", ["image_path", "stimulus", None])
def test_each_trial_is_of_its_picture(data, capsys, column):
    """By metadata or by the events' names; catch trials are left out; two of each, as of one."""
    names = shown(["images_catch_meg/catch/catch_01.jpg"])
    file = saved(data / "P1-epo.fif", epochs(names, column))
    assert run(data, "--epochs_file", file) == 0
    told = capsys.readouterr().out
    assert "3 pictures x 2 repetitions x 3 sensors x 21 samples" in told
    assert "1 pictures x 3 repetitions" in told and "1 trials show no picture" in told
    for partition in ("training", "test"):
        eeg, channels, times = things_eeg2.parse_published(eeg_file(data, "sub-01", partition))[:3]
        assert channels == SENSORS and np.allclose(times, np.arange(21) / 200)
        for row, item in enumerate(list_stimuli(data, partition)):
            place = PICTURES.index(item.key)
            numbers = {1 + number for number, at in enumerate(ORDER) if at == place}
            found = [round(float(trial[0, 0] / 1e-13)) for trial in eeg[row]]
            assert set(found) <= numbers and len(set(found)) == len(found)
            for number, trial in zip(found, eeg[row], strict=True):
                np.testing.assert_allclose(trial, value(number), rtol=1e-5)


def test_several_files_are_one_person_s(data):
    names = shown([])
    one = saved(data / "a-epo.fif", epochs(names[:6]))
    two = saved(data / "b-epo.fif", epochs(names[6:]))
    assert run(data, "--epochs_file", one, two) == 0
    eeg = things_eeg2.parse_published(eeg_file(data, "sub-01", "test")).eeg
    assert eeg.shape == (1, 3, 3, 21)
    other = epochs(names[6:]).crop(0, 0.05)
    assert run(data / "..", "--epochs_file", one, two) == 1
    files = one, saved(data / "c-epo.fif", other)
    assert run(data, "--output_path", data / "out", "--epochs_file", *files) == 1
    assert not (data / "out").exists()


def test_a_dry_run_writes_nothing(data, capsys):
    file = saved(data / "P1-epo.fif", epochs(shown([])))
    assert run(data, "--epochs_file", file, "--dry_run") == 0
    assert "2 repetitions" in capsys.readouterr().out
    assert not (data / "Preprocessed_data_250Hz").exists()
    assert run(data, "--epochs_file", file) == 0
    assert run(data, "--epochs_file", file) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "column", "told"),
    [(["zebra.jpg"] * 3, "image_path", "by their file names"),
     (shown([]), "remark", "metadata of trial_type, remark"),
     (shown([])[:2], "image_path", "no trial of")],
)  # fmt: skip
def test_trials_of_nothing_are_told(data, capsys, names, column, told):
    file = saved(data / "P1-epo.fif", epochs(names, column))
    assert run(data, "--epochs_file", file) == 1
    assert told in capsys.readouterr().err


def test_a_damaged_file_and_flags_of_cutting_are_told(data, capsys):
    file = saved(data / "P1-epo.fif", epochs(shown([])))
    content = file.read_bytes()
    for end in (0, 100, len(content) // 2):
        file.write_bytes(content[:end])
        assert run(data, "--epochs_file", file) == 1
        assert "Traceback" not in capsys.readouterr().err
    for flags in (["--rate", 100], ["--no-whiten"], ["--raw", "x"]):
        assert run(data, "--epochs_file", file, *flags) == 2
        assert "taken as they are" in capsys.readouterr().err
