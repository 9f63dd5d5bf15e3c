"""Stage 0 along a recording: triggers, distances, gaps, marked segments, files that end early."""

from __future__ import annotations

import shutil
from pathlib import Path

import mne
import numpy as np
import pytest
from helpers_own import PICTURES, check_responses, recording, run, save, write_data
from helpers_raw import RATE_HZ, SOA_S, write_edf, write_events

from datafiles.datasets.things_eeg2 import EEG_FOLDER
from preprocessing import quality
from preprocessing.epochs import Stretch, Window, cut_trials
from preprocessing.timeline import interruptions, trigger_codes


@pytest.fixture(autouse=True)
def no_figures(monkeypatch) -> None:
    monkeypatch.setattr(quality, "draw_quality", lambda *_: None)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path)


# --- triggers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "events"),
    [
        ([0, 5, 5, 0, 0, 7, 7, 0], [("5", 1), ("7", 5)]),  # pulses
        ([0, 5, 0, 7, 0], [("5", 1), ("7", 3)]),  # of one sample
        ([0, 0, 5, 5, 5, 3, 3, 3, 9, 9], [("5", 2), ("3", 5), ("9", 8)]),  # held, smaller ones too
        ([0, 0, 1, 3, 3, 3, 0, 0], [("3", 2)]),  # its second bit rises a sample late
        ([0, 1, 3, 7, 7, 7, 0, 0], [("7", 1)]),
        ([0, 3, 3, 3, 1, 0, 0, 2, 2, 0], [("3", 1), ("2", 7)]),  # its bits fall one by one
        ([4, 4, 4, 0, 6, 6], [("6", 4)]),  # what it began with is no event
        ([2, 2, 3, 2, 2, 0], []),  # a flicker of the last bit is none
    ],
)
def test_codes_of_a_stimulus_channel(codes, events):
    info = mne.create_info(["Cz", "STI 014"], 100.0, ["eeg", "stim"])
    signal = np.array([np.zeros(len(codes)), codes], float)
    assert trigger_codes(mne.io.RawArray(signal, info, verbose="error")) == events


def test_held_codes_find_their_pictures(data):
    raw, events, _ = recording()
    held = np.zeros((1, raw.n_times))
    for onset, _, code in events.tolist():
        held[:, onset:] = code
    stim = mne.io.RawArray(held, mne.create_info(["STI 014"], RATE_HZ, "stim"), verbose="error")
    raw.add_channels([stim], force_update_info=True)
    book = [(code, PICTURES[code - 1]) for code in (1, 2, 3, 4)]
    assert run(data, *save(data, raw, book, "marker,stimulus")) == 0
    check_responses(data)


@pytest.mark.parametrize("later", [0, 1, 20])
def test_events_that_are_too_close_are_refused_with_both_lines(data, capsys, later):
    """Of two partitions, too: one trial would be the EEG of two pictures."""
    raw, events, _ = recording()
    lines = [(onset, PICTURES[code - 1]) for onset, _, code in events.tolist()]
    lines.append((int(events[0, 0]) + later, PICTURES[3]))
    flags = save(data, raw, lines, "sample,stimulus")
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert "training picture 1 (line 2)" in told and "test picture 1 (line 14)" in told
    assert not (data / EEG_FOLDER).exists()
    assert run(data, *flags, "--min_distance", 0.03) == (0 if later == 20 else 1)


def test_a_recording_is_read_once(data, capsys):
    raw, _, lines = recording()
    _, file, _, table = save(data, raw, lines)
    copy = shutil.copy(file, data / "b_raw.fif")
    assert run(data, "--raw", file, copy, "--events", table, table) == 1
    assert f"the same signal as {file}" in capsys.readouterr().err
    assert not (data / EEG_FOLDER).exists()


def test_a_marker_may_begin_with_bad(data):
    raw, events, _ = recording()
    names = ["badminton", "edge of town", "house", " boat "]
    texts = [names[code - 1] for _, _, code in events.tolist()]
    raw.set_annotations(mne.Annotations(events[:, 0] / RATE_HZ, 0.0, texts))
    book = [(name.strip(), key) for name, key in zip(names, PICTURES, strict=True)]
    assert run(data, *save(data, raw, book, "marker,stimulus")) == 0
    check_responses(data)


# --- gaps and marks -----------------------------------------------------------------------------


def test_cuts_lengths_and_marks():
    raw = mne.io.RawArray(np.zeros((1, 1000)), mne.create_info(1, 100.0, "eeg"), verbose="error")
    notes = [(0.0, 0.0, "New Segment/"), (2.0, 3.0, "boundary"), (3.0, 0.0, "New Segment/"),
             (4.0, 0.0, "BAD boundary"), (4.0, 0.0, "EDGE boundary"), (5.0, 1.0, "BAD_ACQ_SKIP"),
             (7.0, 0.5, "BAD blink"), (8.0, 0.0, "badge")]  # fmt: skip
    raw.set_annotations(mne.Annotations(*zip(*notes, strict=True)))
    found = interruptions(raw)
    assert sorted(set(found.cuts.tolist())) == [200, 300, 400]
    assert found.gaps.tolist() == [[500, 600]] and found.bad.tolist() == [[700, 750]]
    begin = np.array([100, 199, 200, 480, 600, 690, 750])
    end = begin + 50
    assert found.crossed(begin, end).tolist() == [False, True, False, True, False, False, False]
    assert found.marked(begin, end).tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("text", ["boundary", "EDGE boundary", "BAD_ACQ_SKIP", "New Segment/"])
def test_a_trial_across_a_gap_is_dropped_and_counted(data, capsys, text):
    """It would be half another time's EEG; here its values would be wrong."""
    raw, events, lines = recording()
    at = int(events[1, 0]) + 100
    raw._data[:, at : at + 150] = 0  # what was there is lost
    length = 0.3 if text == "BAD_ACQ_SKIP" else 0.0
    raw.set_annotations(mne.Annotations(at / RATE_HZ, length, text))
    assert run(data, *save(data, raw, lines), "--keep_bad_segments") == 0
    assert "1 across a gap" in capsys.readouterr().out
    check_responses(data)


def test_trials_in_marked_segments_are_dropped_unless_wanted(data, capsys):
    raw, events, lines = recording()
    start = (int(events[0, 0]) + 50) / RATE_HZ
    raw.set_annotations(mne.Annotations(start, 2 * SOA_S, "BAD_movement"))
    flags = save(data, raw, lines)
    assert run(data, *flags) == 0
    assert "3 in marked segments" in capsys.readouterr().out
    assert "3 in marked segments" in (data / EEG_FOLDER / "sub-01/quality.md").read_text()
    check_responses(data)
    kept = ("--keep_bad_segments", "--output_path", data / "kept")
    assert run(data, *flags, *kept) == 0
    assert "in marked segments" not in capsys.readouterr().out


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw_hz", [256.0, 256.016, 300.0, 500.0, 512.0, 1000.0, 2048.0])
@pytest.mark.parametrize("out_hz", [100.0, 128.0, 250.0])
def test_every_pair_of_rates_gives_the_samples_that_are_written(raw_hz, out_hz):
    for start, end in ((-0.1, 1.2), (-0.2, 1.0), (-0.1, 0.8), (-0.25, 0.333)):
        window = Window(start, end, raw_hz, out_hz)
        first, last = window.offsets
        signal = np.zeros((1, last - first + 50))
        stretch = Stretch(signal, np.array([-first]), np.array([0]), None)
        assert cut_trials(stretch, window, "float32").trials.shape == (1, 1, window.kept)
    published = Window(-0.2, 1.0, 1000.0, 250.0)  # as before, sample by sample
    assert published.offsets == (-200, 1000)


def bump(times: np.ndarray) -> np.ndarray:
    """A response without anything above 25 Hz, zero at both ends of a trial."""
    return np.exp(-0.5 * ((times - 0.35) / 0.04) ** 2)


def cut_bump(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(samples from the onset on, their times) of a trial that holds ``bump``."""
    first, last = window.offsets
    signal = bump(np.arange(first, last + 1) / window.raw_hz)[None]
    chunk = cut_trials(Stretch(signal, np.array([-first]), np.array([0]), None), window, "float64")
    return chunk.trials[0, 0], chunk.times[-window.kept :]


@pytest.mark.parametrize(
    "raw_hz", [200.0, 250.0, 256.0, 256.016, 300.0, 500.0, 512.0, 1000.0, 1024.0, 2048.0, 5000.0]
)
@pytest.mark.parametrize("out_hz", [100.0, 128.0, 250.0])
def test_samples_lie_where_their_times_say(raw_hz, out_hz):
    """A shift of 0.1 ms would be an error of 1.5e-3."""
    for start, end in ((-0.2, 1.0), (-0.1, 0.8), (-0.1, 1.2)):
        found, times = cut_bump(Window(start, end, raw_hz, out_hz))
        assert np.abs(times - np.arange(len(found)) / out_hz).max() < 1e-12  # the onset's is first
        assert np.abs(found - bump(times)).max() < 1e-3


def test_the_published_method_is_kept_and_its_offset_is_as_documented():
    """From 1000 to 250 Hz a value was recorded 1.0 ms later; docs/own_recordings.md says so."""
    found, times = cut_bump(Window(-0.2, 1.0, 1000.0, 250.0, published=True))
    shifts = np.arange(-3000, 3001, 50) * 1e-6
    errors = [np.abs(found - bump(times + shift)).max() for shift in shifts]
    assert shifts[int(np.argmin(errors))] == pytest.approx(1e-3, abs=1e-6)
    assert min(errors) < 1e-6


# --- EDF ----------------------------------------------------------------------------------------


def edf(data: Path, pauses: dict[int, float] | None) -> tuple[object, ...]:
    raw, _, lines = recording()
    rows = [",".join(map(str, line)) for line in lines]
    table = write_events(data / "a.csv", "onset,stimulus", rows)
    return "--raw", write_edf(data / "a.edf", raw, pauses), "--events", table


def test_edf_d_without_a_pause_is_read(data):
    assert run(data, *edf(data, {})) == 0
    check_responses(data, tolerance=0.05)  # of 16 bits


def test_edf_d_with_a_pause_is_refused_with_its_place(data, capsys):
    assert run(data, *edf(data, {7: 2.5})) == 1
    told = capsys.readouterr().err
    assert "a pause of 2.500 s after 7 s of signal" in told
    assert not (data / EEG_FOLDER).exists()


def test_an_edf_file_that_ends_early_is_refused(data, capsys):
    flags = edf(data, None)
    content = (data / "a.edf").read_bytes()
    (data / "a.edf").write_bytes(content[: int(0.6 * len(content))])
    assert run(data, *flags) == 1
    told = capsys.readouterr().err
    assert "the file ends too early" in told and "21 records" in told


def test_an_edf_header_of_more_signals_than_the_file_is_long_is_refused(data, capsys):
    flags = edf(data, None)
    content = (data / "a.edf").read_bytes()
    (data / "a.edf").write_bytes(content[:252] + b"9999" + content[256:])
    assert run(data, *flags) == 1
    assert "a header of 2,560,000 bytes, of 9,999 signals" in capsys.readouterr().err
