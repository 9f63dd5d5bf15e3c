"""EEG files: the float32 copy; channels and samples by name and time."""

from __future__ import annotations

import os
import pickle
import resource

import builders
import numpy as np
import pytest

from datafiles import eeg_files
from datafiles.eeg_files import match_signal, open_recording, select_signal
from rundirs.files import file_hash, write_json
from util import DataError, UserError

SHUFFLED = ("O2", "Fz", "Pz", "O1", "Cz")


def _file(tmp_path, blob, name="preprocessed_eeg_test.npy"):
    path = tmp_path / "sub-01" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob)
    return path


def test_the_copy_is_a_float32_memory_map_of_the_source(tmp_path):
    content = builders.published()
    path = _file(tmp_path, pickle.dumps(content))
    recording = open_recording(path, tmp_path / "cache")
    assert isinstance(recording.eeg, np.memmap)
    assert recording.eeg.dtype == np.float32
    np.testing.assert_array_equal(recording.eeg, content["preprocessed_eeg_data"])
    assert recording.channels == list(builders.CHANNELS)
    np.testing.assert_allclose(recording.times, np.arange(20) / 100, atol=1e-12)
    assert recording.hash == file_hash(path)
    assert recording.path == path


def _no_parsing(*_):
    raise AssertionError("the source was parsed again")


def test_later_opens_do_not_read_the_source(tmp_path, monkeypatch):
    path = _file(tmp_path, pickle.dumps(builders.published()))
    first = open_recording(path, tmp_path / "cache")
    monkeypatch.setattr(eeg_files.registry, "parse", _no_parsing)
    second = open_recording(path, tmp_path / "cache")
    np.testing.assert_array_equal(first.eeg, second.eeg)
    assert (first.channels, first.times, first.hash) == (second.channels, second.times, second.hash)
    with pytest.raises(AssertionError, match="parsed again"):
        open_recording(path, tmp_path / "another cache")


def test_a_changed_source_gets_a_new_copy(tmp_path):
    content = builders.published()
    path = _file(tmp_path, pickle.dumps(content))
    stat = path.stat()
    before = open_recording(path, tmp_path / "cache")
    content["preprocessed_eeg_data"][0] += 1
    path.write_bytes(pickle.dumps(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    after = open_recording(path, tmp_path / "cache")
    np.testing.assert_array_equal(after.eeg[0], before.eeg[0] + 1)
    assert after.hash != before.hash


def test_a_killed_conversion_is_done_again(tmp_path):
    content = builders.published()
    path = _file(tmp_path, pickle.dumps(content))
    open_recording(path, tmp_path / "cache")
    (about,) = (tmp_path / "cache").glob("*.json")
    about.unlink()
    about.with_suffix(".npy").write_bytes(b"half")
    recording = open_recording(path, tmp_path / "cache")
    np.testing.assert_array_equal(recording.eeg, content["preprocessed_eeg_data"])


def test_a_damaged_copy_is_named_with_its_cure(tmp_path):
    path = _file(tmp_path, pickle.dumps(builders.published()))
    open_recording(path, tmp_path / "cache")
    (copy,) = (tmp_path / "cache").glob("*.npy")
    copy.write_bytes(copy.read_bytes()[:500])
    with pytest.raises(DataError, match=r"delete .*\.json"):
        open_recording(path, tmp_path / "cache")


def test_subjects_with_files_of_the_same_name_do_not_share_a_copy(tmp_path):
    contents = [builders.published(subject) for subject in (0, 1)]
    paths = [
        builders.write_published(tmp_path / f"sub-0{number}" / "a.npy", content)
        for number, content in enumerate(contents)
    ]
    for path, content in zip(paths, contents, strict=True):
        recording = open_recording(path, tmp_path / "cache")
        np.testing.assert_array_equal(recording.eeg, content["preprocessed_eeg_data"])


def test_a_cache_that_cannot_be_written_is_the_users_error(tmp_path):
    path = _file(tmp_path, pickle.dumps(builders.published()))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        open_recording(path, tmp_path / "file" / "cache")


def test_a_disk_without_room_for_the_copy_is_told_and_nothing_is_left(tmp_path):
    """By a limit on the size of files; a copy that is mapped would die of SIGBUS on a full disk."""
    path = _file(tmp_path, pickle.dumps(builders.published()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises(UserError, match=r"(?s)--cache_dir.*File too large.*with room for"):
            open_recording(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").iterdir())
    assert open_recording(path, tmp_path / "cache").eeg.shape == (12, 4, 5, 20)


def test_a_value_too_large_for_float32_is_located(tmp_path):
    content = builders.published()
    content["preprocessed_eeg_data"][3, 1, 2, 5] = 1e39
    with pytest.raises(DataError, match="condition 3, repetition 1, channel Pz, sample 5"):
        open_recording(_file(tmp_path, pickle.dumps(content)), tmp_path / "cache")


def _recording(tmp_path, channels=builders.CHANNELS, times=None):
    content = builders.published(channels=channels)
    content["times"] = content["times"] if times is None else times
    return open_recording(_file(tmp_path, pickle.dumps(content)), tmp_path / "cache")


def _channel_order(eeg):
    """Which channels, from the values of [..., C, T]."""
    names = (eeg[(0,) * (eeg.ndim - 2)][:, 0] % 1 * 16).astype(int)
    return [builders.CHANNELS[number] for number in names]


def test_channels_by_name_in_the_given_order(tmp_path):
    recording = _recording(tmp_path, SHUFFLED)
    everything = select_signal(recording, None)
    assert everything.channels == list(SHUFFLED)
    assert np.shares_memory(everything.cut(recording.eeg), recording.eeg)
    chosen = select_signal(recording, ["Pz", "O2", "Fz"])
    assert _channel_order(chosen.cut(recording.eeg)) == ["Pz", "O2", "Fz"]
    assert chosen.cut(recording.eeg[3, 1]).shape == (3, 20)


def test_an_unknown_channel_lists_the_known(tmp_path):
    with pytest.raises(UserError, match="no Oz, POz; it has Fz Cz Pz O1 O2"):
        select_signal(_recording(tmp_path), ["O1", "Oz", "POz"])


@pytest.mark.parametrize(
    ("window", "first", "last"),
    [((0.0, 0.05), 0, 4), ((0.03, 0.07), 3, 6), ((-5, 5), 0, 19), ((0.19, 0.2), 19, 19)],
)
def test_a_window_by_second_holds_its_start_and_not_its_end(tmp_path, window, first, last):
    recording = _recording(tmp_path)
    signal = select_signal(recording, None, window)
    samples = signal.cut(recording.eeg)[0, 0, 0] * 1024
    assert (samples[0], samples[-1]) == (first, last)
    assert len(samples) == last - first + 1 == len(signal.times)
    assert signal.times[0] == pytest.approx(first / 100)


def test_an_empty_window_is_refused(tmp_path):
    with pytest.raises(UserError, match="--time_window"):
        select_signal(_recording(tmp_path), None, (0.5, 0.6))


def test_a_signal_is_found_in_another_channel_order(tmp_path):
    recording = _recording(tmp_path, SHUFFLED)
    times = [0.05, 0.06, 0.07]
    signal = match_signal(recording, ["Cz", "O1"], times)
    found = signal.cut(recording.eeg)
    assert _channel_order(found) == ["Cz", "O1"]
    assert (found[0, 0, 0] % (1 / 16) * 1024).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    "times", [np.arange(-5, 20) / 250, np.arange(-5, 20) / 100 + 0.05, np.arange(-5, 20) / 100 + 3]
)
def test_another_rate_or_span_is_refused(tmp_path, times):
    recording = _recording(tmp_path, times=times)
    with pytest.raises(DataError, match="that the model was trained on"):
        match_signal(recording, ["Cz"], [second / 100 for second in range(20)])


@pytest.mark.parametrize(
    ("options", "note", "unit"),
    [({"whiten": True}, False, "whitened"), ({"whiten": False}, False, "V"), (None, False, ""),
     (None, True, "whitened"), ({"whiten": False}, True, "V")],
)  # fmt: skip
def test_the_unit_is_what_was_done_to_the_eeg(tmp_path, options, note, unit):
    if options is not None:
        write_json(tmp_path / "options.json", {"stage": "preprocess", "options": options})
    if note:
        write_json(tmp_path / eeg_files.SIMULATED_NOTE, {})
    assert eeg_files.stored_unit(tmp_path / "preprocessed_eeg_test.npy") == unit
    assert eeg_files.stored_unit(tmp_path) == unit
