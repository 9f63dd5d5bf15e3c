"""dataset: published files are read, never run; EEG, target and picture rows belong together."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
from collections import Counter

import builders
import numpy as np
import pytest
import torch

import dataset
from datafiles import eeg_files, published
from datafiles.eeg_files import (
    EEG_FOLDER,
    eeg_file,
    locate_test_eeg,
    match_signal,
    open_recording,
    select_signal,
)
from datafiles.feature_bank import check_clip, open_bank
from datafiles.published import read_pickled_dict
from datafiles.stimuli import list_stimuli, stimulus_id
from dataset import DataChoice, open_training
from modalities import NAMES
from rundirs.files import file_hash
from rundirs.tensors import load_tensors, save_tensors
from util import DataError, UserError

DIM = 3
SHUFFLED = ("O2", "Fz", "Pz", "O1", "Cz")

# --- stimuli ------------------------------------------------------------------------------------


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_pictures_are_listed_by_folder_then_by_file(tmp_path):
    wanted = ["00001_b/B.JPG", "00001_b/a.png", "00002_a_a/x.jpeg", "00010_c/a_10.Png"]
    noise = ["00001_b/.a.png", "00001_b/notes.txt", ".cache/a.png", "readme.png", "00003_e/x.gif"]
    _touch(tmp_path / "training_images", *reversed(wanted), *noise)
    stimuli = list_stimuli(tmp_path, "training")
    assert [item.key for item in stimuli] == [f"training_images/{name}" for name in wanted]
    assert [item.concept for item in stimuli] == ["b", "b", "a_a", "c"]
    assert all(item.path.is_file() for item in stimuli)


def test_ids_are_of_the_picture_alone(tmp_path):
    names = ["00001_a/1.png", "00002_b/1.png"]
    _touch(tmp_path / "one" / "training_images", *names)
    _touch(tmp_path / "two" / "training_images", "00000_z/0.png", "00001_a/0.png", *names)
    one = {item.key: item.id for item in list_stimuli(tmp_path / "one", "training")}
    two = {item.key: item.id for item in list_stimuli(tmp_path / "two", "training")}
    assert one.items() <= two.items()
    assert len(set(two.values())) == 4
    assert all(0 <= number < 2**63 for number in two.values())
    assert stimulus_id("test_images/00001_a/1.png") not in two.values()


def test_absent_and_empty_stimuli_are_named(tmp_path):
    with pytest.raises(DataError, match="test_images"):
        list_stimuli(tmp_path, "test")
    _touch(tmp_path, "test_images/00001_a/a.txt")
    with pytest.raises(DataError, match="no pictures"):
        list_stimuli(tmp_path, "test")


def test_a_test_concept_among_the_training_concepts_is_refused(tmp_path):
    root = builders.write_world(tmp_path)
    builders.write_picture(root / "test_images" / "00099_train3" / "a.png")
    with pytest.raises(DataError, match="train3"):
        _training(root)


# --- published files: every way they were written -----------------------------------------------


def _np_saved(content):
    buffer = io.BytesIO()
    np.save(buffer, np.array(content, dtype=object), allow_pickle=True)
    return buffer.getvalue()


class _Unframed(pickle._Pickler):
    """A pickler without frames, whose names can be exchanged for names of another length."""

    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.framer.start_framing = lambda: None


def _with_names_of(core, content, protocol):
    """A pickle as written by NumPy 1 (``numpy.core``) or NumPy 2 (``numpy._core``)."""
    buffer = io.BytesIO()
    _Unframed(buffer, protocol).dump(content)
    blob = buffer.getvalue()
    for module in ("multiarray", "numeric"):
        new = f"{core}.{module}".encode()
        for old in (f"numpy.core.{module}".encode(), f"numpy._core.{module}".encode()):
            blob = blob.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            blob = blob.replace(bytes([0x8C, len(old)]) + old, bytes([0x8C, len(new)]) + new)
    assert core.encode() + b"." in blob
    return blob


def _file(tmp_path, blob, name="preprocessed_eeg_test.npy"):
    path = tmp_path / "sub-01" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob)
    return path


def _check_parsed(path, content):
    eeg, channels, times = published.parse_published(path)
    assert type(eeg) is np.ndarray
    np.testing.assert_array_equal(eeg, content["preprocessed_eeg_data"])
    assert channels == list(builders.CHANNELS)
    assert all(type(name) is str for name in channels)
    np.testing.assert_allclose(times, np.arange(20) / builders.RATE_HZ, atol=1e-12)


@pytest.mark.parametrize("write", [lambda c, p=p: pickle.dumps(c, p) for p in range(6)])
def test_every_pickle_protocol(tmp_path, write):
    content = builders.published()
    _check_parsed(_file(tmp_path, write(content)), content)


def test_np_saved_dict(tmp_path):
    content = builders.published()
    _check_parsed(_file(tmp_path, _np_saved(content)), content)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_names_of_both_numpy_generations(tmp_path, core, protocol):
    content = builders.published()
    content["times"] = list(content["times"])  # NumPy scalars
    _check_parsed(_file(tmp_path, _with_names_of(core, content, protocol)), content)


LAYOUTS = {
    "float32": lambda eeg: eeg.astype(np.float32),
    "big endian": lambda eeg: eeg.astype(">f8"),
    "big endian float32": lambda eeg: eeg.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "transposed view": lambda eeg: eeg.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3),
    "strided view": lambda eeg: np.repeat(eeg, 2, axis=3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_array_layouts(tmp_path, layout, protocol):
    content = builders.published()
    content["preprocessed_eeg_data"] = LAYOUTS[layout](content["preprocessed_eeg_data"])
    _check_parsed(_file(tmp_path, pickle.dumps(content, protocol)), content)


@pytest.mark.parametrize("kind", [tuple, np.array, lambda c: np.array(c, dtype=object)])
@pytest.mark.parametrize("protocol", [2, 5])
def test_channel_names_in_any_container(tmp_path, kind, protocol):
    content = builders.published()
    content["ch_names"] = kind(content["ch_names"])
    _check_parsed(_file(tmp_path, pickle.dumps(content, protocol)), content)
    content["ch_names"] = [np.str_(name) for name in content["ch_names"]]
    _check_parsed(_file(tmp_path, pickle.dumps(content, protocol)), content)


def test_other_entries_are_carried_along(tmp_path):
    extra = {"flags": np.array([True, False]), "nested": [{"a": (np.int64(3), None)}], "n": 1 << 70}
    read = read_pickled_dict(_file(tmp_path, _np_saved(builders.published() | extra)))
    assert read["n"] == 1 << 70
    assert read["flags"].tolist() == [True, False]
    assert int(read["nested"][0]["a"][0]) == 3


# --- published files: what must never happen ----------------------------------------------------


class _Call:
    """Pickled as a call of ``function``: what a malicious file does when it is loaded."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


def _payloads(marker):
    make = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": _Call(os.system, f"touch '{marker}'"),
        "eval": _Call(eval, make.replace(".close()", "")),
        "exec": _Call(exec, make),
        "subprocess": _Call(subprocess.check_call, ["touch", str(marker)]),
        "os.mkdir": _Call(os.mkdir, str(marker)),
        "np.save": _Call(np.save, str(marker), np.ones(1)),
        "np.memmap": _Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
    }


def _hidden(payload):
    """Places in which a payload can travel."""
    array = np.empty(2, dtype=object)
    array[:] = ["O1", payload]
    good = builders.published()
    return {
        "alone": payload,
        "value": good | {"info": payload},
        "first": {"info": payload} | good,
        "channel": good | {"ch_names": ["O1", payload]},
        "object array": good | {"ch_names": array},
        "deep": good | {"info": [{"a": ({"b": payload},)}]},
    }


def _evil_blob(content, protocol):
    if protocol == "np.save":
        return _np_saved(content)
    return pickle.dumps(content, protocol)


def _marked(tmp_path):
    return any(path.name.startswith("marker") for path in tmp_path.iterdir())


def _refused(path, told=""):
    with pytest.raises(DataError, match=path.name) as caught:
        published.parse_published(path)
    assert told in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "np.save"])
@pytest.mark.parametrize("name", _payloads("x"))
def test_malicious_files_are_refused_and_not_run(tmp_path, name, protocol):
    for place in _hidden(None):
        payload = _payloads(tmp_path / "marker")[name]
        path = _file(tmp_path, _evil_blob(_hidden(payload)[place], protocol))
        _refused(path, "refused: the file asks to load")
        with pytest.raises(DataError):
            open_recording(path, tmp_path / "cache")
        assert not _marked(tmp_path), place


@pytest.mark.parametrize("name", _payloads("x"))
def test_the_payloads_would_have_worked(tmp_path, name):
    pickle.loads(pickle.dumps(_payloads(tmp_path / "marker")[name]))
    assert _marked(tmp_path)


def _opcodes(marker):
    """Hand-written pickles that reach for code without a plain __reduce__."""
    touch = f"touch '{marker}'".encode()
    call = b"(S" + repr(touch.decode()).encode() + b"\ntR."
    return {
        "posix.system": b"cposix\nsystem\n" + call,
        "INST": b"(S" + repr(touch.decode()).encode() + b"\niposix\nsystem\n.",
        "getattr": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR"
        + call,
        "builtins": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'dumps'\ntR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__mro__\x93.",
        "numpy.load": b"cnumpy\nload\n(S'x.npy'\ntR.",
        "reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cos\npopen\n(I0\ntS'b'\ntR.",
        "memmap": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nmemmap\n(I0\ntS'b'\ntR.",
        "testing": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n(dtR.",
        "codecs": b"c_codecs\nencode\n(S'x'\nS'punycode'\ntR.",
        "build a class": b"cnumpy\nndarray\n(dS'__reduce__'\nI1\nsb.",
        "persistent": b"Pposix\n.",
        "extension": b"\x80\x02\x82\x01.",
    }


@pytest.mark.parametrize("name", _opcodes("x"))
def test_handwritten_pickles_are_refused(tmp_path, name):
    path = _file(tmp_path, _opcodes(tmp_path / "marker")[name])
    _refused(path)
    assert not _marked(tmp_path)


def test_the_handwritten_pickles_would_have_worked(tmp_path):
    for name in ("posix.system", "INST", "getattr"):
        pickle.loads(_opcodes(tmp_path / f"marker_{name}")[name])
        assert _marked(tmp_path), name
        (tmp_path / f"marker_{name}").unlink()


def test_refused_names_are_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = _file(tmp_path, b"cevil_module\nthing\n.")
    _refused(path, "evil_module.thing")


# --- published files: damaged or another thing --------------------------------------------------


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "np.save"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    content = builders.published(rows=2, repetitions=1, samples=3)
    whole = _np_saved(content) if kind == "np.save" else pickle.dumps(content, int(kind[-1]))
    lengths = [*range(0, len(whole), 7), *range(len(whole) - 20, len(whole))]
    for length in lengths:
        path = _file(tmp_path, whole[:length])
        _refused(path, f"{length:,} bytes")


def test_other_files_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    plain = io.BytesIO()
    np.save(plain, np.ones((2, 3)))
    broken_header = _np_saved(builders.published()).replace(b"'shape': ()", b"'shape': (:")
    blobs = [rng.bytes(size) for size in (1, 10, 100, 1000) for _ in range(20)]
    blobs += [b"\x93NUMPY" + rng.bytes(60) for _ in range(20)]
    blobs += [b"hello, I am text\n", plain.getvalue(), broken_header, b"\x89PNG\r\n\x1a\n"]
    for blob in blobs:
        _refused(_file(tmp_path, blob))
    _refused(_file(tmp_path, plain.getvalue()), "plain float64 array")


@pytest.mark.parametrize("content", [[1, 2], "text", None, np.ones(3), {}, {"ch_names": ["O1"]}])
def test_another_content_is_refused(tmp_path, content):
    _refused(_file(tmp_path, pickle.dumps(content)))


def _changed(key, change):
    content = builders.published()
    content[key] = change(content[key])
    return content


def _broken_contents():
    eeg, names, times = "preprocessed_eeg_data", "ch_names", "times"
    return {
        "no times": ({eeg: np.ones((1, 1, 1, 1)), names: ["O1"]}, "also times"),
        "three axes": (_changed(eeg, lambda a: a[0]), "(4, 5, 20)"),
        "whole numbers": (_changed(eeg, lambda a: a.astype(int)), "int64"),
        "no rows": (_changed(eeg, lambda a: a[:0]), "(0, 4, 5, 20)"),
        "ragged": (_changed(eeg, lambda a: [[1.0], [1.0, 2.0]]), "kind"),
        "a channel less": (_changed(names, lambda a: a[1:]), "4 channel names"),
        "a channel more": (_changed(names, lambda a: [*a, "Oz"]), "6 channel names"),
        "no names": (_changed(names, lambda a: 5), "kind"),
        "too few times": (_changed(times, lambda a: a[:19]), "19 times"),
        "times as text": (_changed(times, lambda a: ["soon"] * 25), "kind"),
        "one time": (_changed(times, lambda a: 0.1), "kind"),
    }


@pytest.mark.parametrize("name", _broken_contents())
def test_broken_content_says_what_is_wrong(tmp_path, name):
    content, told = _broken_contents()[name]
    _refused(_file(tmp_path, pickle.dumps(content)), told)


def test_the_100_hz_release_is_recognised(tmp_path):
    content = {
        "preprocessed_eeg_data": np.zeros((2, 1, 17, 100)),
        "ch_names": [f"C{number}" for number in range(17)],
        "times": np.arange(100) / 100,
    }
    _refused(_file(tmp_path, pickle.dumps(content)), "100 Hz files")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_located_and_nothing_is_cached(tmp_path, value):
    content = builders.published()
    content["preprocessed_eeg_data"][7, 2, 3, 11] = value
    path = _file(tmp_path, pickle.dumps(content))
    with pytest.raises(DataError, match="condition 7, repetition 2, channel O1, sample 11"):
        open_recording(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_absent_recording_is_named(tmp_path):
    for call in (read_pickled_dict, lambda path: open_recording(path, tmp_path)):
        with pytest.raises(DataError, match=r"none\.npy\n.*no such file"):
            call(tmp_path / "none.npy")


# --- the float32 copy ---------------------------------------------------------------------------


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
    monkeypatch.setattr(eeg_files, "parse_published", _no_parsing)
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


# --- channels and samples -----------------------------------------------------------------------


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


# --- feature banks ------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    """DATA with one subject, its bank in DATA/bank."""
    return builders.write_world(tmp_path / "DATA")


def test_a_bank_is_joined_by_id_whatever_its_row_order(world):
    stimuli = list_stimuli(world, "training")
    order = np.random.default_rng(0).permutation(len(stimuli)).tolist()
    bank = open_bank(builders.write_bank(world / "other", world, order), "training")
    assert bank.ids == [stimuli[row].id for row in order]
    assert bank.clip == builders.CLIP
    wanted = [stimuli[row] for row in (7, 0, 11)]
    for name, rows in bank.rows_for(wanted).items():
        expected = [[builders.target(row, name)] * DIM for row in (7, 0, 11)]
        assert rows.tolist() == expected


def test_a_bank_of_other_pictures_is_refused(world):
    bank = open_bank(world / "bank", "test")
    with pytest.raises(DataError, match=r"12 of 12 pictures, e\.g\. training_images/00001_train1"):
        bank.rows_for(list_stimuli(world, "training"))
    builders.write_picture(world / "training_images" / "00001_train1" / "new.png")
    with pytest.raises(DataError, match=r"1 of 13 pictures.*new\.png"):
        _training(world)


def test_an_unfinished_or_absent_bank_is_refused(world):
    (world / "bank" / "DONE").unlink()
    with pytest.raises(DataError, match="no finished feature bank"):
        open_bank(world / "bank", "training")
    with pytest.raises(DataError, match="no such folder"):
        open_bank(world / "none", "training")


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _poison(tensors):
    tensors["text"][3, 1] = float("nan")


def _repeat_id(tensors):
    tensors["stimulus"][1] = tensors["stimulus"][0]


def _three_axes(tensors):
    tensors["image"] = tensors["image"][:, None]


def _add(tensors):
    tensors["depth"] = torch.ones(12, DIM)


@pytest.mark.parametrize(
    "spoil", [_drop("image"), _drop("stimulus"), _poison, _repeat_id, _three_axes, _add]
)
def test_a_spoilt_bank_is_refused(world, spoil):
    tensors = builders.bank_tensors(list_stimuli(world, "training"))
    spoil(tensors)
    path = world / "bank" / "training.safetensors"
    save_tensors(path, tensors, {"clip": builders.CLIP})
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")


def test_a_bank_without_its_origin_or_cut_short_is_refused(world):
    path = world / "bank" / "training.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")
    save_tensors(path, load_tensors(world / "bank" / "test.safetensors")[0], {})
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")


def test_a_bank_of_another_clip_is_refused(world):
    bank = open_bank(world / "bank", "test")
    check_clip(bank.clip, bank.path, builders.CLIP, world / "model")
    for key in builders.CLIP:
        with pytest.raises(DataError, match=f"{key} other, as .*model was trained on"):
            check_clip(bank.clip, bank.path, builders.CLIP | {key: "other"}, world / "model")


def test_bank_hash_follows_its_content(world):
    before = open_bank(world / "bank", "training").hash
    builders.write_bank(world / "bank", world, list(reversed(range(12))))
    assert open_bank(world / "bank", "training").hash != before


# --- training data ------------------------------------------------------------------------------


def _training(root, **changed):
    given = {
        "data_path": root,
        "clip_feature_path": root / "bank",
        "trials": "average",
        "val_fraction": 0.2,
        "seed": 0,
    }
    return open_training(DataChoice(**(given | changed)))


@pytest.fixture
def two_subjects(tmp_path):
    return builders.write_world(tmp_path / "DATA", (builders.CHANNELS, SHUFFLED))


def _concepts(root, rows):
    stimuli = list_stimuli(root, "training")
    return {stimuli[row].concept for row in rows.tolist()}


def test_the_split_is_by_concept_and_seeded(world):
    data = _training(world)
    held_out, trained = _concepts(world, data.val_rows), _concepts(world, data.train_rows)
    assert len(held_out) == 1
    assert not held_out & trained
    rows = data.train_rows.tolist() + data.val_rows.tolist()
    assert sorted(rows) == list(range(12))
    assert _training(world).val_rows.tolist() == data.val_rows.tolist()
    assert len({tuple(_training(world, seed=seed).val_rows.tolist()) for seed in range(9)}) > 2


def test_split_sizes():
    concepts = [f"c{number}" for number in range(1654)] * 2
    assert len(dataset.split_concepts(concepts, 0.05, 0)) == 83
    assert dataset.split_concepts(concepts, 0.05, 0) == dataset.split_concepts(
        concepts[::-1], 0.05, 0
    )
    assert dataset.split_concepts(concepts, 0, 0) == set()
    assert len(dataset.split_concepts(["a", "b"], 0.9, 0)) == 1
    assert dataset.split_concepts(["a"], 0.5, 0) == set()


def _epoch(data, epoch=0, batch_size=4, first=0):
    return list(data.batches(epoch, batch_size, first))


def _value(batch):
    """EEG less its channel and sample: 1000 x subject + 10 x row + repetition, [B]."""
    return batch.eeg[:, 0, 0] - batch.eeg[:, 0, 0] % 1


def _origin(batch):
    """(subject, row) of each sample, from the values of its EEG."""
    value = _value(batch).long()
    return (value // 1000).tolist(), (value % 1000 // 10).tolist()


@pytest.mark.parametrize("trials", ["average", "single", "random"])
def test_eeg_subject_target_and_id_belong_together(two_subjects, trials):
    data = _training(two_subjects, trials=trials, channels=["O2", "Cz", "Fz"])
    ids = [item.id for item in list_stimuli(two_subjects, "training")]
    seen = Counter()
    for batch in _epoch(data):
        assert batch.eeg.dtype == torch.float32
        assert batch.eeg.shape == (4, 3, 20)
        subjects, rows = _origin(batch)
        assert batch.subject.tolist() == subjects
        assert batch.stimulus.tolist() == [ids[row] for row in rows]
        for name in NAMES:
            expected = [[builders.target(row, name)] * DIM for row in rows]
            assert batch.targets[name].tolist() == expected
        for eeg in batch.eeg.numpy():
            # a mean of repetitions may end in .5, .25 or thirds: compare with the first channel
            offsets = (eeg[:, 0] - eeg[0, 0]) * 16
            assert offsets.tolist() == pytest.approx([0, -3, -4], abs=0.01)
        seen.update(subjects)
    assert seen.keys() == {0, 1}


def test_a_shuffled_bank_changes_no_batch(world):
    plain = _epoch(_training(world))
    order = np.random.default_rng(1).permutation(12).tolist()
    builders.write_bank(world / "bank", world, order)
    for one, other in zip(plain, _epoch(_training(world)), strict=True):
        assert torch.equal(one.eeg, other.eeg)
        assert all(torch.equal(one.targets[name], other.targets[name]) for name in NAMES)


def test_average_trials_are_the_mean(world):
    recording = _training(world).recordings[0].eeg
    for batch in _epoch(_training(world)):
        for eeg, row in zip(batch.eeg, _origin(batch)[1], strict=True):
            np.testing.assert_allclose(eeg, recording[row].mean(axis=0), rtol=1e-6)


def test_single_trials_are_all_there_once(two_subjects):
    data = _training(two_subjects, trials="single")
    seen = Counter(int(value) for batch in _epoch(data, batch_size=1) for value in _value(batch))
    rows = data.train_rows.tolist()
    expected = {1000 * s + 10 * row + rep for s in (0, 1) for row in rows for rep in range(4)}
    assert seen == dict.fromkeys(expected, 1)


def test_random_trials_are_means_of_changing_subsets(world):
    data = _training(world, trials="random")
    possible = {np.mean(subset) for subset in _subsets(4)}
    found = set()
    for epoch in range(12):
        for batch in _epoch(data, epoch):
            repetition = (batch.eeg[:, 0, 0] % 10).tolist()
            found |= {round(value, 4) for value in repetition}
    assert {round(value, 4) for value in possible} >= found
    assert len(found) > 6
    assert {0, 1, 2, 3, 1.5} <= found  # single repetitions, and the mean of all


def _subsets(count):
    return [[item for item in range(count) if mask >> item & 1] for mask in range(1, 1 << count)]


def _same(one, other):
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.eeg, b.eeg) and torch.equal(a.stimulus, b.stimulus) for a, b in pairs)


@pytest.mark.parametrize("trials", ["single", "random"])
def test_batches_depend_on_seed_and_epoch_alone(world, trials):
    data = _training(world, trials=trials)
    first = _epoch(data, 1)
    torch.manual_seed(3)
    np.random.seed(3)
    _epoch(data, 2)
    assert _same(first, _epoch(data, 1))
    assert _same(first, _epoch(_training(world, trials=trials), 1))
    assert not _same(first, _epoch(data, 2))
    flat = [number for batch in _epoch(data, 1, 1) for number in batch.stimulus.tolist()]
    assert flat[:8] == [number for batch in first for number in batch.stimulus.tolist()][:8]


@pytest.mark.parametrize("trials", ["average", "single", "random"])
def test_an_epoch_can_be_entered_anywhere(world, trials):
    data = _training(world, trials=trials)
    whole = _epoch(data, 3, 2)
    for first in range(len(whole) + 1):
        assert _same(whole[first:], _epoch(data, 3, 2, first))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_whole_batches_each_sample_at_most_once(two_subjects, batch_size):
    data = _training(two_subjects)
    batches = _epoch(data, 0, batch_size)
    assert len(batches) == data.steps_per_epoch(batch_size) == 20 // batch_size
    assert {len(batch.eeg) for batch in batches} == {batch_size}
    pairs = [pair for batch in batches for pair in zip(*_origin(batch), strict=True)]
    assert len(set(pairs)) == len(pairs)


def test_a_batch_larger_than_the_data_is_all_of_it(world):
    (batch,) = _epoch(_training(world), 0, 1000)
    assert sorted(_origin(batch)[1]) == _training(world).train_rows.tolist()


def test_held_out_rows_are_never_in_a_batch(two_subjects):
    data = _training(two_subjects, trials="single")
    rows = {row for epoch in range(3) for batch in _epoch(data, epoch) for row in _origin(batch)[1]}
    assert rows == set(data.train_rows.tolist())


def test_validation_is_subject_major_and_averaged(two_subjects):
    data = _training(two_subjects, trials="random", channels=["Pz", "O1"], val_fraction=0.4)
    eeg, subject = data.validation()
    rows = data.val_rows.tolist()
    assert len(rows) == 4
    assert subject.tolist() == [0] * 4 + [1] * 4
    values = builders.eeg_values(0, 12, 4, ["Pz", "O1"], 20)[rows].mean(axis=1)
    expected = np.concatenate([values, values + 1000])
    np.testing.assert_allclose(eeg, expected, rtol=1e-6)
    assert eeg.dtype == torch.float32


def test_without_held_out_concepts_validation_is_empty(two_subjects):
    data = _training(two_subjects, val_fraction=0)
    eeg, subject = data.validation()
    assert eeg.shape == (0, 5, 20)
    assert len(subject) == 0
    assert len(data.train_rows) == 12


def test_subjects_can_be_chosen_and_keep_the_given_order(two_subjects):
    assert _training(two_subjects).signal["subjects"] == ["sub-01", "sub-02"]
    data = _training(two_subjects, subjects=["sub-02"])
    assert {subject for batch in _epoch(data) for subject in _origin(batch)[0]} == {1}
    assert {int(number) for batch in _epoch(data) for number in batch.subject} == {0}
    data = _training(two_subjects, subjects=["sub-02", "sub-01"])
    for batch in _epoch(data):
        assert batch.subject.tolist() == [1 - subject for subject in _origin(batch)[0]]
    with pytest.raises(UserError, match=r"sub-09.*\n.*sub-01, sub-02"):
        _training(two_subjects, subjects=["sub-09"])


def test_the_signal_is_recorded(two_subjects):
    data = _training(two_subjects, channels=["Pz", "O1"], time_window=(0.05, 0.1))
    assert data.signal["channels"] == ["Pz", "O1"]
    assert data.signal["times"] == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09])
    assert data.clip == builders.CLIP
    assert data.hashes.keys() == {"clip_features", "eeg_sub-01", "eeg_sub-02"}
    plan = " ".join(data.describe())
    assert "sub-01, sub-02" in plan and "2 channels x 5 samples" in plan


def test_a_recording_with_other_rows_is_refused(world):
    content = builders.published(rows=11)
    builders.write_published(eeg_file(world, "sub-01", "training"), content)
    with pytest.raises(DataError, match="11 conditions, but 12 pictures"):
        _training(world)


def test_data_without_subjects_is_refused(world):
    shutil.rmtree(world / EEG_FOLDER)
    with pytest.raises(DataError, match="no subjects"):
        _training(world)


def test_batches_move_as_a_whole(world):
    batch = _epoch(_training(world))[0].to(torch.device("meta"))
    tensors = (batch.eeg, batch.subject, batch.stimulus, *batch.targets.values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# --- test EEG -----------------------------------------------------------------------------------


def test_test_eeg_is_found_from_file_folder_and_data(world):
    file = eeg_file(world, "sub-01", "test")
    for given in (file, file.parent, world / EEG_FOLDER, world):
        assert locate_test_eeg(given, None, None) == (file, "sub-01", world)


def test_one_of_several_subjects_must_be_named(two_subjects):
    file = eeg_file(two_subjects, "sub-02", "test")
    located = locate_test_eeg(two_subjects, "sub-02", None)
    assert located == (file, "sub-02", two_subjects)
    for subject in (None, "sub-07"):
        with pytest.raises(UserError, match=r"--subject\n(.*\n)*.*sub-01, sub-02"):
            locate_test_eeg(two_subjects, subject, None)


def test_test_eeg_errors(tmp_path):
    with pytest.raises(UserError, match="--eeg_data"):
        locate_test_eeg(tmp_path / "none", None, None)
    with pytest.raises(UserError, match="none found"):
        locate_test_eeg(tmp_path, None, None)


def test_a_file_elsewhere_has_no_pictures_unless_told(world, tmp_path):
    path = tmp_path / "mine" / "sub-33" / "eeg.npy"
    path.parent.mkdir(parents=True)
    shutil.copy(eeg_file(world, "sub-01", "test"), path)
    assert locate_test_eeg(path, None, None) == (path, "sub-33", None)
    assert locate_test_eeg(path, "sub-01", world) == (path, "sub-01", world)


def test_opened_test_eeg_is_averaged_cut_and_named(two_subjects):
    file, subject, data_path = locate_test_eeg(two_subjects, "sub-02", None)
    times = [0.05, 0.06]
    opened = dataset.open_test(file, subject, data_path, None, ["Cz", "O2"], times)
    expected = builders.eeg_values(1, 3, 4, ["Cz", "O2"], 20).mean(axis=1)[..., 5:7]
    np.testing.assert_allclose(opened.eeg, expected, rtol=1e-6)
    stimuli = list_stimuli(two_subjects, "test")
    assert opened.ids == [item.id for item in stimuli]
    assert opened.names == ["00001_test1", "00002_test2", "00003_test3"]
    assert (two_subjects / "eeg_cache").is_dir()


def test_test_eeg_without_pictures_has_ids_of_its_rows(two_subjects, tmp_path):
    file = eeg_file(two_subjects, "sub-01", "test")
    opened = dataset.open_test(file, "sub-01", None, tmp_path / "cache", ["Cz"], [0.0])
    assert opened.names[2] == "00003_unknown"
    assert len(set(opened.ids)) == 3
    assert opened.stimuli is None
    assert json.loads(next((tmp_path / "cache").glob("*.json")).read_text())["shape"][0] == 3


def test_test_eeg_with_other_rows_than_pictures_is_refused(world):
    builders.write_picture(world / "test_images" / "00009_new" / "a.png")
    file = eeg_file(world, "sub-01", "test")
    with pytest.raises(DataError, match="3 conditions, but 4 pictures"):
        dataset.open_test(file, "sub-01", world, None, ["Cz"], [0.0])
