"""What there is to know of a published form of recordings, and what is read of one of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datafiles.stimuli import Stimulus, places_within, rows_called
from util import DataError, repeated

OSF_SHAPE = (17, 100)  # channels x samples of the authors' own files, at 100 Hz
MOST_DROPPED = 0.1  # of the training pictures may have lost all their trials
MOST_LOST = 1e-3  # of the standard deviation of a trial
AGAIN = "download the file again, or preprocess the recording again"


class DealtTrials:
    """Trials as they lie in a file [M, C, T], dealt to rows: an array [N, R, C, T], read lazily.

    ``index`` int [N, R]: which trial; -1 where a row has fewer than R, which reads as zeros.
    """

    def __init__(self, flat: np.ndarray, index: np.ndarray) -> None:
        self.flat, self.index = flat, index
        self.shape = (*index.shape, *flat.shape[1:])
        self.ndim, self.dtype, self.size = 4, flat.dtype, int(np.prod(self.shape))

    @property
    def counts(self) -> list[int] | None:
        """Trials of each row; None where all have R."""
        counts = (self.index >= 0).sum(axis=1)
        return None if (counts == self.shape[1]).all() else counts.tolist()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Of a row or of all rows, as NumPy: of all of them lazily."""
        given = key if isinstance(key, tuple) else (key,)
        whole = (slice(None),) * (4 - len(given))
        (rows, repetitions), inside = (given + whole)[:2], (given + whole)[2:]
        index = self.index[rows][..., repetitions]
        if index.ndim == 2:
            return DealtTrials(self.flat[:, inside[0], inside[1]], index)
        taken = self.flat[np.maximum(index, 0)][..., inside[0], inside[1]]
        return taken if (index >= 0).all() else np.where(index[..., None, None] < 0, 0, taken)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        rows = [np.asarray(self[row], dtype) for row in range(len(self))]
        return np.stack(rows)


class Parsed(NamedTuple):
    """EEG or MEG [N, R, C, T], a read-only view of the file; channels [C]; times [T], seconds.

    ``pictures``: what the file calls the stimulus of each row, where it does: its key, or the end
    of it.
    """

    eeg: np.ndarray | DealtTrials
    channels: list[str]
    times: list[float]
    pictures: list[str] | None = None


@dataclass(frozen=True)
class Form:
    """A published form. ``folders``: patterns below DATA of what holds a folder per subject."""

    name: str  # of --dataset
    title: str
    licence: str
    layout: str
    order: str
    splits: str
    traps: Sequence[str]
    folders: Sequence[str]
    files: Mapping[str, str]  # {partition: file in the subject's folder}
    parse: Callable[[Path], Parsed]
    write: Callable[[Path, Parsed, Sequence[str]], None] | None = None  # of a partition, by keys
    names_pictures: bool = False  # whether its files say which picture each row is of


def rows_of(names: Sequence[str], stimuli: Sequence[Stimulus]) -> list[int]:
    """The row of each stimulus among ``names``, by its name or its place in DATA; -1 for none."""
    called = [item.names + more for item, more in zip(stimuli, places_within(stimuli), strict=True)]
    return rows_called(names, called)


def joined(path: Path, given: Parsed, stimuli: Sequence[Stimulus]) -> Parsed:
    """Rows in the order of the stimuli, by name; as they are where the file names no pictures.

    Raises DataError where it has no row of a picture, or a row of another. A training picture all
    of whose trials were dropped gets a row without any.
    """
    if given.pictures is None:
        return given
    rows = rows_of(given.pictures, stimuli)
    found = set(rows) - {-1}
    lost = [item.key for item, row in zip(stimuli, rows, strict=True) if row < 0]
    droppable = isinstance(given.eeg, DealtTrials) and stimuli[0].partition == "training"
    if lost and not (droppable and len(lost) <= MOST_DROPPED * len(rows)):
        raise DataError(
            path,
            f"no row of {len(lost)} of {len(rows)} pictures, e.g. {lost[0]}",
            f"a row of each picture, as it names them: {given.pictures[0]}, ...",
            "take the pictures that belong to it, under their own names",
        )
    if len(found) < len(given.pictures):
        other = next(name for row, name in enumerate(given.pictures) if row not in found)
        raise DataError(
            path,
            f"rows of {len(given.pictures)} pictures, {len(rows)} are there; not {other}",
            "the pictures that the file names",
            "complete the pictures",
        )
    keys = [item.key for item in stimuli]
    if rows == list(range(len(given.eeg))):
        return given._replace(pictures=keys)
    eeg = given.eeg
    if isinstance(eeg, DealtTrials):
        flat, index = eeg.flat, eeg.index
    else:
        flat = eeg.reshape(-1, *eeg.shape[2:])
        index = np.arange(len(flat)).reshape(eeg.shape[:2])
    none = np.full((1, index.shape[1]), -1)
    return given._replace(eeg=DealtTrials(flat, np.concatenate([index, none])[rows]), pictures=keys)


def checked(
    path: Path,
    eeg: np.ndarray,
    channels: list[str],
    times: list[float],
    pictures: list[str] | None = None,
) -> Parsed:
    """What a file holds, its rows as one axis; raises DataError where it does not fit.

    As published, times may still hold the baseline that the EEG has lost: the last ones count.
    """
    rows = as_rows(eeg)
    check_parsed(path, rows, channels, times)
    return Parsed(rows, channels, times[len(times) - rows.shape[3] :], pictures)


def check_parsed(
    path: Path, eeg: np.ndarray | DealtTrials, channels: list[str], times: list[float]
) -> None:
    """Raise DataError for EEG of another kind, or that its names and times do not fit."""
    if eeg.ndim != 4 or eeg.dtype.kind != "f" or 0 in eeg.shape:
        raise DataError(
            path,
            f"EEG of shape {eeg.shape}, {eeg.dtype}",
            "floating point (conditions, repetitions, channels, samples)",
            AGAIN,
        )
    if eeg.shape[2:] == OSF_SHAPE:
        raise DataError(
            path,
            "17 channels x 100 samples: the 100 Hz files of the OSF page",
            "all channels at 250 Hz, 63 x 250 in THINGS-EEG2",
            "use the 250 Hz release, or preprocess the raw recordings at 250 Hz with all channels",
        )
    if len(channels) != eeg.shape[2] or len(times) < eeg.shape[3]:
        raise DataError(
            path,
            f"{len(channels)} channel names and {len(times)} times for EEG {eeg.shape}",
            f"{eeg.shape[2]} names and at least {eeg.shape[3]} times",
            AGAIN,
        )
    if twice := repeated(channels):
        raise DataError(
            path,
            f"duplicate channel names: {', '.join(twice)}",
            "a name of its own for each channel",
            "preprocess the recording again, with its channels named",
        )
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise DataError(
            path,
            "times that do not grow, or NaN",
            "seconds after stimulus onset, one for each sample",
            AGAIN,
        )


def as_rows(eeg: np.ndarray) -> np.ndarray:
    """[concepts, pictures of each, R, C, T] -> [N, R, C, T], a view; others stay as they are."""
    return eeg.reshape(-1, *eeg.shape[2:]) if eeg.ndim == 5 else eeg


def compact(eeg: np.ndarray | DealtTrials) -> np.ndarray:
    """As float16 where that moves no trial by a thousandth of its standard deviation, else float32.

    Volts are below what float16 can tell apart.
    """
    wide = np.asarray(eeg, np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lost = np.square(half - wide, dtype=np.float32).mean(axis=(2, 3))
    return half if (lost <= MOST_LOST**2 * wide.var(axis=(2, 3))).all() else wide
