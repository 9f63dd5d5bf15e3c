"""One session: cut into trials, piece by piece, into a file of its own."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing import quality
from preprocessing.channels import ChannelReader, prepare
from preprocessing.epochs import CHUNK, Stretch, Window, cut_all
from preprocessing.hints import explained
from preprocessing.recordings import Recorded, Session, Subject, Trials
from preprocessing.timeline import LEAST_SAMPLES, check_apart, interruptions
from preprocessing.whitening import condition_weights
from rundirs.files import atomic_write, write_json
from util import LOG, DataError

PUBLISHED_HZ = 250.0  # the rate of THINGS-EEG2's files
PIECE_S = 120.0  # longest stretch of recording that is cut at once


@dataclass(frozen=True)
class Settings:
    """What is done to every session, by the names of the flags.

    ``channels``: as asked, until they are found in the recordings; ``band_pass`` and ``rate`` in
    Hz, ``epoch`` in s around the onset.
    """

    channels: list[str] | None
    interpolate_missing: bool
    reference: list[str] | None
    band_pass: list[float] | None
    epoch: list[float]
    rate: float
    whiten: bool
    dtype: str
    seed: int
    n_jobs: int
    keep_bad_segments: bool
    min_distance: float | None

    def least_distance(self, raw_hz: float) -> int:
        """Samples between two events: as asked in s, or half the baseline; at least two."""
        wanted_s = -self.epoch[0] / 2 if self.min_distance is None else self.min_distance
        return max(LEAST_SAMPLES, round(wanted_s * raw_hz))

    def window(self, raw_hz: float, published: bool = False) -> Window:
        """``published``: a recording of THINGS-EEG2, to 250 Hz resampled as its authors did."""
        alike = published and self.rate == PUBLISHED_HZ
        return Window(self.epoch[0], self.epoch[1], raw_hz, self.rate, alike)

    @property
    def kept(self) -> int:
        """Samples of a trial that are written."""
        return self.window(self.rate).kept

    @property
    def trial_bytes(self) -> int:
        return len(self.channels) * self.kept * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class SessionTrials:
    """The kept trials of one session and partition, on disk.

    ``conditions`` [n]: 0-based picture row of each; ``sigma`` [C, C]: their mean covariance, zero
    if it was not asked for; ``evoked`` [C, T + baseline], their mean, in volts or tesla; ``times``.
    """

    trials: Path
    conditions: np.ndarray
    sigma: np.ndarray
    evoked: np.ndarray
    times: np.ndarray

    def save(self) -> None:
        with atomic_write(self.trials.with_suffix(".npz"), "wb") as file:
            np.savez(
                file,
                conditions=self.conditions,
                sigma=self.sigma,
                evoked=self.evoked,
                times=self.times,
            )

    @classmethod
    def load(cls, trials: Path) -> SessionTrials:
        with np.load(trials.with_suffix(".npz"), allow_pickle=False) as file:
            return cls(trials, file["conditions"], file["sigma"], file["evoked"], file["times"])


def choose(trials: Trials, repetitions: int | None, seed: int, path: Path) -> np.ndarray:
    """Indices of the kept trials, by condition, then as drawn; all if ``repetitions`` is None.

    Drawn as THINGS-EEG2 does. Raises DataError for a picture that was shown less often.
    """
    from sklearn.utils import shuffle

    if repetitions is None:
        return np.lexsort((trials.onsets, trials.conditions))
    refuse_rare(Counter(trials.conditions.tolist()), repetitions, path)
    kept = []
    for condition in np.unique(trials.conditions):
        shown = np.flatnonzero(trials.conditions == condition)
        kept.append(shuffle(shown, random_state=seed, n_samples=repetitions))
    return np.concatenate(kept)


def refuse_rare(shown: Mapping[int, int], repetitions: int | None, path: Path) -> None:
    """Raise DataError for a picture that a session shows less often than it must."""
    for condition, times in shown.items() if repetitions else ():
        if times < repetitions:
            raise DataError(
                path,
                f"picture {condition + 1} was shown {times} times",
                f"{repetitions} times in each session",
                "the recording is incomplete: download it again",
            )


def pieces(
    signal: ChannelReader, trials: Trials, window: Window, weights: np.ndarray | None
) -> Iterator[Stretch]:
    """The recording around the trials, in the order of time, few trials and seconds at a time."""
    first, last = window.offsets
    order = np.argsort(trials.onsets)
    longest = PIECE_S * window.raw_hz
    begin = 0
    while begin < len(order):
        start = trials.onsets[order[begin]]
        reach = np.searchsorted(trials.onsets[order], start + longest, side="right")
        rows = order[begin : min(begin + CHUNK, max(int(reach), begin + 1))]
        onsets = trials.onsets[rows] - (start + first)
        stop = int(trials.onsets[rows[-1]]) + last + 1
        yield Stretch(
            signal.read(int(start) + first, stop),
            onsets,
            rows,
            None if weights is None else weights[rows],
        )
        begin += len(rows)


def extract(
    signal: ChannelReader,
    trials: Trials,
    window: Window,
    settings: Settings,
    path: Path,
    whiten: bool,
    label: str,
) -> SessionTrials:
    """Cut the trials of a partition into ``path`` [n, C, T], row by row."""
    from rundirs.progress import Progress

    weights = condition_weights(trials.conditions) if whiten else None
    temporary = path.with_name(f".{path.name}.tmp")
    evoked, sigma, times = 0.0, 0.0, None
    with (
        open(temporary, "wb") as file,
        Progress(total=len(trials.onsets), desc=label, unit="trial", leave=False) as bar,
    ):
        stretches = pieces(signal, trials, window, weights)
        for chunk in cut_all(stretches, window, settings.dtype, settings.n_jobs):
            if chunk.trials.shape[1:] != (len(settings.channels), window.kept):
                raise ValueError(f"trials of {chunk.trials.shape[1:]}")
            for row, trial in zip(chunk.rows.tolist(), chunk.trials, strict=True):
                file.seek(row * settings.trial_bytes)
                file.write(trial.tobytes())
            evoked, sigma, times = evoked + chunk.evoked, sigma + chunk.sigma, chunk.times
            bar.update(len(chunk.rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return SessionTrials(path, trials.conditions, sigma, evoked / len(trials.onsets), times)


def check_distances(recorded: Recorded, settings: Settings) -> None:
    """Raise DataError for events, of whatever partition, that are too close: see check_apart."""
    least = settings.least_distance(recorded.raw.info["sfreq"])
    check_apart(recorded.table or recorded.path, recorded.trials, least)


def process_session(
    subject: Subject, session: Session, settings: Settings, folder: Path, sessions_left: int
) -> None:
    """Cut all trials of a session into ``folder``; its quality record is written last."""
    records = []
    for take in session.takes:
        recorded = take.open()
        for text in recorded.warnings:
            LOG.warning("%s: %s", recorded.path, text)
        check_distances(recorded, settings)
        signal = prepare(
            recorded,
            settings.channels,
            settings.interpolate_missing,
            settings.reference,
            settings.band_pass,
        )
        if signal.rate_hz < settings.rate:
            LOG.warning(
                "%s: recorded at %g Hz, written at --rate %g: nothing above %g Hz is in it",
                recorded.path,
                signal.rate_hz,
                settings.rate,
                signal.rate_hz / 2,
            )
        for partition in recorded.trials:
            records.append(
                _partition(
                    subject, session, recorded, signal, partition, settings, folder, sessions_left
                )
            )
        del recorded, signal  # of an hour's recording there is room for one
    write_json(folder / f"{session.name}.json", records)


def _partition(
    subject: Subject,
    session: Session,
    recorded: Recorded,
    signal: ChannelReader,
    partition: str,
    settings: Settings,
    folder: Path,
    sessions_left: int,
) -> dict[str, Any]:
    """Cut one partition of a recording; what to know about its quality."""
    trials = recorded.trials[partition]
    window = settings.window(signal.rate_hz, published=recorded.table is None)
    fitting, dropped = whole_trials(recorded, trials, settings, window)
    if not len(fitting.onsets):
        raise DataError(
            recorded.path,
            f"no whole {partition} trial among {len(trials.onsets)}",
            f"{settings.epoch[0]:g} to {settings.epoch[1]:g} s of recording around an event",
            "shorten --epoch, or check the onsets; left out are "
            + ", ".join(f"{number} {why}" for why, number in dropped.items() if number),
        )
    kept = choose(fitting, subject.repetitions.get(partition), settings.seed, recorded.path)
    check_disk(folder, len(kept) * settings.trial_bytes * (sessions_left + len(subject.sessions)))
    part = extract(
        signal,
        fitting.chosen(kept),
        window,
        settings,
        part_path(folder, session, partition),
        settings.whiten and partition == "training",
        f"{subject.name} {session.name} {partition}",
    )
    part.save()
    dropped["surplus"] = len(fitting.onsets) - len(kept)
    if partition == next(iter(recorded.trials)):  # events that are no trials are counted once
        dropped = dict(recorded.dropped) | dropped
    return quality.record(
        session.name, partition, recorded, signal, len(kept), dropped, part.evoked
    )


def whole_trials(
    recorded: Recorded, trials: Trials, settings: Settings, window: Window
) -> tuple[Trials, dict[str, int]]:
    """The trials that lie wholly in one stretch of good recording, and how many do not, by why."""
    first, last = window.offsets
    begin, end = trials.onsets + first, trials.onsets + last
    with explained(recorded.path):
        found = interruptions(recorded.raw, recorded.markers)
    outside = ~window.fits(trials.onsets, recorded.raw.n_times)
    across = found.crossed(begin, end) & ~outside
    marked = found.marked(begin, end) & ~outside & ~across
    if settings.keep_bad_segments:
        marked[:] = False
    dropped = {
        "at the edge": int(outside.sum()),
        "across a gap": int(across.sum()),
        "in marked segments": int(marked.sum()),
    }
    return trials.chosen(~(outside | across | marked)), dropped


def part_path(folder: Path, session: Session, partition: str) -> Path:
    return folder / f"{session.name}_{partition}.trials"


def check_disk(folder: Path, needed: int) -> None:
    """Raise DataError if what is still to be written does not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            folder,
            f"{free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB, for the sessions and the file made of them",
            "make room, name another --output_path, or choose --dtype float32",
        )
