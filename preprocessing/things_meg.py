"""THINGS-MEG's raw recordings (OpenNeuro ds004212): which picture a run's events are of.

A run's ``_events.tsv`` tells the sample of each picture, corrected by a light sensor, and its
number; what it was is in ``sourcedata/sample_attributes_P1.csv``, for all runs of a person.
"""

from __future__ import annotations

import re
from pathlib import Path

from datafiles.user_tables import read_columns
from preprocessing.events import EventTable, PublishedTable, Shown, file_in
from util import DataError

RAW_THINGS_MEG = PublishedTable("THINGS-MEG", frozenset({"sample", "value"}), "image_path", {}, 1.5)
OF_RUN = ("session_nr", "run_nr", "image_path")
MOST_OTHER = 20  # events of a run that the two tables number differently, as published
_RUN = re.compile(r"sub-BIGMEG(\d+)_ses-(\d+)_task-main_run-(\d+)_events")
_CURE = "take sourcedata/ and the recordings from one version of ds004212"


def attributes_beside(table: Path) -> Path | None:
    """The person's table of pictures for a run's table of events; None if it is no such run."""
    run = _RUN.fullmatch(table.stem)
    if run is None:
        return None
    places = [folder / "sourcedata" / f"sample_attributes_P{run[1]}.csv"
              for folder in table.parents]  # fmt: skip
    return next((place for place in places if place.is_file()), None)


def run_table(table: Path) -> EventTable | None:
    """A run's events with their pictures, or None where no table says what they were.

    Raises DataError for tables that do not belong together.
    """
    attributes, run = attributes_beside(table), _RUN.fullmatch(table.stem)
    rows = list(read_columns(table, "events", _CURE)) if attributes else []
    if attributes is None or run is None or not RAW_THINGS_MEG.columns <= rows[0][1].keys():
        return None
    shown = _shown(attributes, int(run[2]), int(run[3]))
    events = rows[1:]
    where = f"{attributes}, session {int(run[2])}, run {int(run[3])}"
    if len(shown) != len(events):
        raise DataError(
            where, f"{len(shown)} pictures", f"{len(events)}, as {table.name} has events", _CURE
        )
    other = sum(_differ(of.get("things_image_nr", ""), event["value"])
                for of, (_, event) in zip(shown, events, strict=True))  # fmt: skip
    if other > MOST_OTHER:
        raise DataError(
            where, f"{other} pictures of another number than in {table.name}",
            f"at most {MOST_OTHER}, which the two number differently", _CURE,
        )  # fmt: skip
    found = [Shown(line, event["sample"], file_in(of["image_path"]))
             for of, (line, event) in zip(shown, events, strict=True)]  # fmt: skip
    return EventTable(table, "sample", found, {}, published=RAW_THINGS_MEG)


def _shown(attributes: Path, session: int, run: int) -> list[dict[str, str]]:
    """The rows of one run, in its order."""
    rows = read_columns(attributes, "pictures", _CURE)
    _, head = next(rows, (1, {}))
    lost = [name for name in OF_RUN if name not in head]
    if lost:
        raise DataError(attributes, f"columns {', '.join(head)}", f"also {', '.join(lost)}", _CURE)
    wanted = (float(session), float(run))
    return [row for _, row in rows
            if (_number(row["session_nr"]), _number(row["run_nr"])) == wanted]  # fmt: skip


def _differ(one: str, other: str) -> bool:
    """Whether both are numbers, and not the same: catch trials have none in one of the tables."""
    first, second = _number(one), _number(other)
    return first is not None and second is not None and first != second


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.0+)?", text) else None
