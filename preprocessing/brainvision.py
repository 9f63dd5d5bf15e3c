"""BrainVision's header and markers: which files it names, units, and whether the data end early."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util import DataError

_BYTES = {"INT_16": 2, "UINT_16": 2, "IEEE_FLOAT_32": 4, "INT_32": 4}
_MOST = 64 * 2**20  # bytes of a header or of markers


@dataclass(frozen=True)
class BrainVisionHeader:
    """``sections``: {section: {key: value}}, their names in lower case."""

    path: Path
    sections: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> BrainVisionHeader:
        sections: dict[str, dict[str, str]] = {}
        current = sections.setdefault("", {})
        for line in _lines(path):
            head = re.fullmatch(r"\s*\[(.+?)\]\s*", line)
            if head:
                current = sections.setdefault(head[1].strip().lower(), {})
            elif "=" in line and not line.lstrip().startswith(";"):
                key, _, value = line.partition("=")
                current.setdefault(key.strip().lower(), value.strip())
        return cls(path, sections)

    def _common(self, key: str) -> str:
        return self.sections.get("common infos", {}).get(key, "")

    def _named(self, key: str) -> Path | None:
        """``$b`` stands for the header's own name without its ending."""
        text = self._common(key).replace("$b", self.path.stem)
        return self.path.parent / text if text else None

    @property
    def data_file(self) -> Path | None:
        return self._named("datafile")

    @property
    def marker_file(self) -> Path | None:
        return self._named("markerfile")

    @property
    def channels(self) -> list[tuple[str, str, str, str]]:
        """(name, reference, resolution, unit) of each; empty where the header says nothing."""
        found = []
        for key, value in self.sections.get("channel infos", {}).items():
            if re.fullmatch(r"ch\d+", key):
                parts = [part.strip().replace(r"\1", ",") for part in value.split(",")]
                found.append((*parts, "", "", "", "")[:4])
        return found

    def units(self) -> dict[str, str]:
        """{channel: unit as written}."""
        return {name: unit.replace("\xc2", "") for name, _, _, unit in self.channels}

    def row_bytes(self) -> int:
        """Of one sample of all channels; 0 where the header does not say."""
        kind = self.sections.get("binary infos", {}).get("binaryformat", "").upper()
        count = self._common("numberofchannels")
        return _BYTES.get(kind, 0) * (int(count) if count.isdecimal() else 0)


def _lines(path: Path) -> Sequence[str]:
    """Of a text in UTF-8 or, as older recorders write it, in Latin-1; none of a huge file."""
    if path.stat().st_size > _MOST:
        return []
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return content.decode("latin-1").splitlines()


def last_marker(path: Path) -> tuple[str, int] | None:
    """(its line, its sample counted from 1) of the latest marker of a ``.vmrk``."""
    latest = None
    for line in _lines(path):
        found = re.match(r"Mk\d+=[^,]*,[^,]*,\s*(\d{1,18})\s*,", line)
        if found and (latest is None or int(found[1]) > latest[1]):
            latest = (line.strip(), int(found[1]))
    return latest


def check_data_length(path: Path, samples: int) -> None:
    """Raise DataError where the data file of a header has ended before the recording did.

    The format does not say how long a recording is. What tells it is half a sample at the end, the
    number of ``DataPoints`` that some recorders write, and markers behind the end.
    """
    if path.suffix.lower() != ".vhdr":
        return
    header = BrainVisionHeader.read(path)
    row, data = header.row_bytes(), header.data_file
    if row and data is not None and os.path.isfile(data) and data.stat().st_size % row:
        _refuse(path, f"{data.name} of {data.stat().st_size:,} bytes", f"a multiple of {row}")
    stated = header._common("datapoints")
    if stated.isdecimal() and int(stated) > samples:
        _refuse(path, f"{samples:,} samples", f"the {stated} DataPoints of its header")
    markers = header.marker_file
    latest = last_marker(markers) if markers is not None and os.path.isfile(markers) else None
    if latest and latest[1] > samples + 1:  # a last marker may stand behind the last sample
        _refuse(path, f"{samples:,} samples, and in {markers.name} {latest[0]!r}", "all of it")


def _refuse(path: Path, found: str, expected: str) -> None:
    raise DataError(
        path,
        f"{found}: the data end too early",
        expected,
        "copy it again with its .eeg; if the recorder was stopped, mend its header and markers",
    )
