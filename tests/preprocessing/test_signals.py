"""What is no EEG is left out and told; what is EEG stays, whatever its recorder calls it."""

from __future__ import annotations

import helpers_own
import mne
import numpy as np
import pytest
from helpers_own import check_responses, recording, run, save, write_data
from helpers_raw import CAP_32, write_edf

from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file
from preprocessing.signals import Glance, sort_by_name

QUALITY = "Preprocessed_data_250Hz/sub-01/quality.md"


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def add(raw: mne.io.BaseRaw, name: str, values: np.ndarray, kind: str = "eeg") -> None:
    info = mne.create_info([name], raw.info["sfreq"], kind, verbose="error")
    more = mne.io.RawArray(values[None], info, verbose="error")
    raw.add_channels([more], force_update_info=True)


def noise(raw: mne.io.BaseRaw, seed: int = 5, size_v: float = 1e-5) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=size_v, size=raw.n_times)


def kept(root, partition: str = "training") -> list[str]:
    return things_eeg2.parse_published(eeg_file(root, "sub-01", partition))[1]


OTHERS = (
    "LEOG", "REOG", "VEOGL", "HEOG", "EOG 1", "EXG1", "EXG8", "ECG", "EKG1", "EMG chin", "GYRO",
    "GYRO_X", "ACC_Z", "GSR1", "Resp", "Plet", "Temp", "Status", "STI 014", "TRIGGER", "Trig1",
    "MARKER", "COUNTER", "INTERPOLATED", "CQ_O1", "Quality", "Battery", "Photo", "AUX1", "Ana3",
    "BIP1", "DC01", "M1", "M2", "A1", "A2", "LM", "mastoid_l", "Event", "SpO2", "Right AUX",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_recorders_call_eeg_and_is_none(name):
    """Beside electrodes that no system names, so that only the name can tell."""
    names = [*(f"E{number}" for number in range(1, 9)), name]
    raw = mne.io.RawArray(np.ones((9, 10)), mne.create_info(names, 100.0, "eeg"), verbose="error")
    found = sort_by_name(raw)
    assert found.eeg == names[:-1] and list(found.left) == [name]
    assert sort_by_name(raw, [name.lower()]).eeg == names  # asked for by name


@pytest.mark.parametrize(
    "names",
    [
        CAP_32,
        [f"E{n}" for n in range(1, 129)],
        [f"EEG {n:03d}" for n in range(1, 61)],
        [f"{bank}{pin}" for bank in "ABCD" for pin in range(1, 33)],
        ["Fpz-Cz", "Pz-Oz"],
        ["C3-A2", "C4-A1", "O1-A2"],
        ["TP9", "AF7", "AF8", "TP10"],
        ["Iz", "T7", "T8", "PO9", "FFT9h"],
        [f"ch{n}" for n in range(8)],
        [str(n) for n in range(1, 33)],
        ["LTM1", "LTM2", "RHH1"],
    ],
)
def test_electrodes_stay_whatever_they_are_called(names):
    info = mne.create_info(list(names), 100.0, "eeg")
    raw = mne.io.RawArray(np.ones((len(names), 10)), info, verbose="error")
    assert sort_by_name(raw).eeg == list(names)


def test_names_of_no_system_among_electrodes_are_suspect():
    names = [*CAP_32, "Foo"]
    raw = mne.io.RawArray(np.ones((33, 10)), mne.create_info(names, 100.0, "eeg"), verbose="error")
    assert sort_by_name(raw).left == {"Foo": "no 10-05 name, as 32 others have"}
    assert sort_by_name(raw, ["Foo"]).eeg == names


def test_other_signals_are_left_out_and_named(data, capsys):
    raw, events, lines = recording()
    codes = np.zeros(raw.n_times)
    for onset, _, code in events.tolist():
        codes[onset : onset + 20] = code * 1e-6  # tells which picture was shown
    add(raw, "EXG1", noise(raw))
    add(raw, "GYRO_X", noise(raw, 6))
    add(raw, "Foo", codes)
    add(raw, "HEOG", noise(raw, 7), "eog")
    assert run(data, *save(data, raw, lines)) == 0
    check_responses(data)
    assert kept(data) == list(CAP_32)
    text = (data / QUALITY).read_text()
    for told in ("left out EXG1 GYRO_X (named after something else)", "HEOG (of type eog)",
                 "Foo (no 10-05 name, as 32 others have)"):  # fmt: skip
        assert told in text and told in (data / QUALITY).with_name("log.txt").read_text()


def own_names(number: int = 8) -> tuple[str, ...]:
    return tuple(f"E{n}" for n in range(1, number + 1))


def contents(raw: mne.io.BaseRaw, events: np.ndarray) -> dict[str, np.ndarray]:
    """Signals that no electrode has, under names that tell nothing."""
    held = np.zeros(raw.n_times)
    for onset, _, code in events.tolist():
        held[onset:] = code * 1e-6
    ramp = np.arange(raw.n_times) % 256 * 1e-6
    wave = np.zeros(raw.n_times)
    for onset, _, code in events.tolist():
        wave[onset : onset + 500] += code * 1e-5 * np.sin(np.arange(500) / 7.3 * code)
    bits = np.random.default_rng(3).integers(0, 4, raw.n_times) * 1e-5
    return {"held": held, "ramp": ramp, "wave": wave, "bits": bits}


@pytest.mark.parametrize("what", ["held", "ramp", "wave", "bits"])
def test_what_is_written_by_a_computer_is_found_by_what_is_in_it(data, what):
    names = own_names()
    raw, events, lines = recording(names)
    add(raw, "E9", contents(raw, events)[what])
    assert run(data, *save(data, raw, lines)) == 0
    assert kept(data) == list(names)
    assert "left out E9 (" in (data / QUALITY).read_text()


def test_an_electrode_that_holds_a_trigger_is_refused_or_rebuilt(data, capsys):
    raw, events, lines = recording()
    place = raw.ch_names.index("Oz")
    raw._data[place] = contents(raw, events)["held"]
    flags = save(data, raw, lines)
    assert run(data, *flags) == 1
    assert "channels that hold no EEG: Oz (" in capsys.readouterr().err
    assert run(data, *flags, "--interpolate_missing") == 0
    assert "rebuilt Oz" in (data / QUALITY).read_text()


def test_who_names_a_channel_gets_it(data):
    raw, events, lines = recording()
    add(raw, "EXG1", noise(raw))
    add(raw, "Foo", contents(raw, events)["held"])
    flags = save(data, raw, lines)
    assert run(data, *flags, "--channels", "O1", "EXG1", "Foo") == 0
    assert kept(data) == ["O1", "EXG1", "Foo"]


def test_a_channel_that_is_none_in_one_recording_is_left_out_of_all(data):
    names = own_names()
    raw, events, lines = recording(names)
    add(raw, "E9", noise(raw))
    first = save(data, raw, lines)
    (data / "a_raw.fif").rename(data / "b_raw.fif")
    raw._data[-1] = contents(raw, events)["held"]
    raw._data[:-1] *= 1.01
    second = save(data, raw, lines)
    tables = [first[3], second[3]]
    assert run(data, "--raw", data / "b_raw.fif", second[1], "--events", *tables) == 0
    assert kept(data) == list(names)


def test_edf_columns_are_told_apart(data):
    """All columns of an EDF file are EEG to MNE."""
    raw, events, lines = recording(codes=helpers_own.CODES)
    raw._data += np.random.default_rng(1).normal(scale=1e-6, size=raw._data.shape)
    add(raw, "EXG1", noise(raw))
    add(raw, "Status", contents(raw, events)["held"])
    path = write_edf(data / "a.edf", raw)
    table = save(data, raw, lines)[3]
    (data / "a_raw.fif").unlink()
    assert run(data, "--raw", path, "--events", table) == 0
    assert kept(data) == list(CAP_32)
    check_responses(data, tolerance=1.5)  # of noise: the rows are those of their pictures


def test_a_glance_sees_nothing_where_there_is_nothing():
    empty = Glance(["O1"], np.zeros((0, 1, 0)), np.zeros(0))
    assert empty.suspects() == {} and np.isnan(empty.amplitude)
    flat = Glance(["O1"], np.zeros((4, 1, 50)), np.array([0, 0, 1, 1]))
    assert flat.suspects() == {}  # which others tell
