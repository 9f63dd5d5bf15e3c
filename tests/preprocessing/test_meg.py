"""Continuous recordings of MEG: the same numbers as of EEG in tesla, and THINGS-MEG's tables."""

from __future__ import annotations

from pathlib import Path

import mne
import numpy as np
import pytest
from helpers_own import CODES, PICTURES, recording, run, save, write_data
from helpers_raw import CAP_32, RATE_HZ, write_events

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file
from preprocessing import quality

SENSORS = [
    f"M{side}{lobe}{number}-1609" for side in "LR" for lobe in "CFOPT" for number in (11, 12, 13)
]
OTHERS = {"BG1-1609": "ref_meg", "EEG057-1609": "eeg", "UPPT001": "stim"}
TESLA = 1e-7  # a volt of EEG's


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(quality, "draw_quality", lambda *_: None)
    return write_data(tmp_path)


def meg(kind: str = "mag", scale: float = TESLA, codes=CODES):
    """The recording of EEG in tesla, beside channels that are no sensor; (recording, lines)."""
    raw, _, lines = recording(CAP_32[:30], codes=codes)
    info = mne.create_info([*SENSORS, *OTHERS], RATE_HZ, [*[kind] * 30, *OTHERS.values()])
    signal = raw.get_data() * scale
    return mne.io.RawArray(np.r_[signal, signal[:3]], info, verbose="error"), lines


def written(root: Path, partition: str = "training") -> np.ndarray:
    eeg, names, _ = things_eeg2.parse_published(eeg_file(root, "sub-01", partition))[:3]
    assert names == SENSORS
    return np.asarray(eeg)


def test_a_recording_of_meg_in_tesla(data):
    raw, lines = meg()
    assert run(data, *save(data, raw, lines)) == 0
    text = next(data.rglob("quality.md")).read_text(encoding="utf-8")
    assert "fT" in text and "µV" not in text
    assert "left out BG1-1609 (of type ref_meg, beside MEG)" in text
    expected = written(data) / TESLA
    (data / "Preprocessed_data_250Hz").rename(data / "of_meg")
    raw, _, lines = recording(CAP_32[:30])
    assert run(data, *save(data, raw, lines)) == 0
    eeg = things_eeg2.parse_published(eeg_file(data, "sub-01", "training"))[0]
    np.testing.assert_allclose(expected, eeg, rtol=1e-5, atol=1e-5 * np.abs(eeg).max())


def test_filtered_and_whitened_as_eeg_is(data):
    flags = ("--band_pass", 0.5, 30, "--whiten", "--n_jobs", 1)
    raw, lines = meg()
    assert run(data, *save(data, raw, lines), *flags) == 0
    found = written(data)
    (data / "Preprocessed_data_250Hz").rename(data / "of_meg")
    raw, _, lines = recording(CAP_32[:30])
    assert run(data, *save(data, raw, lines), *flags) == 0
    eeg = things_eeg2.parse_published(eeg_file(data, "sub-01", "training"))[0]
    np.testing.assert_allclose(found, eeg, atol=1e-3 * np.abs(eeg).max())


def test_of_two_types_of_sensors_the_more_numerous_are_taken(data):
    raw, lines = meg("grad")
    raw.set_channel_types(dict.fromkeys(SENSORS[:10], "mag"), verbose="error")
    assert run(data, *save(data, raw, lines)) == 0
    found = things_eeg2.parse_published(eeg_file(data, "sub-01", "training"))[1]
    assert found == SENSORS[10:]
    assert "of type mag, beside MEG" in next(data.rglob("quality.md")).read_text(encoding="utf-8")


@pytest.mark.parametrize(("electrodes", "more"), [(20, ()), (8, ("--channels", *CAP_32[:3]))])
def test_of_both_what_there_is_more_of_or_what_is_named(data, electrodes, more):
    """EEG beside MEG stays EEG where there is more of it, or where it is asked for."""
    raw, _, lines = recording(CAP_32[:30])
    raw.set_channel_types(dict.fromkeys(CAP_32[electrodes:30], "mag"), verbose="error")
    assert run(data, *save(data, raw, lines), *more) == 0
    found = things_eeg2.parse_published(eeg_file(data, "sub-01", "training"))[1]
    assert list(found) == list(CAP_32[:3] if more else CAP_32[:electrodes])
    assert "µV" in next(data.rglob("quality.md")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--unit", "uV"), ("--unit", "MEG is in tesla")),
        (("--reference", "average"), ("--reference", "electrodes")),
        (("--interpolate_missing",), ("--interpolate_missing", "electrodes")),
    ],
)
def test_what_is_for_electrodes_is_refused(data, capsys, flags, words):
    raw, lines = meg()
    assert run(data, *save(data, raw, lines), *flags) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert not list(data.rglob("preprocessed_eeg_*"))


@pytest.mark.parametrize("scale", [1e8 * TESLA, 1e-6 * TESLA])  # fT, ...
def test_amplitudes_that_no_meg_has_are_refused(data, capsys, scale):
    raw, lines = meg(scale=scale)
    assert run(data, *save(data, raw, lines)) == 1
    assert "MEG has about 1e-12" in capsys.readouterr().err


# ---------------------------------------------------------------- ds004212

NUMBER = {PICTURES[place]: 100 + place for place in range(4)}


def things_meg(root: Path, codes=CODES, shift: int = 0, lost: int = 0) -> Path:
    """A run in ds004212's layout with a catch trial first; its recording.

    ``shift``: the table of pictures begins so many events later; ``lost``: events it lacks.
    """
    raw, lines = meg(codes=codes)
    folder = root / "ds004212" / "sub-BIGMEG1" / "ses-01" / "meg"
    folder.mkdir(parents=True)
    stem = "sub-BIGMEG1_ses-01_task-main_run-02"
    raw.save(folder / f"{stem}_meg.fif", verbose="error")
    samples = [round(onset * RATE_HZ) for onset, _ in lines]
    keys = [key for _, key in lines]
    events = [
        f"{at / RATE_HZ}\t0.5\texp\t{NUMBER[key]}\t{at}"
        for at, key in zip(samples, keys, strict=True)
    ]
    first = f"{samples[0] / RATE_HZ / 2}\t0.5\tcatch\tn/a\t{samples[0] // 2}"
    head = "onset\tduration\ttrial_type\tvalue\tsample"
    write_events(folder / f"{stem}_events.tsv", head, [first, *events])
    shown = [("images_catch_meg/catch047.jpg", 999999)]
    shown += [(f"images_meg/{key.split('/')[-1]}", NUMBER[key]) for key in keys]
    shown = [*shown[:1], *np.roll(np.array(shown[1:], object), shift, axis=0)]
    rows = [f"exp,1,1,{path},{number}" for path, number in shown[:3]]  # of another run
    rows += [f"exp,1,2,{path},{number}" for path, number in shown[: len(shown) - lost]]
    (root / "ds004212" / "sourcedata").mkdir()
    attributes = root / "ds004212" / "sourcedata" / "sample_attributes_P1.csv"
    write_events(attributes, "trial_type,session_nr,run_nr,image_path,things_image_nr", rows)
    return folder / f"{stem}_meg.fif"


def test_things_meg_takes_its_pictures_from_the_persons_table(data):
    path = things_meg(data)
    assert run(data, "--raw", path) == 0
    text = next(data.rglob("quality.md")).read_text(encoding="utf-8")
    check_meg(data)
    assert "1 of a picture that is not in DATA" in text


def check_meg(data: Path) -> None:
    """Every picture's row holds that picture's response, as from the plain table."""
    found = written(data), written(data, "test")
    (data / "Preprocessed_data_250Hz").rename(data / "of_things_meg")
    raw, lines = meg()
    assert run(data, *save(data, raw, lines)) == 0
    for mine, plain in zip(found, (written(data), written(data, "test")), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"lost": 1}, "25, as"), ({"shift": 1}, "which the two number differently")],
)
def test_tables_of_another_run_are_refused(data, capsys, fault, words):
    path = things_meg(data, codes=CODES * 2, **fault)
    assert run(data, "--raw", path) == 1
    assert words in capsys.readouterr().err


def test_a_changed_table_of_pictures_is_another_input(data, capsys):
    path = things_meg(data)
    assert run(data, "--raw", path) == 0
    attributes = data / "ds004212" / "sourcedata" / "sample_attributes_P1.csv"
    attributes.write_text(attributes.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert run(data, "--raw", path) != 0


def test_things_meg_as_a_bids_folder(data):
    pytest.importorskip("mne_bids", reason="pip install mne-bids")
    root = things_meg(data).parents[3]
    (root / "dataset_description.json").write_text(
        '{"Name": "x", "BIDSVersion": "1.8.0"}', encoding="utf-8"
    )
    assert preprocess.main(["--data_path", str(data), "--raw", str(root), "--no-whiten"]) == 0
    folder = data / "Preprocessed_data_250Hz"
    (folder / "sub-BIGMEG1").rename(folder / "sub-01")
    check_meg(data)
