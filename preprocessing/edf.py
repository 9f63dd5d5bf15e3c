"""EDF and BDF files: what their header promises and MNE does not check: all records, no pauses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from util import DataError

SUFFIXES = {".edf": 2, ".bdf": 3}  # bytes of a sample
HEADER_BYTES = 256  # of the file, and again of each signal
PAUSE_S = 1e-3  # records' own times are written in steps of microseconds or so


@dataclass(frozen=True)
class EdfHeader:
    """``sizes``: bytes of each signal in a record; ``labels``, ``units``; ``pauses``: EDF+D."""

    start: int
    records: int
    record_s: float
    labels: list[str]
    units: list[str]
    sizes: list[int]
    pauses: bool

    @property
    def record_bytes(self) -> int:
        return sum(self.sizes)


def is_one(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def check_records(path: Path) -> None:
    """Raise DataError for a file that is shorter than its header says, or that has pauses.

    Times of events in a file with pauses (EDF+D) are those of the day, not those of the samples.
    """
    if not is_one(path):
        return
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_header_length(path, file.read(HEADER_BYTES), size)
        file.seek(0)
        header = _read_header(file, SUFFIXES[path.suffix.lower()])
        if header is None:  # MNE says what is wrong with it
            return
        _check_length(path, header, size)
        if header.pauses:
            _check_pauses(path, header, file)


def _read_header(file: BinaryIO, sample_bytes: int) -> EdfHeader | None:
    """None where it is none."""
    main = file.read(HEADER_BYTES)
    try:
        count = _signals(main)
        names, rest = file.read(16 * count), file.read(240 * count)
        sizes = [int(rest[200 * count + 8 * i : 200 * count + 8 * (i + 1)]) for i in range(count)]
        return EdfHeader(
            int(main[184:192]),
            int(main[236:244]),
            float(main[244:252].replace(b",", b".")),
            [names[16 * i : 16 * (i + 1)].decode("latin-1").strip() for i in range(count)],
            [_text(rest, 80 * count, i) for i in range(count)],
            [size * sample_bytes for size in sizes],
            main[192:197] in (b"EDF+D", b"BDF+D"),
        )
    except ValueError:
        return None


def _signals(main: bytes) -> int:
    """How many signals the file states to have. Raises ValueError where it states none."""
    return max(0, int(main[252:256]))


def _text(rest: bytes, begin: int, index: int) -> str:
    """An entry of 8 bytes of a column."""
    return rest[begin + 8 * index : begin + 8 * (index + 1)].decode("latin-1").strip()


def stated_units(path: Path) -> dict[str, str]:
    """{signal: its unit as written} of an EDF or BDF file; {} of another."""
    if not is_one(path):
        return {}
    with open(path, "rb") as file:
        header = _read_header(file, SUFFIXES[path.suffix.lower()])
    if header is None:
        return {}
    pairs = zip(header.labels, header.units, strict=True)
    return {name: unit for name, unit in pairs if not name.endswith(" Annotations")}


def annotation_encoding(path: Path) -> str:
    """``utf8``, as EDF+ has it, or ``latin1`` where a recorder has written something else."""
    with open(path, "rb") as file:
        header = _read_header(file, SUFFIXES[path.suffix.lower()])
        if header is None:
            return "utf8"
        for begin, size in _annotation_places(header):
            file.seek(begin)
            try:
                file.read(size).decode("utf8")
            except UnicodeDecodeError:
                return "latin1"
    return "utf8"


def _annotation_places(header: EdfHeader) -> Iterator[tuple[int, int]]:
    """(begin, bytes) of the annotations of every record."""
    own = [i for i, label in enumerate(header.labels) if label.endswith(" Annotations")]
    for record in range(header.records if header.record_bytes else 0):
        for i in own:
            before = header.start + record * header.record_bytes + sum(header.sizes[:i])
            yield before, header.sizes[i]


def _check_header_length(path: Path, main: bytes, size: int) -> None:
    """MNE looks for the names of signals that are not there, and compares each with each."""
    try:
        count = _signals(main)
    except ValueError:
        return
    if size < (count + 1) * HEADER_BYTES:
        raise DataError(
            path,
            f"{size:,} bytes",
            f"a header of {(count + 1) * HEADER_BYTES:,} bytes, of {count:,} signals as it states",
            "copy it again; it is cut off, or no EDF or BDF file",
        )


def _check_length(path: Path, header: EdfHeader, size: int) -> None:
    if header.records < 0 or not header.record_bytes:  # -1: the recorder did not count them
        return
    there = (size - header.start) / header.record_bytes
    if there < header.records:
        raise DataError(
            path,
            f"{max(there, 0):.1f} records of {header.record_s:g} s: the file ends too early",
            f"{header.records} records, {header.records * header.record_s:g} s, as its header says",
            "copy it again; if the recorder was stopped, mend its header with a tool of its maker",
        )


def _check_pauses(path: Path, header: EdfHeader, file: BinaryIO) -> None:
    """Compare the time that each record states with the one it has without pauses."""
    places = [i for i, label in enumerate(header.labels) if label.endswith(" Annotations")]
    if not places:
        return
    before = sum(header.sizes[: places[0]])
    first = None
    for record in range(header.records):
        file.seek(header.start + record * header.record_bytes + before)
        stated = file.read(header.sizes[places[0]]).split(b"\x14")[0].split(b"\x15")[0]
        try:
            onset = float(stated)
        except ValueError:
            raise DataError(
                path,
                f"record {record + 1} without its time ({stated[:20]!r})",
                "the time of each record, as EDF+D has it",
                "export it again, as continuous EDF+C",
            ) from None
        first = onset if first is None else first
        pause = onset - first - record * header.record_s
        if abs(pause) > PAUSE_S:
            at = record * header.record_s
            raise DataError(
                path,
                f"a pause of {pause:.3f} s after {at:g} s of signal (EDF+D)",
                "a continuous recording: onsets behind a pause belong to other samples",
                "export each stretch as a file of its own, with its own table",
            )
