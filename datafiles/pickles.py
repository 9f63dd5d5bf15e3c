"""Pickles of arrays, as recordings are published: read and never run, arrays mapped, not loaded."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import pickletools
import re
import tokenize
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from util import DataError

MOST_STEPS = 10_000  # opcodes of a pickle; a published file has some hundred
_MAPPED = 4096  # bytes; a shorter array is read, a longer one stays in the file
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
REFUSED = ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4")
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


# ---------------------------------------------------------------- stand-ins while unpickling


class DtypeStandIn:
    """Stands in for numpy.dtype: a name and a byte order, nothing else."""

    def __init__(self, name: object = "", *_flags: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"b1|O8?|[iufc]\d\d?|[SU]\d{1,9}", name):
            raise pickle.UnpicklingError(f"arrays of type {name!r:.80}")
        self.name = name
        self.order: Literal["<", ">", "|", "="] = "<"

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("damaged dtype")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        kind = np.dtype(self.name)
        return kind if kind.hasobject else kind.newbyteorder(self.order)


class ArrayStandIn:
    """Stands in for numpy.ndarray; checked and built afterwards."""

    def __init__(self, *_reconstruct: object) -> None:
        self.content: tuple[Any, ...] = ()  # of the file: NumPy refuses what does not fit
        self.axes: Any = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("damaged array")
        _, shape, dtype, fortran, raw = state
        self.content = (raw, dtype, shape, "F" if fortran else "C")

    def numpy(self, built: dict[int, Any]) -> np.ndarray:
        if len(self.content) != 4 or not isinstance(self.content[1], DtypeStandIn):
            raise pickle.UnpicklingError("damaged array")
        raw, dtype, shape, order = self.content
        kind = dtype.numpy()
        if kind.hasobject:
            items = [_to_numpy(item, built) for item in raw]
            flat = np.empty(len(items), dtype=object)
            for place, item in enumerate(items):  # at once, NumPy would look into what they hold
                flat[place] = item
        else:
            flat = np.frombuffer(raw, kind)
        if self.axes is not None:
            return flat.reshape(shape).transpose(self.axes)
        return flat.reshape(shape, order=order)


def from_buffer(
    raw: object, dtype: object, shape: object, order: object, axes: Any = None
) -> ArrayStandIn:
    """``axes``: protocol 5's way to store a transposed view, as stored and then transposed."""
    array = ArrayStandIn()
    array.content = (raw, dtype, shape, order)
    array.axes = axes if order == "K" else None
    return array


def _scalar(dtype: object, raw: object = b"") -> ArrayStandIn:
    return from_buffer(raw, dtype, (), "C")


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r:.80}")
    return text.encode("latin1")


class Maker:
    """What a pickle may call and not change: BUILD could set the defaults of a bare function."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *given: object) -> Any:
        return self._make(*given)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("refused: the file asks to change a function")


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Maker(DtypeStandIn),
    ("numpy", "ndarray"): Maker(ArrayStandIn),
    ("_codecs", "encode"): Maker(_latin1),
    ("collections", "OrderedDict"): Maker(dict),
}
for _core in ("numpy.core", "numpy._core"):
    ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): Maker(ArrayStandIn),
        (f"{_core}.multiarray", "scalar"): Maker(_scalar),
        (f"{_core}.numeric", "_frombuffer"): Maker(from_buffer),
    }


class RestrictedUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and plain containers; any other name is refused, never imported."""

    admitted: Mapping[tuple[str, str], Any] = ADMITTED

    def __init__(self, steps: bytes, payloads: list[memoryview]) -> None:
        super().__init__(io.BytesIO(steps))
        self._payloads = payloads

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused: the file asks to load {module:.80}.{name:.80}"
            ) from None

    def persistent_load(self, number: Any) -> Any:
        """The payload that :func:`condense` left in the file."""
        return self._payloads[number]

    def arrays(self) -> Any:
        """What the pickle holds, its stand-ins replaced by arrays."""
        return _to_numpy(self.load(), {})


def _to_numpy(value: Any, built: dict[int, Any]) -> Any:
    """Replace the stand-ins in plain containers by arrays; what is held twice is built once."""
    if not isinstance(value, ArrayStandIn | dict | list | tuple):
        return value
    if id(value) in built:
        if built[id(value)] is None:
            raise pickle.UnpicklingError("a container that holds itself")
        return built[id(value)]
    built[id(value)] = None
    if isinstance(value, ArrayStandIn):
        made: Any = value.numpy(built)
    elif isinstance(value, dict):
        made = {key: _to_numpy(item, built) for key, item in value.items()}
    else:
        made = [_to_numpy(item, built) for item in value]
    built[id(value)] = made
    return made


# ---------------------------------------------------------------- the file


def _argument(mapped: mmap.mmap, at: int, opcode: pickletools.OpcodeInfo) -> tuple[int, int]:
    """Where an opcode's argument begins behind its length, and where it ends."""
    if opcode.arg is None:
        return at, at
    kind = opcode.arg.n
    if kind == pickletools.UP_TO_NEWLINE:
        end = at
        for _ in range(2 if opcode.name in ("GLOBAL", "INST") else 1):
            end = mapped.find(b"\n", end) + 1 or len(mapped) + 1
        return at, end
    if kind in _LENGTH_BYTES:
        begin = at + _LENGTH_BYTES[kind]
        return begin, begin + int.from_bytes(mapped[at:begin], "little")
    return at, at + kind


def condense(
    mapped: mmap.mmap,
    start: int,
    stop: int | None = None,
    most: int = MOST_STEPS,
    refused: Container[str] = REFUSED,
) -> tuple[bytes, list[memoryview]]:
    """The pickle's steps from ``start`` on, and its long payloads, which they name by number.

    Nothing is built of what lengths and memo places claim before they were checked. Raises
    UnpicklingError.
    """  # fmt: skip
    steps, at = bytearray(), start
    stop = len(mapped) if stop is None else stop
    payloads: list[memoryview] = []
    for count in range(most):
        opcode = _OPCODES.get(chr(mapped[at])) if at < stop else None
        if opcode is None:
            raise pickle.UnpicklingError(f"no pickle, or cut short, at byte {at:,}")
        begin, end = _argument(mapped, at + 1, opcode)
        if end > stop and opcode.name != "FRAME":
            raise pickle.UnpicklingError(f"cut short in {opcode.name} at byte {at:,}")
        if opcode.name in refused:
            raise pickle.UnpicklingError(f"refused: the file asks for {opcode.name}")
        if opcode.name in _PUT and _memo_index(mapped[begin:end], opcode.name) > count:
            raise pickle.UnpicklingError(f"damaged {opcode.name} at byte {at:,}")
        if opcode.name in ("BINBYTES", "BINBYTES8", "BYTEARRAY8") and end - begin > _MAPPED:
            steps += b"J" + len(payloads).to_bytes(4, "little") + b"Q"  # BININT, BINPERSID
            payloads.append(memoryview(mapped)[begin:end])
        elif opcode.name != "FRAME":  # it only says how far to read ahead
            steps += mapped[at:end]
        at = end if opcode.name != "FRAME" else at + 9
        if opcode.name == "STOP":
            return bytes(steps), payloads
    raise pickle.UnpicklingError(f"more than {most:,} steps")


def _memo_index(argument: bytes, name: str) -> int:
    return int(argument) if name == "PUT" else int.from_bytes(argument, "little")


def npy_dtype(mapped: mmap.mmap) -> np.dtype | None:
    """Of an array's file, which is then read up to its data; None of another. Raises DAMAGED."""
    if mapped[:6] != b"\x93NUMPY":
        return None
    version = np.lib.format.read_magic(mapped)
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(mapped[8 : 8 + width], "little")
    if 8 + width + length > len(mapped):
        raise pickle.UnpicklingError("cut short in the header")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(mapped)[2]


def _pickle_start(mapped: mmap.mmap) -> int:
    """Where the pickle begins: at the start, or behind the header of an object array."""
    dtype = npy_dtype(mapped)
    if dtype is not None and not dtype.hasobject:
        raise pickle.UnpicklingError(f"a plain {dtype} array without channel names and times")
    return mapped.tell()


DAMAGED = (  # what reading a damaged pickle or .npy raises
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    ImportError,
    SyntaxError,  # the text header of an .npy
    tokenize.TokenError,
)


def read_pickled_dict(
    path: Path,
    expected: str = "a pickled dict with preprocessed_eeg_data, ch_names and times",
    where_cure: str = "check --data_path and the subject's name",
) -> dict[str, Any]:
    """Read a dict of arrays from a pickle, or from ``np.save`` of a 0-d object array.

    Nothing in it is run, and long arrays stay in the file until they are looked at. Raises
    DataError for a missing, empty, cut or other file, and for one that asks for more than arrays.
    """
    with damage_told(path, expected, where_cure):
        mapped = mapped_file(path)
        content = RestrictedUnpickler(*condense(mapped, _pickle_start(mapped))).arrays()
    if isinstance(content, np.ndarray) and content.dtype == object and content.size == 1:
        content = content.reshape(-1)[0]
    return dict_of(path, content, expected)


@contextlib.contextmanager
def damage_told(path: Path, expected: str, where_cure: str) -> Iterator[None]:
    """Turn what reading raises of a missing, cut or damaged file into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(path, _no_file(path, error), expected, where_cure) from None
    except DAMAGED as error:
        raise DataError(
            path,
            f"{path.stat().st_size:,} bytes, unreadable: {error or type(error).__name__}",
            expected,
            "download or convert the file again",
        ) from None


def dict_of(path: Path, content: Any, expected: str) -> dict[str, Any]:
    """Raises DataError for anything else."""
    if not isinstance(content, dict):
        raise DataError(
            path, f"a {type(content).__name__}", expected, "download or convert the file again"
        )
    return content


def mapped_file(path: Path) -> mmap.mmap:
    """A file's bytes, read only. Raises OSError, EOFError for an empty one."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise EOFError("an empty file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _no_file(path: Path, error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"


# ---------------------------------------------------------------- what it holds


def array_in(content: Mapping[str, Any], key: str) -> np.ndarray:
    """Raises TypeError for anything else: of nested lists NumPy would build what they claim."""
    if not isinstance(content[key], np.ndarray):
        raise TypeError(f"{key} is a {type(content[key]).__name__}, not an array")
    return content[key]


def list_in(content: Mapping[str, Any], key: str) -> list[Any]:
    """A flat list of plain values, whatever it was stored in. Raises TypeError."""
    value = content[key]
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list):
        raise TypeError(f"{key} is a {type(value).__name__}, not a list")
    plain = [item.item() if isinstance(item, np.ndarray) else item for item in value]
    strange = next((item for item in plain if not isinstance(item, str | int | float)), None)
    if strange is not None:
        raise TypeError(f"{key} holds a {type(strange).__name__}")
    return plain


def refuse_missing_keys(
    path: Path, content: Mapping[Any, Any], keys: tuple[str, ...], expected: str, cure: str
) -> None:
    """Raise DataError unless ``content`` has all of ``keys``."""
    lost = [key for key in keys if key not in content]
    if lost:
        there = sorted(key for key in content if isinstance(key, str))
        raise DataError(path, f"keys {there}", f"also {', '.join(lost)}: {expected}", cure)
