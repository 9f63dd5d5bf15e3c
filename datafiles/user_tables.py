"""Tables that users bring: CSV or TSV in UTF-8, from any program, with any line ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from util import DataError, repeated


def read_rows(path: Path, what: str, cure: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row, the header first; a quoted cell may hold line ends.

    The separator is the one that the first line has most of: tab, semicolon or comma. Raises
    DataError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Excel begins with a byte order mark
    except FileNotFoundError:
        raise DataError(path, "no such file", f"a CSV or TSV table of {what}", cure) from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            path, f"unreadable ({error})", "a CSV or TSV table in UTF-8", "save it as UTF-8"
        ) from None
    first = text.split("\n", 1)[0]
    separator = max("\t;,", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        begun = 1
        for cells in reader:
            yield begun, cells
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}", f"not CSV ({error})", "a CSV or TSV table", cure
        ) from None


def read_columns(path: Path, what: str, cure: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: cell}) of each row below the header, stripped; empty rows are passed over.

    The first pair is the header's own: (1, {column: column}). Raises DataError.
    """
    head: list[str] = []
    for line, cells in read_rows(path, what, cure):
        if line == 1:
            cells = head = [name.strip().lower() for name in cells]
            if twice := repeated(filter(None, head)):
                raise DataError(path, f"column {twice[0]} twice", "each column once", cure)
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(head):
            raise DataError(
                f"{path}, line {line}", f"{len(cells)} cells", f"{len(head)}, as in line 1", cure
            )
        yield line, dict(zip(head, (cell.strip() for cell in cells), strict=True))


def first_of(names: tuple[str, ...], columns: dict[str, str]) -> str | None:
    """Which of the ``names`` a column may have is there."""
    return next((name for name in names if name in columns), None)
