"""Microvolts are microvolts: units that are unknown, wrong, or not alike are told, or stated."""

from __future__ import annotations

import shutil
from pathlib import Path

import builders
import numpy as np
import pytest
from helpers_own import check_responses, recording, run, save, write_data
from helpers_raw import write_brainvision, write_edf, write_events

import dataset
import preprocess
from datafiles.datasets.things_eeg2 import EEG_FOLDER, parse_published
from datafiles.eeg_files import eeg_file
from preprocessing.amplitude import check_alike
from util import DataError


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def table(root: Path, lines) -> Path:
    return write_events(root / "a.csv", "onset,stimulus", [",".join(map(str, x)) for x in lines])


def in_format(root: Path, kind: str, unit: str) -> tuple[object, ...]:
    """Responses of 5 µV in a file whose numbers are microvolts and whose header says ``unit``."""
    raw, events, lines = recording()
    if kind == "edf":
        path = write_edf(root / "a.edf", raw, units=unit)
    else:
        path = write_brainvision(root, raw, events, unit)
    return "--raw", path, "--events", table(root, lines)


@pytest.mark.parametrize("kind", ["edf", "vhdr"])
@pytest.mark.parametrize("unit", ["UV", ".V", "nonsense", "ÂµV"])
def test_an_unknown_unit_is_refused_or_stated(data, capsys, kind, unit):
    if kind == "vhdr" and unit == "ÂµV":
        pytest.skip("MNE removes the stray character itself")
    flags = in_format(data, kind, unit)
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert f"the unit {unit!r} of Fp1 and 31 other channels" in told and "--unit" in told
    assert not (data / EEG_FOLDER).exists()
    assert run(data, *flags, "--unit", "uV") == 0
    check_responses(data, tolerance=0.05)


def test_an_empty_unit_is_unknown_in_edf_and_microvolts_in_brainvision(data, tmp_path, capsys):
    assert run(data, *in_format(data, "edf", "")) == 1
    assert "the unit ''" in capsys.readouterr().err
    assert run(data, *in_format(data, "vhdr", "")) == 0
    check_responses(data)


@pytest.mark.parametrize("unit", ["uV", "mV", "V", "nV"])
def test_the_stated_unit_wins_over_the_file_s(data, unit):
    """The header says microvolts; the same numbers mean what the flag says."""
    raw, events, lines = recording()
    factor = {"V": 1e6, "mV": 1e3, "uV": 1.0, "nV": 1e-3}[unit]
    raw._data /= factor  # so that the numbers are of that unit
    path = write_brainvision(data, raw, events)
    assert run(data, "--raw", path, "--events", table(data, lines), "--unit", unit) == 0
    check_responses(data)


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_an_amplitude_that_no_eeg_has_is_refused(data, capsys, factor):
    raw, _, lines = recording()
    raw._data *= factor
    flags = save(data, raw, lines)
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert "an amplitude of" in told and "its header stating no unit" in told
    assert run(data, *flags, "--unit", "uV" if factor > 1 else "V") == (0 if factor > 1 else 1)


def test_a_large_offset_is_no_amplitude(data):
    """BioSemi's recordings are not high-passed: 20 mV from zero is usual."""
    raw, _, lines = recording()
    raw._data += 0.02
    assert run(data, *save(data, raw, lines)) == 0
    check_responses(data)


def test_sessions_of_one_person_are_in_one_unit(data, capsys):
    raw, _, lines = recording()
    raw._data += np.random.default_rng(0).normal(scale=1e-6, size=raw._data.shape)
    first = save(data, raw, lines)
    shutil.move(first[1], data / "b_raw.fif")
    raw._data *= 150
    second = save(data, raw, lines)
    tables = [first[3], second[3]]
    assert run(data, "--raw", data / "b_raw.fif", second[1], "--events", *tables) == 1
    told = capsys.readouterr().err
    assert "a_raw.fif" in told and "b_raw.fif has" in told
    assert not (data / EEG_FOLDER).exists()


def test_amplitudes_are_compared_among_all():
    check_alike({"a": 1e-5, "b": 9e-4, "c": float("nan")})
    with pytest.raises(DataError, match="where a has 1e-05 V"):
        check_alike({"a": 1e-5, "b": 1e-4, "c": 1.1e-3})
    check_alike({})


def test_units_of_channels_that_are_no_voltages(data):
    """A thermistor among electrodes is told by its unit, whatever its name."""
    raw, events, lines = recording([f"E{n}" for n in range(1, 9)])
    path = write_brainvision(data, raw, events)
    text = path.read_text(encoding="utf-8").replace("Ch8=E8,,1,µV", "Ch8=E8,,1,C")
    path.write_text(text, encoding="utf-8")
    assert run(data, "--raw", path, "--events", table(data, lines)) == 0
    names = parse_published(eeg_file(data, "sub-01", "test"))[1]
    assert names == [f"E{n}" for n in range(1, 8)]
    assert "left out E8 (of type misc)" in (data / EEG_FOLDER / "sub-01/quality.md").read_text()


def test_the_check_has_the_limits_of_the_stage(data, capsys):
    """Of files in volts, which the stage has noted; downloaded ones may be microvolts."""
    raw, _, lines = recording()
    raw._data += np.random.default_rng(0).normal(scale=1e-6, size=raw._data.shape)
    assert run(data, *save(data, raw, lines)) == 0
    assert dataset.main(["--check", "--data_path", str(data)]) == 0
    for partition in ("training", "test"):
        path = eeg_file(data, "sub-01", partition)
        eeg, names, times = parse_published(path)[:3]
        content = {"preprocessed_eeg_data": eeg * 2e4, "ch_names": names, "times": times}
        path.unlink()
        builders.write_published(path, content)
    capsys.readouterr()
    assert dataset.main(["--check", "--data_path", str(data)]) == 1
    assert "a standard deviation of" in capsys.readouterr().out
    (path.parent / "options.json").unlink()
    assert dataset.main(["--check", "--data_path", str(data)]) == 0


def test_the_unit_is_of_own_recordings(data, capsys):
    assert preprocess.main(["--data_path", str(data), "--unit", "uV"]) == 2
    assert "--unit belongs to your own recordings" in capsys.readouterr().err


# --- files that end early -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.6, 0.61])
def test_brainvision_data_that_end_early_are_refused(data, capsys, share):
    flags = in_format(data, "vhdr", "µV")
    content = (data / "a.eeg").read_bytes()
    row = 32 * 4
    cut = int(share * len(content)) // row * row + (0 if share == 0.6 else 5)
    (data / "a.eeg").write_bytes(content[:cut])
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert "the data end too early" in told and "copy it again" in told
    assert not (data / EEG_FOLDER).exists()


def test_data_points_are_counted(data, capsys):
    flags = in_format(data, "vhdr", "µV")
    text = (data / "a.vhdr").read_text(encoding="utf-8")
    samples = (data / "a.eeg").stat().st_size // 128
    for number, code in ((samples, 0), (samples + 1, 1)):
        more = text.replace("[Common Infos]", f"[Common Infos]\nDataPoints={number}")
        (data / "a.vhdr").write_text(more, encoding="utf-8")
        assert run(data, *flags) == code
    assert f"the {samples + 1} DataPoints of its header" in capsys.readouterr().err


def test_what_the_reader_warns_of_is_kept(data, capsys):
    """Here of an annotation behind the end, which MNE leaves out."""
    raw, _, lines = recording()
    path = write_edf(data / "a.edf", raw, note_text=b"late")
    content = path.read_bytes().replace(b"+0.5\x14late", b"+999\x14late")
    path.write_bytes(content)
    assert run(data, "--raw", path, "--events", table(data, lines)) == 0
    text = (data / EEG_FOLDER / "sub-01/quality.md").read_text()
    assert "What the reader warned of" in text and "outside data range" in text
    assert "outside data range" in (data / EEG_FOLDER / "sub-01/log.txt").read_text()
