"""What happens along a recording: gaps, marked segments, trigger codes, distances of events."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.recordings import Trials
from util import DataError

if TYPE_CHECKING:
    import mne

LEAST_SAMPLES = 2  # between two events, whatever the baseline
SUMMED = ("STI101", "STI 101", "STI014", "STI 014")  # hold the codes of the other STI channels
# cuts as EEGLAB, MNE and BrainVision mark them; the first segment begins with the file
_CUT = re.compile(r"(bad|edge)?[ _]*boundary|new segment/.*|edge", re.IGNORECASE)
_SKIP = re.compile(r"bad_acq_skip", re.IGNORECASE)
_BAD = re.compile(r"bad([ _].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Interruptions:
    """Samples from the recording's beginning: ``cuts`` [n] before which something is missing.

    ``gaps`` [n, 2] without signal and ``bad`` [n, 2], marked as bad, begin and end (exclusive).
    """

    cuts: np.ndarray
    gaps: np.ndarray
    bad: np.ndarray

    def crossed(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Whether something is missing in each of the spans ``begin`` to ``end``: bool [n]."""
        cut = (begin[:, None] < self.cuts) & (self.cuts <= end[:, None])
        return cut.any(axis=1) | _overlap(begin, end, self.gaps)

    def marked(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Whether each of the spans touches a segment that is marked as bad: bool [n]."""
        return _overlap(begin, end, self.bad)


def _overlap(begin: np.ndarray, end: np.ndarray, spans: np.ndarray) -> np.ndarray:
    return ((begin[:, None] < spans[:, 1]) & (spans[:, 0] <= end[:, None])).any(axis=1)


def annotated(raw: mne.io.BaseRaw) -> Iterator[tuple[str, int, int]]:
    """(text, first sample, sample behind the last) of every annotation, from the beginning."""
    notes = raw.annotations
    starts = raw.time_as_index(notes.onset, use_rounding=True, origin=notes.orig_time)
    lengths = np.round(notes.duration * raw.info["sfreq"])
    for text, start, length in zip(notes.description, starts, lengths, strict=True):
        yield str(text).strip(), int(start), int(start + length)


def interruptions(raw: mne.io.BaseRaw, markers: Sequence[str] = ()) -> Interruptions:
    """Where the recording was cut, paused or marked; ``markers`` mean pictures, whatever they say.

    The length of a cut is what was taken out, not a part of what is left.
    """
    cuts, gaps, bad = [], [], []
    for text, start, end in annotated(raw):
        if text in markers:
            continue
        if _SKIP.fullmatch(text):
            gaps.append((start, end))
        elif _CUT.fullmatch(text):
            cuts.append(start)
        elif _BAD.fullmatch(text):
            bad.append((start, max(end, start + 1)))
    return Interruptions(
        np.array([cut for cut in cuts if cut > 0], np.int64),
        np.array(gaps, np.int64).reshape(-1, 2),
        np.array(bad, np.int64).reshape(-1, 2),
    )


def trigger_codes(raw: mne.io.BaseRaw) -> list[tuple[str, int]]:
    """(code, onset sample) of the stimulus channels: every change to another code than 0.

    Codes may be held until the next one. One that lasts a single sample beside others is a trigger
    of which not all bits have risen, or fallen, yet: what follows counts, from that sample on.
    """
    import mne

    there = [raw.ch_names[index] for index in mne.pick_types(raw.info, stim=True)]
    names = [name for name in SUMMED if name in there][:1] or there
    return [
        found
        for name in names
        for found in _changes(np.abs(raw.get_data(picks=[name])[0]).astype(np.int64))
    ]


def _changes(codes: np.ndarray) -> Iterator[tuple[str, int]]:
    starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])
    begun = None  # where a code began whose bits had not all risen
    for number in range(1, len(starts) - 1):
        start, length = int(starts[number]), int(starts[number + 1] - starts[number])
        code, earlier = int(codes[start]), int(codes[start - 1])
        later = int(codes[start + length]) if start + length < len(codes) else 0
        if length == 1 and code and (earlier or later):
            begun = start if begun is None and later else begun
            continue
        if code and not (begun is not None and code == int(codes[begun - 1])):
            yield str(code), start if begun is None else begun
        begun = None


def check_apart(path: Path, trials: Mapping[str, Trials], least: int) -> None:
    """Raise DataError for two trials, of whatever partition, that are less than ``least`` apart.

    ``least`` in samples: closer ones are one event told twice, or one picture's EEG in two rows.
    """
    every = [
        (int(onset), f"{partition} picture {condition + 1}", where)
        for partition, own in trials.items()
        for onset, condition, where in zip(own.onsets, own.conditions, own.told, strict=True)
    ]
    every.sort()
    close = [
        f"{one[1]}{one[2]} at sample {one[0]} and {two[1]}{two[2]} at {two[0]}"
        for one, two in itertools.pairwise(every)
        if two[0] - one[0] < least
    ]
    if close:
        raise DataError(
            path,
            f"{len(close)} events less than {least} samples after another: {'; '.join(close[:5])}",
            "one picture at a time",
            "delete the ones that are none; for faster presentation give --min_distance SECONDS",
        )
