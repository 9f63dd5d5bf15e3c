"""Published files: every way they were written is read, never run; damage is told."""

from __future__ import annotations

import io
import os
import pickle
import subprocess

import builders
import numpy as np
import pytest

from datafiles.datasets import things_eeg2
from datafiles.eeg_files import open_recording
from datafiles.pickles import read_pickled_dict
from util import DataError


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
    eeg, channels, times = things_eeg2.parse_published(path)[:3]
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
        things_eeg2.parse_published(path)
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
