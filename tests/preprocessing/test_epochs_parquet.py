"""Alljoined1's parquet: a person's trials, joined with NSD's pictures by their numbers."""

from __future__ import annotations

from pathlib import Path

import builders
import mne
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file

NSD = {"training": (12, 345, 70_000), "test": (7, 8)}  # 73k_id
COCO = {number: 100_000 + number for one in NSD.values() for number in one}
ORDER = (12, 7, 345, 8, 70_000, 9, 12, 345, 70_000, 7, 8, 8)  # 9 is not in DATA


@pytest.fixture(params=["73k_id", "coco_id"])
def data(tmp_path, request) -> Path:
    """Pictures by one of the two numbers."""
    for partition, numbers in NSD.items():
        for place, number in enumerate(numbers, start=1):
            name = f"nsd{number:05d}" if request.param == "73k_id" else f"{COCO[number]:012d}"
            concept = f"{place:05d}_{partition}{place}"
            path = tmp_path / f"{partition}_images" / concept / f"{name}.png"
            builders.write_picture(path, number)
    return tmp_path


def value(number: int) -> np.ndarray:
    """Of the trial of a number, [64, 334], in volts."""
    return 1e-6 * (number + np.arange(64 * 334).reshape(64, 334) / 1000)


def rows(person: int = 3) -> list[dict]:
    return [
        {"EEG": (value(number) * (1 if person == 3 else 9)).tolist(), "subject_id": person,
         "session": 1, "block": 1, "trial": number, "73k_id": nsd, "coco_id": COCO.get(nsd, 5),
         "curr_time": 0.0}
        for number, nsd in enumerate(ORDER)
    ]  # fmt: skip


def saved(path: Path, table: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=4)
    return path


def run(data: Path, *flags: object, subject: str = "sub-03") -> int:
    call = ["--data_path", data, "--subjects", subject, *flags]
    return preprocess.main([str(flag) for flag in call])


def test_each_trial_is_of_its_picture(data, capsys):
    mixed = [row for pair in zip(rows(), rows(1), strict=True) for row in pair]
    file = saved(data / "train.parquet", mixed)
    assert run(data, "--epochs_file", file) == 0
    told = capsys.readouterr().out
    assert "3 pictures x 2 repetitions x 64 sensors x 334 samples" in told
    assert "1 trials show no picture" in told
    cap = mne.channels.make_standard_montage("biosemi64").ch_names
    for partition, numbers in NSD.items():
        eeg, channels, times = things_eeg2.parse_published(eeg_file(data, "sub-03", partition))[:3]
        assert list(channels) == cap and np.allclose(times, np.arange(334) / 512 - 0.05)
        for row, nsd in zip(eeg, numbers, strict=True):
            found = [round(float(trial[0, 0]) * 1e6) for trial in row]
            assert {ORDER[number] for number in found} == {nsd} and len(set(found)) == 2
            for number, trial in zip(found, row, strict=True):
                np.testing.assert_allclose(trial, value(number), rtol=1e-5)


def test_both_files_of_the_split_are_one_person_s(data):
    one, two = saved(data / "a.parquet", rows()[:5]), saved(data / "b.parquet", rows()[5:])
    assert run(data, "--epochs_file", one, two) == 0
    eeg = things_eeg2.parse_published(eeg_file(data, "sub-03", "test")).eeg
    assert eeg.shape == (2, 2, 64, 334)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: {**row, "EEG": row["EEG"][:63]}, "64 channels x 334"),
        (lambda row: {key: row[key] for key in row if key != "coco_id"}, "also coco_id"),
        (lambda row: {**row, "73k_id": 1, "coco_id": 1}, "names end in that number"),
        (lambda row: {**row, "subject_id": 8}, "no trial of subject_id 3"),
        (lambda row: {**row, "EEG": (1e9 * np.array(row["EEG"])).tolist()}, "EEG has about"),
        (lambda row: {**row, "EEG": [[float("nan")] * 334] * 64}, "NaN"),
    ],
)
def test_other_tables_are_refused(data, capsys, change, told):
    file = saved(data / "a.parquet", [change(row) for row in rows()])
    assert run(data, "--epochs_file", file) == 1
    assert told in capsys.readouterr().err
    assert not (data / "Preprocessed_data_250Hz").exists()


def test_a_name_without_a_number_is_told(data, capsys):
    file = saved(data / "a.parquet", rows())
    assert run(data, "--epochs_file", file, subject="sub-anna") == 1
    assert "as sub-03" in capsys.readouterr().err


def test_what_a_killed_call_left_is_no_subject(data, capsys):
    """Its folder gets its name when both files are whole."""
    left = data / "Preprocessed_data_250Hz" / ".sub-03.tmp"
    left.mkdir(parents=True)
    (left / "preprocessed_eeg_training.npy").write_bytes(b"half")
    file = saved(data / "a.parquet", rows())
    assert run(data, "--epochs_file", file) == 0
    assert not left.exists()
    assert things_eeg2.parse_published(eeg_file(data, "sub-03", "training")).eeg.shape[0] == 3
