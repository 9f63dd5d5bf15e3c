"""Damaged and hostile files for fuzzing, and the watch that is kept while one is read."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from preprocessing.reading import SET_TRIAL
from sdxl.memory import main_memory_peak

SLOWEST_S, HANG_S, MOST_BYTES = 2.0, 30.0, 1 << 30
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62)
_WORDS = (
    b"\0", b"\n", b"\r\n", b'"', b",", b"{", b"[" * 2000, b"(" * 300, b"{}", b":", b"- ", b"&a *a",
    b"!!python/object/apply:os.system ['touch canary']", b"NaN", b"Infinity", b"-1", b"1e999",
    b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"../../etc/passwd", b"\x1b[2J",
    b"__proto__", b"null", b"true", b"\xff\xd9", b"\xff\xd8", b"IHDR", b"IDAT", b"acTL", b"Exif\0",
)  # fmt: skip


# ---------------------------------------------------------------- inputs


def _numbers() -> st.SearchStrategy[bytes]:
    """Lengths and counts, in the widths and byte orders that formats use."""
    return st.builds(
        lambda number, form: struct.pack(form, number & ((1 << 8 * struct.calcsize(form)) - 1)),
        st.sampled_from(_NUMBERS),
        st.sampled_from(("B", "<H", ">H", "<I", ">I", "<Q", ">Q")),
    )


_PAYLOAD = st.one_of(_numbers(), st.sampled_from(_WORDS), st.binary(max_size=12))
_STEP = st.tuples(
    st.sampled_from(("flip", "cut", "insert", "replace", "drop", "repeat", "splice")),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    _PAYLOAD,
)


def _changed(content: bytes, step: tuple[str, int, int, bytes], other: bytes) -> bytes:
    kind, at, length, payload = step
    at %= len(content) + 1
    length = 1 + length % 64
    if kind == "flip":
        flipped = bytes(sign ^ (payload or b"\xff")[0] for sign in content[at : at + 1])
        return content[:at] + flipped + content[at + 1 :]
    return {
        "cut": content[:at],
        "insert": content[:at] + payload + content[at:],
        "replace": content[:at] + payload + content[at + len(payload) :],
        "drop": content[:at] + content[at + length :],
        "repeat": content[:at] + content[at : at + length] * 9 + content[at + length :],
        "splice": content[:at] + other[-length * 8 :],
    }[kind]


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A valid file after a few changes; one in eight is nothing but random bytes."""
    if draw(st.integers(0, 7)) == 0:
        return draw(st.binary(max_size=200))
    content, other = draw(st.sampled_from(seeds)), draw(st.sampled_from(seeds))
    for step in draw(st.lists(_STEP, min_size=1, max_size=4)):
        content = _changed(content, step, other)
    return content


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


_NAMES = (
    ("os", "system"), ("posix", "system"), ("builtins", "exec"), ("builtins", "eval"),
    ("subprocess", "check_call"), ("builtins", "getattr"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"), ("_codecs", "encode"), ("collections", "OrderedDict"),
)  # fmt: skip
_KEYS = (
    "preprocessed_eeg_data",
    "ch_names",
    "times",
    "touch canary",
    "f8",
    "O",
    "b1",
    "<",
    "C",
    "K",
)
_OPCODES: tuple[bytes, ...] = (
    b"(", b")", b"]", b"}", b"\x8f", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"d", b"l", b"t",
    b"\x85", b"\x86", b"\x87", b"R", b"b", b"o", b"\x81", b"\x92", b"\x93", b"\x94", b"N", b"\x88",
    b"\x89", b"\x90", b"\x91", b"Q", b"\x97", b"\x98",
)  # fmt: skip


def _pieces() -> st.SearchStrategy[bytes]:
    """Opcodes with an argument: names, texts, memo places, lengths that lie."""
    name = st.sampled_from(_NAMES)
    place = st.sampled_from((0, 1, 2, 3, 255))
    huge = st.sampled_from((1 << 20, 1 << 28, (1 << 31) - 1))
    return st.one_of(
        name.map(lambda pair: f"c{pair[0]}\n{pair[1]}\n".encode()),
        name.map(lambda pair: _text(pair[0]) + _text(pair[1]) + b"\x93"),
        name.map(lambda pair: f"i{pair[0]}\n{pair[1]}\n".encode()),
        st.sampled_from(_KEYS).map(_text),
        st.integers(-4, 260).map(lambda n: b"J" + struct.pack("<i", n)),
        st.binary(max_size=16).map(lambda raw: b"C" + bytes([len(raw)]) + raw),
        place.map(lambda n: b"q" + bytes([n])),
        place.map(lambda n: b"h" + bytes([n])),
        huge.map(lambda n: b"r" + struct.pack("<I", n)),
        huge.map(lambda n: b"B" + struct.pack("<I", n)),
        huge.map(lambda n: b"\x8b" + struct.pack("<i", n)),
        huge.map(lambda n: b"\x8e" + struct.pack("<Q", n << 12)),
        huge.map(lambda n: b"\x96" + struct.pack("<Q", n << 12)),
        huge.map(lambda n: b"\x95" + struct.pack("<Q", n)),
        huge.map(lambda n: f"p{n}\n".encode()),
        st.integers(1, 3).map(lambda n: b"\x82" + bytes([n])),
        st.just(b"Ptouch canary\n"),
    )


def programs() -> st.SearchStrategy[bytes]:
    """Random pickle programs."""
    step = st.one_of(st.sampled_from(_OPCODES), _pieces())
    return st.lists(step, max_size=40).map(lambda steps: b"\x80\x04" + b"".join(steps) + b".")


class Call:
    """Pickled as a call of ``function``: what a hostile file does when it is loaded."""

    def __init__(self, function: Callable[..., object], *given: object) -> None:
        self.function, self.given = function, given

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.given


def pickled(content: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    pickle.dump(content, buffer, protocol)
    return buffer.getvalue()


# ---------------------------------------------------------------- the watch


_FORBIDDEN = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
    "pty.spawn", "ctypes.dlopen", "socket.connect", "os.remove", "os.rename", "os.chmod",
    "shutil.rmtree",
)  # fmt: skip
_watching: list[Path] = []  # the folder that may be written while a reader runs
_seen: list[str] = []


def _hook(event: str, given: tuple[object, ...]) -> None:
    if not _watching:
        return
    if event in _FORBIDDEN and not _is_trial(event, given):
        _seen.append(f"{event}{given!r:.200}")
    writes = event == "open" and isinstance(given[2], int) and given[2] & 0o3
    if writes and not str(given[0]).startswith((str(_watching[0]), "/dev/null")):
        _seen.append(f"open for writing: {given[0]!r}")


def _is_trial(event: str, given: tuple[object, ...]) -> bool:
    """Our own: a .set file is first read by another process, as it may crash its reader."""
    return event == "subprocess.Popen" and list(given[1])[:-1] == SET_TRIAL


sys.addaudithook(_hook)


@dataclass
class Watch:
    """The worst that readers did: the longest time in s, and how many files were accepted."""

    inputs: int = 0
    accepted: int = 0
    slowest_s: float = 0.0


def _too_long(*_: object) -> None:
    raise AssertionError(f"more than {HANG_S} s: a hang")


def forget_peak() -> None:
    """Let the peak of memory begin at what is in use now (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def watched(folder: Path, watch: Watch) -> Iterator[None]:
    """Fails if what is inside executes, writes outside ``folder``, or takes too long.

    A hog gets a MemoryError at 4 GB more than now, so that the machine survives it; the peak of
    all inputs is judged by the caller.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MOST_BYTES, before[1]))
    _seen.clear()
    _watching.append(folder)
    begun = time.process_time()  # a busy machine makes nothing slow
    try:
        yield
    finally:
        spent = time.process_time() - begun
        _watching.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
    watch.inputs += 1
    watch.slowest_s = max(watch.slowest_s, spent)
    assert not _seen, _seen
    assert spent < SLOWEST_S, f"{spent:.1f} s"


def peak_bytes() -> int:
    return main_memory_peak()
