"""FIF files: their chain of tags, which MNE follows without end where a damaged one turns back."""

from __future__ import annotations

import struct
from pathlib import Path

from util import DataError

_TAG = struct.Struct(">iIii")  # kind, type, size, next: 0 is behind this one, -1 is none


def check_tags(path: Path) -> None:
    """Raise DataError for a chain of tags that comes back to one that it has passed."""
    if path.suffix.lower() != ".fif":
        return
    place, passed = 0, set()
    with open(path, "rb") as file:
        while place >= 0:
            if place in passed:
                raise DataError(
                    path,
                    f"a chain of tags that comes back to byte {place:,}",
                    "a whole FIF file",
                    "it is damaged: copy it again",
                )
            passed.add(place)
            file.seek(place)
            head = file.read(_TAG.size)
            if len(head) < _TAG.size:
                return
            _, _, size, following = _TAG.unpack(head)
            place = following if following else place + _TAG.size + size
