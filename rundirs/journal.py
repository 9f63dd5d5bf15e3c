"""The journal of pictures that generate.py writes, and that evaluate.py and report.py read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rundirs.files import read_jsonl
from util import DataError


def drawn_already(out: Path, journal: Path) -> set[tuple[int, str]]:
    """(stimulus, recipe) of the pictures that the journal lists and the disk has."""
    return {
        (record["stimulus"], record["recipe"])
        for record in read_jsonl(journal)
        if (out / record["file"]).exists()
    }


def read_journal(images: Path) -> list[dict[str, Any]]:
    """The journal of a generate.py run, of all its shards, a record per picture; [] without one.

    Raises DataError for a picture outside the run: reports and scores would show another file.
    """
    records = [
        record for path in sorted(images.glob("images*.jsonl")) for record in read_jsonl(path)
    ]
    for record in records:
        name = Path(record["file"])
        if name.is_absolute() or ".." in name.parts:
            raise DataError(
                images, f"a journal that names {name}", "pictures inside the run", "draw it again"
            )
    return list({(record["stimulus"], record["recipe"]): record for record in records}.values())


def read_run(images: Path) -> list[dict[str, Any]]:
    """As :func:`read_journal`. Raises DataError without a picture."""
    records = read_journal(images)
    if not records:
        raise DataError(
            images,
            "no pictures",
            "the output of generate.py",
            "run that stage; it goes on where it stopped",
        )
    return records
