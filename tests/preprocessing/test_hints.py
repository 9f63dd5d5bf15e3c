"""Recordings that cannot be read: the message says what lies there and what to do."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import builders
import mne
import numpy as np
import pytest
from helpers_own import PICTURES, check_responses, recording, run, write_data
from helpers_raw import write_brainvision, write_edf, write_events

from datafiles.datasets.things_eeg2 import EEG_FOLDER
from datafiles.stimuli import list_stimuli
from preprocessing import reading
from preprocessing.own_recordings import OwnTake
from util import DataError


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def flags(data) -> tuple[object, ...]:
    """A BrainVision recording of three files and its table."""
    raw, events, lines = recording()
    path = write_brainvision(data, raw, events)
    rows = [",".join(map(str, line)) for line in lines]
    return "--raw", path, "--events", write_events(data / "a.csv", "onset,stimulus", rows)


def refused(data: Path, flags, capsys) -> str:
    """Message of a call that is refused and leaves no subject behind."""
    assert run(data, *flags) in (1, 2)
    told = capsys.readouterr().err
    assert "Traceback" not in told and "found:" in told and "cure:" in told
    assert not (data / EEG_FOLDER / "sub-01").exists()
    return told


@pytest.mark.parametrize("part", ["a.eeg", "a.vmrk"])
def test_a_part_of_a_recording_is_no_recording(data, flags, capsys, part):
    told = refused(data, ("--raw", data / part, *flags[2:]), capsys)
    assert f"give --raw {data / 'a.vhdr'}" in told


@pytest.mark.parametrize("suffix, key", [(".eeg", "DataFile"), (".vmrk", "MarkerFile")])
def test_a_renamed_part_is_named(data, flags, capsys, suffix, key):
    (data / f"a{suffix}").rename(data / f"a_session1{suffix}")
    told = refused(data, flags, capsys)
    assert f"{key}=a{suffix}, which is not there" in told and f"a_session1{suffix}" in told


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("SamplingInterval=2000", "SamplingInterval=1953,125", "write 1953.125"),
        ("Ch1=Fp1,,1,µV", "Ch1=Fp1,,0,1,µV", "a resolution of 0,1 for Fp1"),
    ],
)
def test_decimal_commas_of_a_header(data, flags, capsys, old, new, told):
    text = (data / "a.vhdr").read_text(encoding="utf-8")
    assert old in text
    (data / "a.vhdr").write_text(text.replace(old, new), encoding="utf-8")
    found = refused(data, flags, capsys)
    assert told in found and "a decimal comma" in found


def test_decimal_commas_of_a_table(data, flags, capsys):
    text = (data / "a.csv").read_text().replace(",", ";").replace(".0;", ",0;")
    (data / "a.csv").write_text(text)
    told = refused(data, flags, capsys)
    assert "with a decimal comma" in told and "write 3.0, and so in all lines" in told


def test_names_of_another_file_type_in_a_table(data, flags, capsys):
    text = (data / "a.csv").read_text().replace(".png", ".bmp")
    (data / "a.csv").write_text(text)
    told = refused(data, flags, capsys)
    assert f"write its file type as in DATA: {PICTURES[0]}" in told


def test_pictures_a_folder_too_deep(data, flags, capsys):
    (data / "training_images").rename(data / "t")
    (data / "training_images").mkdir()
    (data / "t").rename(data / "training_images" / "training_images")
    told = refused(data, flags, capsys)
    assert "a folder deeper" in told and "00001_face/anna.png" in told and "move" in told


def test_one_concept_too_deep_is_not_passed_over(data, flags, capsys):
    (data / "training_images/00002_house/barn.png").rename(data / "barn.png")
    (data / "training_images/00002_house/more").mkdir()
    (data / "barn.png").rename(data / "training_images/00002_house/more/barn.png")
    assert "more/barn.png" in refused(data, flags, capsys)


def test_folders_of_other_files_are_told(tmp_path):
    (tmp_path / "test_images/00001_a").mkdir(parents=True)
    (tmp_path / "test_images/00001_a/x.bmp").write_bytes(b"BM")
    with pytest.raises(DataError, match=r"no pictures; there are \.bmp"):
        list_stimuli(tmp_path, "test")


def test_a_link_whose_content_was_not_fetched(data, flags, capsys):
    (data / "a.vhdr").unlink()
    (data / "a.vhdr").symlink_to(".git/annex/objects/xx/yy/MD5E-s1--0.vhdr")
    told = refused(data, flags, capsys)
    assert "where there is nothing" in told and "datalad get" in told


def test_a_file_that_is_not_there_names_its_neighbours(data, flags, capsys):
    told = refused(data, ("--raw", data / "a_eeg.vhdr", *flags[2:]), capsys)
    assert "no such file; beside it are" in told and "a.vhdr" in told


@pytest.mark.parametrize(
    "content, told",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"/annex/objects/MD5E-s100--0123.edf\n", "datalad get"),
        (b"<!DOCTYPE html>\n<html>Sign in</html>", "a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".edf", ".vhdr", ".set", ".fif", ".bdf"])
def test_texts_that_stand_in_for_a_file(data, flags, capsys, content, told, suffix):
    (data / f"b{suffix}").write_bytes(content)
    assert told in refused(data, ("--raw", data / f"b{suffix}", *flags[2:]), capsys)


def test_epochs_are_no_recording(data, flags, capsys):
    raw, events, _ = recording()
    epochs = mne.Epochs(raw, events, tmin=-0.2, tmax=1.0, verbose="error", preload=True)
    epochs.save(data / "a-epo.fif", verbose="error")
    told = refused(data, ("--raw", data / "a-epo.fif", *flags[2:]), capsys)
    assert "trials that are cut already" in told and "before epoching" in told


def test_epoched_eeglab_files_are_no_recording(data, flags, capsys):
    scipy_io = pytest.importorskip("scipy.io")
    chanlocs = np.array([(f"E{n}",) for n in range(2)], dtype=[("labels", object)])
    eeg = {
        "nbchan": 2.0, "trials": 3.0, "pnts": 50.0, "srate": 100.0, "xmin": 0.0, "xmax": 0.5,
        "data": np.zeros((2, 50, 3)), "chanlocs": chanlocs, "event": [], "epoch": [],
        "icawinv": [], "icaweights": [], "icasphere": [],
    }  # fmt: skip
    scipy_io.savemat(data / "a.set", {"EEG": eeg}, appendmat=False)
    assert "trials that are cut already" in refused(
        data, ("--raw", data / "a.set", *flags[2:]), capsys
    )


def test_what_the_library_said_stays_in_the_log(data, flags, capsys):
    (data / "b.fif").write_bytes(bytes(5000))
    told = refused(data, ("--raw", data / "b.fif", *flags[2:]), capsys)
    assert "MNE cannot read it" in told
    log = (data / EEG_FOLDER / "log.txt").read_text()
    assert "MNE cannot read it" in log and "Traceback" in log and "mne" in log
    assert run(data, *flags) == 0  # the folder with the log hinders nobody
    check_responses(data)


@pytest.mark.parametrize("text", ["Öffnung".encode("latin-1"), "Öffnung".encode()])
def test_annotations_of_edf_in_latin_1_are_read(data, text):
    raw, _, lines = recording()
    path = write_edf(data / "a.edf", raw, note_text=text)
    assert "Öffnung" in reading.read_raw(path).raw.annotations.description
    rows = [",".join(map(str, line)) for line in lines]
    table = write_events(data / "a.csv", "onset,stimulus", rows)
    assert run(data, "--raw", path, "--events", table) == 0
    check_responses(data, tolerance=0.05)


def test_markers_of_another_name_are_part_of_the_identity(data, capsys):
    """An edited marker file is another recording: not "already finished"."""
    raw, events, _ = recording()
    path = write_brainvision(data, raw, events)
    (data / "a.vmrk").rename(data / "marks.vmrk")
    text = path.read_text(encoding="utf-8").replace("MarkerFile=a.vmrk", "MarkerFile=marks.vmrk")
    path.write_text(text, encoding="utf-8")
    book = [f"Stimulus/S{code:3d},{key}" for code, key in enumerate(PICTURES, start=1)]
    table = write_events(data / "a.csv", "marker,stimulus", book)
    flags = ("--raw", path, "--events", table)
    assert run(data, *flags) == 0
    check_responses(data)
    marks = data / "marks.vmrk"
    marks.write_text(marks.read_text(encoding="utf-8") + "; edited\n", encoding="utf-8")
    assert run(data, *flags) == 2
    assert "marks.vmrk" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_names_that_are_no_utf_8_are_refused_in_the_listing(data, flags, capsys):
    shutil.copy(data / PICTURES[0], os.fsencode(data) + b"/training_images/00001_face/caf\xe9.png")
    told = refused(data, flags, capsys)
    assert "not in UTF-8" in told and r"caf\xe9.png" in told


@pytest.mark.parametrize("suffix", [".jfif", ".JPE"])
def test_other_endings_of_jpeg_are_pictures(tmp_path, suffix):
    builders.write_picture(tmp_path / "test_images/00001_a/x.png", 0)
    (tmp_path / "test_images/00001_a/x.png").rename(tmp_path / f"test_images/00001_a/x{suffix}")
    assert [item.path.suffix for item in list_stimuli(tmp_path, "test")] == [suffix]


def test_a_recording_that_is_a_folder_is_hashed_by_its_files(tmp_path, monkeypatch):
    """``.mff`` and ``.ds``: MNE names the folder."""
    folder = tmp_path / "a.mff"
    (folder / "inner").mkdir(parents=True)
    for name in ("signal1.bin", "inner/info.xml"):
        (folder / name).write_text(name)
    info = mne.create_info(["O1"], 100.0, "eeg")
    raw = mne.io.RawArray(np.ones((1, 200)), info, verbose="error")
    raw.filenames = (folder,)
    monkeypatch.setattr("mne.io.read_raw", lambda *_, **__: raw)
    take = OwnTake(folder, tmp_path / "t.csv", None)
    assert [path.name for path in take.signal_files()] == ["info.xml", "signal1.bin"]
    assert {path.name for path in take.files()} == {"info.xml", "signal1.bin"}
