"""Which picture was shown when: tables of events, joined to the pictures of DATA by name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from datafiles.captions import composed
from datafiles.stimuli import (
    IMAGE_FOLDER,
    PARTITIONS,
    STIMULUS_COLUMNS,
    Stimulus,
    check_disjoint,
    keys_hashes,
    list_stimuli,
)
from datafiles.user_tables import first_of, read_columns
from util import DataError

TIME_COLUMNS = ("onset", "sample", "marker")  # the first that a table has counts
NOTHING = ("", "n/a", "na", "nan", "none")  # an event without a picture, as BIDS writes it
CURE = "see docs/own_recordings.md for the columns"


@dataclass(frozen=True)
class Shown:
    """One line of a table: the picture, and when. ``when``: s, a sample, or a marker."""

    line: int
    when: str
    stimulus: str


@dataclass(frozen=True)
class PublishedTable:
    """Where the table of a published data set says more than a picture and its onset in seconds.

    ``columns`` tell it; ``stimulus``: a path, of which the file counts; ``left_out``: {column:
    value} of events that asked for something else than to look; ``trial_s``: from picture to
    picture, by which onsets in ms are told from seconds. Pictures that are not in DATA are left
    out: the data set shows more than one study takes.
    """

    name: str
    columns: frozenset[str]
    stimulus: str
    left_out: Mapping[str, str]
    trial_s: float


PUBLISHED_TABLES = (
    PublishedTable(  # OpenNeuro ds003825
        "THINGS-EEG1", frozenset({"onset", "stim", "isteststim", "istarget"}), "stim",
        {"istarget": "1"}, 0.1,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class EventTable:
    """``kind``: what ``when`` means, one of TIME_COLUMNS; ``dropped``: lines by why they are.

    ``unit_s``: of an onset; ``published``: whose table it is, if a published data set's.
    """

    path: Path
    kind: str
    shown: list[Shown]
    dropped: Mapping[str, int]
    unit_s: float = 1.0
    published: PublishedTable | None = None


def read_table(path: Path) -> EventTable:
    """A CSV or TSV with a header, in UTF-8, with any line ends. Raises DataError."""
    rows = read_columns(path, "events", CURE)
    _, head = next(rows, (1, {}))
    published = next((one for one in PUBLISHED_TABLES if one.columns <= head.keys()), None)
    if published is not None:
        return _published_table(path, rows, published)
    stimulus, kind = first_of(STIMULUS_COLUMNS, head), first_of(TIME_COLUMNS, head)
    if stimulus is None or kind is None:
        raise DataError(
            path,
            f"columns {', '.join(head) or '(none)'}",
            f"{' or '.join(STIMULUS_COLUMNS)}, beside {' or '.join(TIME_COLUMNS)}",
            CURE,
        )
    shown, skipped = [], 0
    for line, of in rows:
        if of[stimulus].lower() in NOTHING:
            skipped += 1
        else:
            shown.append(Shown(line, of[kind], of[stimulus]))
    if not shown:
        raise DataError(path, "no event with a picture", "a line per event", CURE)
    return EventTable(path, kind, shown, {"without picture": skipped})


def _published_table(
    path: Path, rows: Iterator[tuple[int, dict[str, str]]], published: PublishedTable
) -> EventTable:
    shown, dropped, onsets = [], {"target": 0, "without picture": 0}, []
    for line, of in rows:
        onsets.append(of["onset"])
        if any(of[column] == value for column, value in published.left_out.items()):
            dropped["target"] += 1
        elif of[published.stimulus].lower() in NOTHING:
            dropped["without picture"] += 1
        else:
            shown.append(Shown(line, of["onset"], file_in(of[published.stimulus])))
    if not shown:
        raise DataError(path, "no event with a picture", f"{published.name}'s table", CURE)
    unit = _onset_unit(onsets, published.trial_s)
    return EventTable(path, "onset", shown, dropped, unit, published)


def file_in(path: str) -> str:
    """The file of a path as any system writes it."""
    return path.replace("\\", "/").rsplit("/", 1)[-1] or path


def _onset_unit(onsets: Sequence[str], trial_s: float) -> float:
    """Seconds of a unit of onsets: 0.001 where they are milliseconds, by their usual distance."""
    numbers = np.array([float(text) for text in onsets if re.fullmatch(r"[\d.]+", text)])
    usual = float(np.median(np.diff(numbers))) if len(numbers) > 1 else trial_s
    return 0.001 if usual > 30 * trial_s else 1.0


def onset_of(event: Shown, table: EventTable) -> float:
    """The onset in s, or the sample. Raises DataError."""
    try:
        value = float(event.when)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        comma = re.fullmatch(r"\d+,\d+", event.when)
        raise DataError(
            f"{table.path}, line {event.line}",
            f"{table.kind} {event.when!r}{', with a decimal comma' if comma else ''}",
            "seconds, or samples, since the recording began",
            f"write {event.when.replace(',', '.')}, and so in all lines" if comma
            else "mend the line; an event that is none has n/a as its stimulus",
        )  # fmt: skip
    return value


@dataclass(frozen=True)
class Pictures:
    """The pictures of DATA by partition, in EEG row order."""

    rows: Mapping[str, Sequence[Stimulus]]
    data_path: Path

    @property
    def counts(self) -> dict[str, int]:
        return {partition: len(items) for partition, items in self.rows.items()}

    @property
    def hashes(self) -> dict[str, str]:
        return keys_hashes(self.rows)

    def knows(self, event: Shown) -> bool:
        """Whether a picture of DATA has the file name that is meant."""
        return composed(file_in(event.stimulus)) in self._by_file

    def find(self, event: Shown, table: Path) -> tuple[str, int]:
        """(partition, row) of the picture that a line of a table names. Raises DataError.

        It may be named by its file alone, or with as many of its folders as make it unique.
        """
        where = f"{table}, line {event.line}"
        asked = _parts(event.stimulus, where)
        found = [
            (partition, row)
            for partition, row, key in self._by_file.get(asked[-1], [])
            if key[-len(asked) :] == asked or asked[-len(key) :] == key
        ]
        if len(found) == 1:
            return found[0]
        if found:
            keys = ", ".join(self.rows[partition][row].key for partition, row in found[:3])
            raise DataError(
                where, f"{event.stimulus!r}, which may be {keys}", "one picture", "name its folder"
            )
        raise self._unknown(event, asked, where)

    def _unknown(self, event: Shown, asked: tuple[str, ...], where: str) -> DataError:
        """Names the picture that is meant, where one is near: of another file type, or misspelt."""
        known = {
            "/".join(item.key.split("/")[-len(asked) :]): item.key
            for items in self.rows.values()
            for item in items
        }
        text = "/".join(asked)
        stems = {name.rsplit(".", 1)[0]: key for name, key in known.items()}
        retyped = stems.get(text.rsplit(".", 1)[0])
        near = difflib.get_close_matches(text, known, n=1)
        perhaps = retyped or (known[near[0]] if near else None)
        return DataError(
            where,
            f"unknown stimulus {event.stimulus!r}",
            f"one of the {sum(self.counts.values())} pictures below {self.data_path}"
            + (f", perhaps {perhaps}" if perhaps else ""),
            f"write its file type as in DATA: {retyped}" if retyped
            else "mend the name, or put the picture there",
        )  # fmt: skip

    @cached_property
    def _by_file(self) -> dict[str, list[tuple[str, int, tuple[str, ...]]]]:
        """{file name: [(partition, row, parts of the key)]}."""
        index: dict[str, list[tuple[str, int, tuple[str, ...]]]] = {}
        for partition, items in self.rows.items():
            for row, item in enumerate(items):
                key = _parts(item.key, item.key)
                index.setdefault(key[-1], []).append((partition, row, key))
        return index


def pictures_by_partition(data_path: Path) -> Pictures:
    """Those of training_images/ and test_images/, whichever exist.

    Raises DataError where there are none.
    """
    there = [name for name in PARTITIONS if (Path(data_path) / IMAGE_FOLDER[name]).is_dir()]
    if not there:
        raise DataError(
            data_path,
            "neither training_images/ nor test_images/",
            "your pictures as training_images/NNNNN_concept/*.jpg and test_images/...",
            "arrange them so; docs/own_recordings.md shows how",
        )
    rows = {name: list_stimuli(data_path, name) for name in there}
    if len(rows) == len(PARTITIONS):
        check_disjoint(rows["training"], rows["test"])
    return Pictures(rows, Path(data_path))


def _parts(text: str, where: str) -> tuple[str, ...]:
    """A relative path's parts, Unicode composed. Raises DataError for one that leads elsewhere."""
    path = PurePosixPath(composed(text.replace("\\", "/")))
    if path.is_absolute() or PureWindowsPath(text).drive or ".." in path.parts or not path.parts:
        raise DataError(
            where,
            f"stimulus {text!r}",
            "a path inside DATA, without '..' and not absolute",
            "name the picture by its file, or by folder and file",
        )
    return path.parts
