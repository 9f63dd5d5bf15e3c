"""Stage 0 on users' own recordings: formats, tables of events, channels, and what they hide."""

from __future__ import annotations

import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import builders
import mne
import numpy as np
import pytest
from conftest import Chain
from helpers_own import PICTURES, check_responses, recording, run, save, write_data
from helpers_raw import (
    CAP_32,
    RATE_HZ,
    response,
    simulate,
    write_brainvision,
    write_edf,
    write_events,
)

import generate
import preprocess
import train
from datafiles import stimuli
from datafiles.datasets import things_eeg2
from datafiles.datasets.things_eeg2 import EEG_FOLDER
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import IMAGE_FOLDER, list_stimuli
from preprocessing import channels, quality


@pytest.fixture(autouse=True)
def no_figures(monkeypatch) -> None:
    """Drawing is two thirds of so small a run; test_preprocess.noisy draws for all."""
    monkeypatch.setattr(quality, "draw_quality", lambda *_: None)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path)


# --- tables of events ---------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_seconds_and_pictures_by_path(data, ends):
    raw, _, lines = recording()
    assert run(data, *save(data, raw, lines, ends=ends)) == 0
    check_responses(data)


def test_samples_windows_paths_other_columns_and_a_byte_order_mark(data):
    raw, events, lines = recording()
    rows = [
        (code, "x", onset, key.split("/", 1)[1].replace("/", "\\"))
        for (onset, _, code), (_, key) in zip(events.tolist(), lines, strict=True)
    ]
    flags = save(data, raw, rows, "\ufeffcode,remark,sample,stim_file", "\r\n")
    assert run(data, *flags) == 0
    check_responses(data)


def test_events_without_a_picture_are_counted_and_the_edges_dropped(data, capsys):
    raw, _, lines = recording()
    lines += [(3.1, "n/a"), (3.2, ""), (0.05, "boat.png")]
    assert run(data, *save(data, raw, lines)) == 0
    told = capsys.readouterr().out
    assert "2 without picture" in told and "1 at the edge" in told
    check_responses(data)


def test_unicode_names_match_however_they_are_composed(data):
    (data / PICTURES[0]).rename(
        data / unicodedata.normalize("NFD", "training_images/00001_face/ä.png")
    )
    builders.write_picture(data / "training_images/00001_face/zoë bär.png")
    (data / "training_images/00001_face/ben.png").unlink()
    names = ["ä.png", "zoë bär.png", "barn.png", "boat.png"]
    raw, events, _ = recording()
    lines = [(onset / RATE_HZ, names[code - 1]) for onset, _, code in events.tolist()]
    assert run(data, *save(data, raw, lines)) == 0
    check_responses(data)


def test_unequal_repetitions_are_cut_to_the_rarest(data, capsys):
    raw, _, lines = recording()
    assert run(data, *save(data, raw, lines[:-2])) == 0
    told = capsys.readouterr()
    assert "2 to 3 trials of a picture, so 2 of each are kept" in told.err
    assert "training: 3 pictures x 2 repetitions x 32 channels x 250 samples; 2 trials" in told.out
    check_responses(data)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("1.0,../secret.png", "without '..'"),
        ("1.0,training_images/../../secret.png", "without '..'"),
        ("1.0,/etc/passwd", "not absolute"),
        ("1.0,C:\\pictures\\anna.png", "not absolute"),
        ("1.0,ana.png", "perhaps training_images/00001_face/anna.png"),
        ("1.0,00002_house/anna.png", "unknown stimulus"),
        ("1.0,twin.png", "which may be training_images/00001_face/twin.png"),
        ("soon,anna.png", "onset 'soon'"),
        ("-1,anna.png", "onset '-1'"),
        ("nan,anna.png", "onset 'nan'"),
        ("1500,anna.png", "after the end of a_raw.fif"),
        ("1.5,anna.png", "less than 50 samples after another: training picture 1 (line "),
        ("1.0,anna.png,left", "3 cells"),
    ],
)
def test_odd_lines_are_told_with_their_number(data, capsys, line, told):
    raw, _, lines = recording()
    flags = save(data, raw, lines)
    for folder in ("00001_face", "00002_house"):
        if "twin" in line:
            builders.write_picture(data / "training_images" / folder / "twin.png")
    with open(flags[-1], "a") as file:
        file.write(line)
    assert run(data, *flags) == 1
    message = capsys.readouterr().err
    assert told in message and "a.csv" in message and "cure:" in message
    assert ("line 14" in message) or "two events" in told
    assert not (data / EEG_FOLDER).exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "columns (none)"),
        (b"time,stimulus\n1,a\n", "columns time, stimulus"),
        (b"onset,trial_type\n1,a\n", "columns onset, trial_type"),
        (b"onset,stimulus\n1,n/a\n", "no event with a picture"),
        (b"onset,stimulus\n1,\xff\xfe\n", "save it as UTF-8"),
        (b'onset,stimulus\n1,"a\n', "not CSV"),
    ],
)
def test_odd_tables_are_told(data, capsys, content, told):
    raw, _, lines = recording()
    flags = save(data, raw, lines)
    Path(flags[-1]).write_bytes(content)
    assert run(data, *flags) == 1
    assert told in capsys.readouterr().err


def test_a_picture_that_nobody_saw_is_named(data, capsys):
    raw, _, lines = recording()
    builders.write_picture(data / "training_images/00002_house/shed.png")
    assert run(data, *save(data, raw, lines)) == 1
    told = capsys.readouterr().err
    assert "none for 1 of 4 training pictures, e.g. training_images/00002_house/shed.png" in told


def test_a_picture_that_is_a_link_out_of_its_folder_is_refused(data, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    builders.write_picture(outside)
    (data / PICTURES[1]).unlink()
    (data / PICTURES[1]).symlink_to(outside)
    raw, _, lines = recording()
    assert run(data, *save(data, raw, lines)) == 1
    assert "a link to" in capsys.readouterr().err


# --- formats ------------------------------------------------------------------------------------


def test_brainvision_by_its_own_markers(data):
    raw, events, _ = recording()
    header = write_brainvision(data / "rec", raw, events)
    rows = [f"Stimulus/S{code:3d},{key}" for code, key in enumerate(PICTURES, start=1)]
    table = write_events(data / "code_book.csv", "marker,stimulus", rows)
    assert run(data, "--raw", header, "--events", table) == 0
    check_responses(data)


def test_a_header_that_points_elsewhere_is_refused(data, capsys):
    raw, events, lines = recording()
    header = write_brainvision(data / "rec", raw, events)
    (data / "rec" / "a.eeg").rename(data / "a.eeg")
    header.write_text(header.read_text().replace("DataFile=a.eeg", "DataFile=../a.eeg"))
    table = save(data, raw, lines)[-1]
    assert run(data, "--raw", header, "--events", table) == 1
    told = capsys.readouterr().err
    assert "files inside" in told or "MNE cannot read it" in told


@pytest.mark.parametrize(("suffix", "package"), [("edf", "edfio"), ("set", "eeglabio")])
def test_other_formats(data, suffix, package):
    pytest.importorskip(package, reason=f"{package} writes the file; pip install {package}")
    raw, _, lines = recording()
    path = data / f"a.{suffix}"
    mne.export.export_raw(path, raw, verbose="error")
    table = save(data, raw, lines)[-1]
    assert run(data, "--raw", path, "--events", table) == 0
    check_responses(data, tolerance=0.05)


def test_a_bids_folder(data):
    mne_bids = pytest.importorskip("mne_bids", reason="pip install mne-bids")
    pytest.importorskip("pybv", reason="pip install pybv")
    root, (raw, events, lines) = data / "bids", recording()
    path = mne_bids.BIDSPath(subject="07", task="see", root=root, datatype="eeg")
    raw.info["line_freq"] = 50
    raw.save(data / "b_raw.fif", verbose="error")
    raw = mne.io.read_raw(data / "b_raw.fif", verbose="error")
    ids = {str(code): code for code in range(1, 5)}
    mne_bids.write_raw_bids(raw, path, events=events, event_id=ids, verbose="error")
    table = next(root.rglob("*_events.tsv"))
    rows = [f"{onset}\t0.1\t{key.split('/', 1)[1]}" for onset, key in lines]
    write_events(table, "onset\tduration\tstim_file", rows)
    assert preprocess.main(["--data_path", str(data), "--raw", str(root), "--no-whiten"]) == 0
    (data / EEG_FOLDER / "sub-07").rename(data / EEG_FOLDER / "sub-01")
    check_responses(data, tolerance=0.05)


def test_without_mne_bids_the_package_is_named(data, capsys, monkeypatch):
    (data / "bids").mkdir()
    (data / "bids" / "dataset_description.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "mne_bids", None)
    assert preprocess.main(["--data_path", str(data), "--raw", str(data / "bids")]) == 2
    assert "pip install mne-bids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "code", "told"),
    [
        ("a.fif", b"damaged", 1, "MNE cannot read it"),
        ("a.vhdr", b"", 1, "MNE cannot read it"),
        ("a.edf", b"0" * 100, 1, "MNE cannot read it"),
        ("a.docx", b"x", 1, "MNE cannot read it"),
        ("none.fif", None, 2, "no such file"),
    ],
)
def test_unreadable_recordings_are_told(data, capsys, name, content, code, told):
    if content is not None:
        (data / name).write_bytes(content)
    table = write_events(data / "e.csv", "onset,stimulus", ["1.0,anna.png"])
    assert run(data, "--raw", data / name, "--events", table) == code
    assert told in capsys.readouterr().err


def test_flags_of_own_recordings_are_checked(data, capsys):
    raw, _, lines = recording()
    flags = save(data, raw, lines)
    assert run(data, *flags[:2]) == 2
    assert "a_raw_events.tsv" in capsys.readouterr().err
    assert preprocess.main(["--data_path", str(data), *flags]) == 2
    assert "give --subjects sub-01" in capsys.readouterr().err
    assert run(data / "rec", *flags) == 1
    assert "neither training_images/ nor test_images/" in capsys.readouterr().err


# --- channels and rates -------------------------------------------------------------------------


def test_recorders_names_become_10_05_names(data):
    raw, _, lines = recording()
    old = {"T7": "T3", "T8": "EEG T4-REF", "Fp1": "EEG FP1-REF", "Cz": "CZ", "O1": "O1.."}
    raw.rename_channels(old)
    assert run(data, *save(data, raw, lines)) == 0
    check_responses(data)


@pytest.mark.parametrize("rate_hz", [256.0, 1000.0, 200.0])
def test_other_rates_are_resampled(data, rate_hz):
    raw, _, lines = recording(rate_hz=rate_hz)
    assert run(data, *save(data, raw, lines)) == 0
    eeg, _, times = things_eeg2.parse_published(eeg_file(data, "sub-01", "test"))[:3]
    assert eeg.shape == (1, 3, 32, 250)
    assert abs(times[0]) < 1e-3
    check_responses(data, tolerance=0.04)


def test_128_channels_keep_their_own_names(data):
    names = [f"{bank}{number}" for bank in "ABCD" for number in range(1, 33)]  # BioSemi's caps
    raw, _, lines = recording(names)
    assert run(data, *save(data, raw, lines)) == 0
    check_responses(data, names)


def test_fz_instead_of_cz_is_named_and_can_be_rebuilt(data, capsys):
    names = [name for name in CAP_32 if name != "Cz"]
    raw, _, lines = recording(names)
    flags = [*save(data, raw, lines), "--channels", "Pz", "cz", "Oz"]
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert "no channel Cz; it has Fp1" in told and "--interpolate_missing" in told
    assert run(data, *flags, "--interpolate_missing") == 0
    assert "rebuilt Cz" in capsys.readouterr().out
    eeg, found, _ = things_eeg2.parse_published(eeg_file(data, "sub-01", "training"))[:3]
    assert found == ["Pz", "Cz", "Oz"] and np.abs(eeg[:, :, 1]).max() > 1e-7


def test_what_cannot_be_rebuilt_is_told(data, capsys):
    raw, _, lines = recording(("Fz", "Pz", "Oz", "X1"))
    flags = save(data, raw, lines)
    assert run(data, *flags, "--channels", "things", "--interpolate_missing") == 1
    assert "to rebuild from 3 channels of known place" in capsys.readouterr().err
    assert run(data, *flags, "--channels", "Fz", "Y9", "--interpolate_missing") == 1
    assert "Y9 to rebuild" in capsys.readouterr().err


def test_flat_bad_and_body_channels(data, capsys):
    raw, _, lines = recording()
    raw._data[3] = 1e-6
    raw.info["bads"] = ["Oz"]
    raw.rename_channels({"Fp2": "EOG1"})
    flags = save(data, raw, lines)
    assert run(data, *flags) == 1
    assert "flat channels: F3" in capsys.readouterr().err
    assert run(data, *flags, "--interpolate_missing") == 0
    assert "flat F3; bad Oz; rebuilt F3 Oz" in capsys.readouterr().out
    file = eeg_file(data, "sub-01", "training")
    assert things_eeg2.parse_published(file)[1] == [name for name in CAP_32 if name != "Fp2"]


def test_duplicate_names_are_told(data, capsys):
    raw, events, lines = recording()
    header = write_brainvision(data / "rec", raw, events)
    header.write_text(header.read_text(encoding="utf-8").replace("=Pz,", "=Cz,"), encoding="utf-8")
    table = save(data, raw, lines)[-1]
    assert run(data, "--raw", header, "--events", table) == 1
    assert "duplicate channel names: Cz" in capsys.readouterr().err


def test_plain_names():
    names = ("EEG Fp1-REF", "Fc5.", "T5", " O1 ", "A1", "POz")
    assert [channels.plain_name(name) for name in names] == ["Fp1", "Fc5", "P7", "O1", "A1", "POz"]


def test_mended_flags_may_follow_a_failed_first_session(data, capsys):
    raw, _, lines = recording()
    raw._data[3] = 1e-6
    flags = save(data, raw, lines)
    assert run(data, *flags) == 1
    assert run(data, *flags, "--interpolate_missing") == 0
    assert "rebuilt F3" in capsys.readouterr().out


# --- sessions, whitening, later stages ----------------------------------------------------------


def test_a_session_without_training_pictures_is_whitened_by_the_others(data):
    """Two recordings, one for each partition: their noise has the same covariance."""
    mix = np.diag(np.linspace(1, 4, 32)) * 1e-6
    flags: list[str] = []
    tables: list[str] = []
    for number, codes in enumerate(([1, 2, 3] * 10, [4] * 30)):
        raw, events = simulate(codes, CAP_32, mix, seed=number, height_v=0)
        folder = data / str(number)
        folder.mkdir()
        lines = [(onset / RATE_HZ, PICTURES[code - 1]) for onset, _, code in events.tolist()]
        _, file, _, table = save(folder, raw, lines)
        flags, tables = [*flags, file], [*tables, table]
    command = ["--data_path", str(data), "--subjects", "sub-01", "--raw", *flags]
    assert preprocess.main([*command, "--events", *tables]) == 0
    eeg, *_ = things_eeg2.parse_published(eeg_file(data, "sub-01", "test"))
    spread = eeg.std(axis=(0, 1, 3))
    assert eeg.shape[1] == 30
    assert spread.max() / spread.min() < 1.3, "4 before whitening"


def test_later_stages_run_unchanged_on_32_channels_at_256_hz(
    features: Chain, tmp_path: Path
) -> None:
    for folder in IMAGE_FOLDER.values():
        (tmp_path / folder).symlink_to(features.data / folder)
    keys = [item.key for part in stimuli.PARTITIONS for item in list_stimuli(tmp_path, part)]
    codes = list(range(1, len(keys) + 1)) * 2
    raw, events = simulate(codes, CAP_32, np.eye(32) * 1e-6, rate_hz=256.0)
    lines = [(onset / 256, keys[code - 1]) for onset, _, code in events.tolist()]
    flags = save(tmp_path, raw, lines)
    command = ["--data_path", str(tmp_path), "--subjects", "sub-01", *flags]
    assert preprocess.main([*command, "--dtype", "float32"]) == 0
    world = Chain(features.root)
    model = tmp_path / "model"
    trained = world.train_flags(model, "--data_path", tmp_path, "--epochs", 1)
    assert train.main(trained) == 0
    eeg = tmp_path / EEG_FOLDER / "sub-01"
    drawn = world.generate_flags(
        tmp_path / "images", "--eeg_data", eeg, "--model_path", model, "--max_stimuli", 1
    )
    assert generate.main([*drawn, "--mode", "fused"]) == 0
    assert list((tmp_path / "images").rglob("*.png"))


def test_sessions_of_three_recorders_are_one_person(data):
    """Another rate, format, order and spelling of the channels in each."""
    tables, files = [], []
    for kind, rate_hz in (("fif", 1000.0), ("edf", 512.0), ("vhdr", 256.016)):
        folder = data / kind
        folder.mkdir()
        raw, events, lines = recording(rate_hz=rate_hz)
        order = np.random.default_rng(int(rate_hz)).permutation(len(CAP_32)).tolist()
        raw.reorder_channels([CAP_32[place] for place in order])
        if kind == "fif":
            raw.save(folder / "a_raw.fif", verbose="error")
            files.append(folder / "a_raw.fif")
        elif kind == "edf":
            raw.rename_channels({name: f"EEG {name.upper()}-REF" for name in raw.ch_names})
            files.append(write_edf(folder / "a.edf", raw))
        else:
            files.append(write_brainvision(folder, raw, events))
        rows = [",".join(map(str, line)) for line in lines]
        tables.append(write_events(folder / "a.csv", "onset,stimulus", rows))
    flags = ("--channels", *CAP_32)
    assert run(data, "--raw", *files, "--events", *tables, *flags) == 0
    row = 0
    for partition, pictures in (("training", 3), ("test", 1)):
        eeg, _, times = things_eeg2.parse_published(eeg_file(data, "sub-01", partition))[:3]
        assert eeg.shape[:2] == (pictures, 9)
        for trials in eeg:
            known = response(row + 1, len(CAP_32), np.asarray(times))
            for trial in trials:
                assert np.corrcoef(trial.ravel(), known.ravel())[0, 1] > 0.9998
            row += 1


def test_the_documented_walk_through_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "own_recordings.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    command = shlex.split(text.split("```bash\n")[1].split("```")[0])
    told = text.split("```\n# sub-01")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert command[:2] == ["python", "preprocess.py"]
    assert preprocess.main(command[2:]) == 0
    assert f"# sub-01{told}" in capsys.readouterr().out


# --- a published data set's own table -------------------------------------------------------------


def _things_eeg1(lines, unit_s: float) -> list[tuple[object, ...]]:
    """Lines as in ds003825: Windows' paths below other folders, targets, pictures of no study."""
    rows = [(onset / unit_s, f"stimuli\\thing\\{key.rsplit('/', 1)[1]}", 0, 0)
            for onset, key in lines]  # fmt: skip
    rows.insert(1, (lines[0][0] / unit_s, rows[-1][1], 0, 1))
    rows.insert(4, (lines[1][0] / unit_s, "stimuli\\zebra\\zebra_01b.jpg", 1, 0))
    return rows


@pytest.mark.parametrize("unit_s", [0.001, 1.0])
def test_things_eeg1_s_own_table(data, capsys, unit_s):
    """Onsets in ms or s; targets are left out, and so is what is not in DATA."""
    raw, _, lines = recording()
    head = "onset,stim,isteststim,istarget"
    assert run(data, *save(data, raw, _things_eeg1(lines, unit_s), head)) == 0
    check_responses(data)
    told = capsys.readouterr().out
    assert "1 target" in told and "1 of a picture that is not in DATA" in told


def test_things_eeg1_without_a_picture_of_data_is_told(data, capsys):
    raw, _, lines = recording()
    rows = [(onset, "stimuli\\zebra\\zebra_01b.jpg", 0, 0) for onset, _ in lines]
    assert run(data, *save(data, raw, rows, "onset,stim,isteststim,istarget")) == 1
    assert "none for 3 of 3 training pictures" in capsys.readouterr().err
