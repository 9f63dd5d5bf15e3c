"""published: what is small on disk stays small in memory; long arrays stay in their file."""

from __future__ import annotations

import pickle
import struct
import time

import builders
import numpy as np
import pytest
from helpers_fuzz import forget_peak, peak_bytes

from datafiles import pickles
from datafiles.datasets.things_eeg2 import parse_published
from datafiles.pickles import read_pickled_dict
from util import DataError


def _laughs(wrap) -> object:
    """10^30 leaves in a few hundred bytes, as each level holds the one below ten times."""
    value: object = ["O1"]
    for _ in range(30):
        value = wrap([value] * 10)
    return value


def _objects(items: list) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _itself() -> list:
    value: list = []
    value.append(value)
    return value


def _deep(wrap, depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def _program(*steps: bytes) -> bytes:
    return b"\x80\x04" + b"".join(steps) + b"."


_CONTENTS = {
    "laughing lists": _laughs(list),
    "laughing tuples": _laughs(tuple),
    "laughing dicts": _laughs(lambda items: dict(enumerate(items))),
    "laughing object arrays": _laughs(_objects),
    "itself": _itself(),
}
_BOMBS = {
    "deep tuple as key": _program(b"}", b"K\1", b"\x85" * 9_000, b"N", b"s"),
    "deep lists": _program(b"]" * 9_000, b"a" * 8_999),
    "memo place": _program(b"}", b"r" + struct.pack("<I", 2**31 - 1)),
    "text memo place": _program(b"}", b"p2000000000\n"),
    "length of bytes": _program(b"\x8e" + struct.pack("<Q", 2**50)),
    "length of text": _program(b"\x8d" + struct.pack("<Q", 2**50)),
    "length of a number": _program(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "frame": _program(b"\x95" + struct.pack("<Q", 2**50), b"N"),
    "many steps": _program(b"N0" * pickles.MOST_STEPS),
    "colliding keys": _program(b"}", b"".join(
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for n in range(3000)
    )),
    "npy header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{}",
}  # fmt: skip


def _refused(path, blob: bytes) -> str:
    path.write_bytes(blob)
    forget_peak()
    before, begun = peak_bytes(), time.perf_counter()
    with pytest.raises(DataError, match=path.name) as caught:
        parse_published(path)
    assert time.perf_counter() - begun < 2
    assert peak_bytes() - before < 200e6
    return str(caught.value)


@pytest.mark.parametrize("key", ["preprocessed_eeg_data", "ch_names", "times", "more"])
@pytest.mark.parametrize("name", _CONTENTS)
def test_what_is_small_on_disk_stays_small(tmp_path, name, key):
    content = builders.published(rows=2, samples=4) | {key: _CONTENTS[name]}
    path, blob = tmp_path / "a.npy", pickle.dumps(content)
    assert len(blob) < 20_000
    if key == "more" and name != "itself":
        path.write_bytes(blob)
        assert parse_published(path)[0].shape == (2, 4, 5, 4)
    else:
        _refused(path, blob)


@pytest.mark.parametrize("name", _BOMBS)
def test_bombs_are_refused(tmp_path, name):
    _refused(tmp_path / "a.npy", _BOMBS[name])


def test_a_file_cannot_change_the_reader(tmp_path):
    name = b"\x8c\x16numpy._core.multiarray\x8c\x06scalar\x93"
    state = b"N}\x8c\x0c__defaults__N\x85s\x86"
    told = _refused(tmp_path / "a.npy", _program(name, state, b"b"))
    assert "refused: the file asks to change a function" in told
    assert pickles._scalar.__defaults__ == (b"",)


def test_what_a_file_says_reaches_the_terminal_tamed(tmp_path):
    name = "\x1b[2Jx" * 100_000
    content = builders.published() | {"ch_names": [name, name, "a", "b", "c"]}
    told = _refused(tmp_path / "a.npy", pickle.dumps(content))
    assert "\x1b" not in told and r"\x1b[2J" in told and len(told) < 10_000


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_long_arrays_stay_in_the_file(tmp_path, protocol):
    shape = (200, 4, 63, 250)  # 100 MB
    content = builders.published() | {"preprocessed_eeg_data": np.ones(shape)}
    content |= {"ch_names": [f"C{n}" for n in range(63)], "times": np.arange(300) / 250}
    path = builders.write_published(tmp_path / "a.npy", content, protocol)
    del content
    forget_peak()
    before = peak_bytes()
    eeg, _, _ = parse_published(path)[:3]
    assert eeg.shape == shape and eeg[199, 3, 62, 249] == 1 and not eeg.flags.writeable
    assert peak_bytes() - before < 20e6


def test_a_mapped_array_is_read_right_wherever_it_begins(tmp_path):
    """Payloads behind names of any length: unaligned, too."""
    for length in range(1, 9):
        content = builders.published() | {"x" * length: 1}
        content = dict(sorted(content.items(), reverse=True))
        path = builders.write_published(tmp_path / "a.npy", content)
        found = read_pickled_dict(path)["preprocessed_eeg_data"]
        np.testing.assert_array_equal(found, content["preprocessed_eeg_data"])
