"""What there is to know of a published form of recordings, and what is read of one of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util import DataError, repeated

OSF_SHAPE = (17, 100)  # channels x samples of the authors' own files, at 100 Hz
MOST_LOST = 1e-3  # of the standard deviation of a trial
AGAIN = "download the file again, or preprocess the recording again"


class Parsed(NamedTuple):
    """EEG or MEG [N, R, C, T], a read-only view of the file; channels [C]; times [T], seconds.

    ``pictures``: the stimuli's keys in row order, where the file states them.
    """

    eeg: np.ndarray
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


def check_parsed(path: Path, eeg: np.ndarray, channels: list[str], times: list[float]) -> None:
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


def compact(eeg: np.ndarray) -> np.ndarray:
    """As float16 where that moves no trial by a thousandth of its standard deviation, else float32.

    Volts are below what float16 can tell apart.
    """
    wide = np.asarray(eeg, np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lost = np.square(half - wide, dtype=np.float32).mean(axis=(2, 3))
    return half if (lost <= MOST_LOST**2 * wide.var(axis=(2, 3))).all() else wide
