"""Files of ``torch.save``: zips of a pickle and of tensors, read and never run, mapped, not loaded.

Source of the layout: torch.serialization (`.format_version`, ``data.pkl``, ``data/KEY``).
"""

from __future__ import annotations

import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datafiles.pickles import (
    ADMITTED,
    REFUSED,
    ArrayStandIn,
    DtypeStandIn,
    Maker,
    RestrictedUnpickler,
    condense,
    damage_told,
    dict_of,
    from_buffer,
    mapped_file,
)

MOST_TORCH_STEPS = 400_000  # opcodes: a list of the names of all pictures has some ten thousand
_LOCAL_HEADER = 30  # bytes of a zip's entry before its name
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "b1",
}  # fmt: skip


class _StorageKind:
    """Stands in for a storage class of torch: the type of its numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("refused: the file asks to change a class")


class _Storage:
    """Stands in for a storage: bytes that stay in the file."""

    __slots__ = ("dtype", "raw")

    def __init__(self, raw: memoryview, dtype: str) -> None:
        self.raw, self.dtype = raw, dtype

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("refused: the file asks to change a storage")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_gradients: object) -> ArrayStandIn:
    """A tensor as an array; one that is not contiguous is refused: its numbers may overlap."""
    if not isinstance(storage, _Storage) or not (_counts((offset,)) and _counts(size)):
        raise pickle.UnpicklingError("damaged tensor")
    steps = [math.prod(size[place + 1 :]) for place in range(len(size))]
    if not _counts(stride) or len(stride) != len(size):
        raise pickle.UnpicklingError("damaged tensor")
    if any(n > 1 and a != b for n, a, b in zip(size, stride, steps, strict=True)):
        raise pickle.UnpicklingError("a tensor that is not contiguous; save tensor.contiguous()")
    width = np.dtype(storage.dtype).itemsize
    begin, length = offset * width, math.prod(size) * width
    if begin + length > len(storage.raw):
        raise pickle.UnpicklingError("a tensor that is longer than what is stored of it")
    raw = storage.raw[begin : begin + length]
    return from_buffer(raw, DtypeStandIn(storage.dtype), size, "C")


def _counts(given: object) -> bool:
    """Whether it is a tuple of numbers from 0 on."""
    return isinstance(given, tuple) and all(
        type(number) is int and 0 <= number <= sys.maxsize for number in given
    )


class _TorchUnpickler(RestrictedUnpickler):
    """Admits tensors, too, whose numbers are entries of the same zip."""

    admitted: Mapping[tuple[str, str], Any] = {
        **ADMITTED,
        ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor),
        **{("torch", name): _StorageKind(dtype) for name, dtype in _STORAGES.items()},
    }

    def __init__(
        self, steps: bytes, payloads: list[memoryview], storages: Mapping[str, memoryview]
    ) -> None:
        super().__init__(steps, payloads)
        self._storages = storages

    def persistent_load(self, number: Any) -> Any:
        if not isinstance(number, tuple):
            return super().persistent_load(number)
        if len(number) != 5 or number[0] != "storage" or not isinstance(number[1], _StorageKind):
            raise pickle.UnpicklingError("damaged storage")
        return _Storage(self._storages[number[2]], number[1].dtype)


def read_torch_dict(path: Path, expected: str, most: int = MOST_TORCH_STEPS) -> dict[str, Any]:
    """Read a dict of arrays and tensors, as arrays, from a file of ``torch.save``.

    Nothing in it is run, and long arrays stay in the file until they are looked at. Raises
    DataError for a missing, cut or other file, and for one that asks for more than arrays.
    """
    with damage_told(path, expected, "check --data_path and the subject's name"):
        return dict_of(path, _content(path, most), expected)


def _content(path: Path, most: int) -> Any:
    """What the file holds. Raises what :func:`damage_told` knows."""
    entries = _entries(path)
    mapped = mapped_file(path)
    inside = {name: _place(mapped, entry) for name, entry in entries.items()}
    [home] = [name for name in inside if name.endswith("/data.pkl")]
    folder = f"{home.removesuffix('.pkl')}/"
    storages = {
        name.removeprefix(folder): memoryview(mapped)[begin:end]
        for name, (begin, end) in inside.items()
        if name.startswith(folder)
    }
    _check_byte_order(mapped, inside.get(f"{Path(home).parent}/byteorder"))
    refused = [name for name in REFUSED if name != "BINPERSID"]
    steps = condense(mapped, *inside[home], most=most, refused=refused)
    return _TorchUnpickler(*steps, storages).arrays()


def _entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip by name. Raises UnpicklingError for one that torch does not write."""
    try:
        with zipfile.ZipFile(path) as file:
            found = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise pickle.UnpicklingError(f"no zip, as torch.save writes it ({error})") from None
    names = [entry.filename for entry in found]
    if sum(name.endswith("/data.pkl") for name in names) != 1 or len(set(names)) != len(names):
        raise pickle.UnpicklingError("a zip, but not of torch.save: no data.pkl, or several")
    packed = next((entry for entry in found if entry.compress_type or entry.flag_bits & 1), None)
    if packed:
        raise pickle.UnpicklingError(f"{packed.filename:.80} is compressed; torch.save stores it")
    return dict(zip(names, found, strict=True))


def _place(mapped: mmap.mmap, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a stored entry begin and end. Raises UnpicklingError."""
    at = entry.header_offset
    if mapped[at : at + 4] != b"PK\x03\x04":
        raise pickle.UnpicklingError(f"no entry at byte {at:,}")
    lengths = [int.from_bytes(mapped[at + i : at + i + 2], "little") for i in (26, 28)]
    begin = at + _LOCAL_HEADER + sum(lengths)
    if begin + entry.file_size > len(mapped):
        raise pickle.UnpicklingError(f"cut short in {entry.filename:.80}")
    return begin, begin + entry.file_size


def _check_byte_order(mapped: mmap.mmap, place: tuple[int, int] | None) -> None:
    """Raise UnpicklingError for a file of a big-endian machine; older files do not say."""
    if place and mapped[slice(*place)].strip() != b"little":
        raise pickle.UnpicklingError("numbers in big-endian order")
