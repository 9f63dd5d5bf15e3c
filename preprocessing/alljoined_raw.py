"""Alljoined-1.6M's raw recordings: an EDF per block, whose annotations number the pictures.

``raw_eeg/sub-XX/session_Y/block_Z/*.edf``, at 256 Hz; ``stim_test,16641,-1,1`` is picture 16641,
which the person's table of ``preprocessed_eeg/`` names. Several pictures may stand on one time
stamp: the recorder's ``.json`` beside the EDF tells them apart, or they are left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datafiles.datasets.alljoined import PARTITION_OF, metadata_of, picture_names
from datafiles.datasets.form import rows_of
from preprocessing.events import EventTable, Pictures, PublishedTable, Shown
from preprocessing.timeline import annotated
from util import LOG, DataError

if TYPE_CHECKING:
    import mne

RAW_ALLJOINED = PublishedTable("Alljoined-1.6M", frozenset(), "image_path", {}, 0.2)
BLOCKS = "session_*/block_*/*.edf"
SAME_S = 0.02  # events closer than this are on one time stamp; pictures follow each other in 0.2 s
AGREE_S = 0.1  # most by which the two files' clocks may drift apart within a block
ON_ONE_STAMP = "on one time stamp with another picture"
_MARK = re.compile(r"(?:.*,)?(stim_train|stim_test),(\d+),[^,]*,[^,]*")


@dataclass(frozen=True)
class Mark:
    """A picture's number within a partition of the table, and its onset in s."""

    of: tuple[str, int]
    onset_s: float


def subject_folders(root: Path) -> dict[str, list[Path]]:
    """{subject: its blocks in order} of a folder of the raw recordings; {} for another folder."""
    found = {folder.name: _blocks(folder) for folder in sorted(root.glob("sub-*"))}
    return {name: blocks for name, blocks in found.items() if blocks}


def _blocks(folder: Path) -> list[Path]:
    def order(path: Path) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", "/".join(path.parts[-3:-1]))]

    return sorted(folder.glob(BLOCKS), key=order)


def block_files(edf: Path) -> list[Path]:
    """What is read beside a block's EDF."""
    return [path for path in (_recorder_file(edf), metadata_of(_person(edf))) if path is not None]


def _person(edf: Path) -> Path:
    """Where the person's table is looked for, and above: ``preprocessed_eeg/sub-XX``."""
    folder = edf.parents[2]
    return folder.parent.parent / "preprocessed_eeg" / folder.name / "of.npy"


def _recorder_file(edf: Path) -> Path | None:
    found = sorted(edf.parent.glob("*.json"))
    return found[0] if len(found) == 1 else None


def block_table(edf: Path, raw: mne.io.BaseRaw, pictures: Pictures) -> EventTable:
    """The pictures of a block. Raises DataError where nothing says what they were."""
    rate = raw.info["sfreq"]
    marks = [
        Mark((found[1], int(found[2])), start / rate)
        for text, start, _ in annotated(raw)
        if (found := _MARK.fullmatch(text))
    ]
    if not marks:
        raise DataError(
            edf, "no annotation stim_train or stim_test", "stim_test,16641,-1,1 at each picture",
            "download it again from Alljoined/Alljoined-1.6M",
        )  # fmt: skip
    timed, lost = _told_apart(edf, marks)
    keys = _keys(edf, pictures)
    shown = [
        Shown(number, str(round(mark.onset_s * rate)), keys.get(mark.of, f"{mark.of[1]:05d}"))
        for number, mark in enumerate(timed, start=1)
    ]
    if not any(mark.of in keys for mark in timed):
        raise DataError(
            edf, f"pictures {timed[0].of[1]:05d}, ..., none of them in {pictures.data_path}",
            "pictures that the person's table names", "complete the pictures",
        )  # fmt: skip
    return EventTable(edf, "sample", shown, {ON_ONE_STAMP: lost}, published=RAW_ALLJOINED)


def _keys(edf: Path, pictures: Pictures) -> dict[tuple[str, int], str]:
    """{(partition of the table, number): key of the picture of DATA}."""
    table, found = picture_names(_person(edf)), {}
    for partition, stimuli in pictures.rows.items():
        own = [row for row in table if row[0] == PARTITION_OF[partition]]
        named = {name: number for _, number, name in own}
        rows = rows_of(list(named), stimuli)
        numbers = list(named.values())
        found |= {
            (PARTITION_OF[partition], numbers[row]): item.key
            for item, row in zip(stimuli, rows, strict=True)
            if row >= 0
        }
    return found


# ---------------------------------------------------------------- several on one time stamp


def _told_apart(edf: Path, marks: Sequence[Mark]) -> tuple[list[Mark], int]:
    """Each picture at a time of its own, and how many had to be left out."""
    shared = crowded(marks)
    if not any(shared):
        return list(marks), 0
    file = _recorder_file(edf)
    if file is not None:
        marks = _by_recorder(file, marks, shared)
        shared = crowded(marks)
    lost = sum(shared)
    if lost:
        LOG.warning("%s: %d pictures stand %s, and are left out", edf, lost, ON_ONE_STAMP)
    return [mark for mark, with_others in zip(marks, shared, strict=True) if not with_others], lost


def crowded(marks: Sequence[Mark]) -> list[bool]:
    """Whether each stands on one time stamp with another."""
    onsets = np.array([mark.onset_s for mark in marks])
    order = np.argsort(onsets, kind="stable")
    close = np.diff(onsets[order]) < SAME_S
    shared = np.zeros(len(marks), bool)
    shared[order[1:]] |= close
    shared[order[:-1]] |= close
    return shared.tolist()


def _by_recorder(file: Path, marks: Sequence[Mark], shared: Sequence[bool]) -> list[Mark]:
    """Those that share a stamp at the times of the recorder's own list, by its clock.

    Raises DataError for a list that is not of this recording.
    """
    own = _occurrences(recorder_marks(file))
    numbered = _occurrences(marks)
    alone = [key for key, one in zip(numbered, shared, strict=True) if not one and key in own]
    late = {key: numbered[key].onset_s - own[key].onset_s for key in alone}
    between = float(np.median(list(late.values()))) if late else np.nan
    apart = max((abs(value - between) for value in late.values()), default=np.inf)
    if apart > AGREE_S or len(own) != len(numbered):
        raise DataError(
            file, f"{len(own)} pictures, up to {apart:.2g} s from where the EDF has them",
            f"the list of the EDF beside it: {len(numbered)} pictures at the same times",
            "take both files of one block, or remove the .json: then pictures on one stamp are "
            "left out",
        )  # fmt: skip
    return [
        Mark(mark.of, own[key].onset_s + between) if one and key in own else mark
        for (key, mark), one in zip(numbered.items(), shared, strict=True)
    ]


def _occurrences(marks: Sequence[Mark]) -> dict[tuple[str, int, int], Mark]:
    """{(partition, number, how often it was shown before): mark}, in the marks' order."""
    before: dict[tuple[str, int], int] = defaultdict(int)
    found = {}
    for mark in marks:
        found[(*mark.of, before[mark.of])] = mark
        before[mark.of] += 1
    return found


def recorder_marks(file: Path) -> list[Mark]:
    """``Markers`` of the recorder's file, in order of time; onsets in s since the epoch."""
    expected = "Markers, each with label, value and startDatetime"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        listed: list[Mapping[str, Any]] = content["Markers"]
        found = [
            Mark((str(mark["label"]), int(mark["value"])), _seconds(str(mark["startDatetime"])))
            for mark in listed
            if str(mark["label"]) in PARTITION_OF.values()
        ]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(
            file, f"unreadable ({error or type(error).__name__})", expected,
            "copy it again, or remove it: then pictures on one stamp are left out",
        ) from None  # fmt: skip
    return sorted(found, key=lambda mark: mark.onset_s)


def _seconds(text: str) -> float:
    """Of an ISO time stamp; ``Z`` as Python 3.10 does not know it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
