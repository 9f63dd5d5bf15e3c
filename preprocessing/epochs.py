"""Trials cut out of a continuous recording: baseline, resampling, covariance; a chunk at a time.

An hour at 1 kHz has 16,540 overlapping trials in THINGS-EEG2: 10 GB if all were cut at once.
NumPy, MNE and scikit-learn only: worker processes import this, and torch would cost them seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocessing import whitening

if TYPE_CHECKING:
    import mne

CHUNK = 256  # trials: 155 MB of 63 channels x 1201 samples while they are cut


@dataclass(frozen=True)
class Window:
    """Seconds around the onset, the rate of the recording and the rate that is written.

    ``published``: resample as THINGS-EEG2's own code does, whose padding moves samples against
    ``times`` (by 1 ms from 1000 to 250 Hz); else samples are where ``times`` says.
    """

    start_s: float
    end_s: float
    raw_hz: float
    out_hz: float
    published: bool = False

    @property
    def offsets(self) -> tuple[int, int]:
        """First and last sample of a trial relative to its onset, as MNE rounds them.

        Where the rate that is written is the higher one, the last sample to write may lie later.
        """
        needed = math.ceil(round((self.kept - 1) * self.raw_hz / self.out_hz, 6))
        return round(self.start_s * self.raw_hz), max(round(self.end_s * self.raw_hz), needed)

    @property
    def raw_samples(self) -> int:
        return self.offsets[1] - self.offsets[0] + 1

    @property
    def kept(self) -> int:
        """Samples after the onset: its own is the first, the one at ``end_s`` is left out."""
        return round(self.end_s * self.out_hz)

    @property
    def before(self) -> int:
        """Samples of the baseline at the rate that is written."""
        return math.floor(round(-self.offsets[0] * self.out_hz / self.raw_hz, 6))

    def fits(self, onsets: np.ndarray, samples: int) -> np.ndarray:
        """Whether each trial lies wholly inside a recording of that many samples: bool [n]."""
        first, last = self.offsets
        return (onsets + first >= 0) & (onsets + last < samples)


@dataclass(frozen=True)
class Chunk:
    """What becomes of a run of trials.

    ``trials`` [n, C, T] from the onset on; ``evoked`` [C, T + baseline], summed over them;
    ``sigma`` [C, C], the weighted sum of their covariances; ``times`` in s, with the baseline.
    """

    rows: np.ndarray
    trials: np.ndarray
    evoked: np.ndarray
    sigma: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Stretch:
    """A stretch of recording [C, S] in volts and the trials in it.

    ``onsets`` [n], samples from its beginning; ``rows`` [n], where each is written; ``weights``
    [n] of their covariances, or None where none are needed.
    """

    signal: np.ndarray
    onsets: np.ndarray
    rows: np.ndarray
    weights: np.ndarray | None


def cut_trials(piece: Stretch, window: Window, dtype: str) -> Chunk:
    """Cut, subtract the baseline and resample the trials of one piece."""
    data, times = resampled(_epochs(piece, window), window)
    onset = int(np.abs(times).argmin())
    trials = data[:, :, onset : onset + window.kept]
    sigma = np.zeros((trials.shape[1],) * 2)
    if piece.weights is not None:
        for weight, trial in zip(piece.weights, trials, strict=True):
            sigma += weight * whitening.trial_covariance(trial)
    shown = times[: onset + window.kept]
    evoked = data[:, :, : len(shown)].sum(axis=0)
    return Chunk(piece.rows, trials.astype(dtype), evoked, sigma, shown)


def _epochs(piece: Stretch, window: Window) -> mne.Epochs:
    import mne

    info = mne.create_info(len(piece.signal), window.raw_hz, "eeg")
    raw = mne.io.RawArray(piece.signal, info, verbose="error")
    events = np.column_stack([piece.onsets, np.zeros_like(piece.onsets), np.ones_like(piece.rows)])
    epochs = mne.Epochs(
        raw,
        events.astype(int),
        tmin=window.offsets[0] / window.raw_hz,
        tmax=window.offsets[1] / window.raw_hz,
        baseline=(None, 0),
        preload=True,
        verbose="error",
    )
    if len(epochs) != len(piece.onsets):
        raise ValueError(f"{len(epochs)} of {len(piece.onsets)} trials lie inside the recording")
    return epochs


def resampled(epochs: mne.Epochs, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(trials [n, C, B + T], times [B + T] in s) at the rate that is written."""
    if window.published:
        epochs.resample(window.out_hz, verbose="error")
    if window.published or window.out_hz == window.raw_hz:
        return epochs.get_data(copy=False), np.asarray(epochs.times)
    data = epochs.get_data(copy=False)
    grid = common_grid(window)
    begin = grid.onset - window.before
    trials = np.empty((*data.shape[:2], window.before + window.kept))
    for row, trial in enumerate(data):  # one at a time: padded, it is three times as long
        trials[row] = grid.resample(trial)[:, begin : begin + trials.shape[2]]
    return trials, np.arange(-window.before, window.kept) / window.out_hz


@dataclass(frozen=True)
class Grid:
    """How a trial is padded, so that both rates have a sample at its onset and one at its end.

    ``left`` and ``right``: samples added; ``length``: samples after resampling; ``onset``: of it.
    """

    left: int
    right: int
    length: int
    onset: int

    def resample(self, trial: np.ndarray) -> np.ndarray:
        """[C, S] -> [C, length], by the Fourier transform; the edges' values are repeated."""
        from scipy.signal import resample

        padded = np.pad(trial, ((0, 0), (self.left, self.right)), mode="edge")
        return resample(padded, self.length, axis=1)


def common_grid(window: Window) -> Grid:
    """The padding, of half a trial to a trial and a half, under which both rates agree best.

    For rates that are whole numbers it is exact; for 256.016 Hz the best is good to microseconds.
    """
    ratio, size = window.out_hz / window.raw_hz, window.raw_samples
    choices = np.arange(size // 2, size // 2 + max(size, round(window.raw_hz)))
    left = int(choices[_miss((choices - window.offsets[0]) * ratio).argmin()])
    right = int(choices[_miss((left + size + choices) * ratio).argmin()])
    return Grid(
        left, right, round((left + size + right) * ratio), round((left - window.offsets[0]) * ratio)
    )


def _miss(samples: np.ndarray) -> np.ndarray:
    """Distance from whole samples, below a millionth counted as none."""
    return np.round(np.abs(samples - np.round(samples)), 6)


def cut_all(pieces: Iterator[Stretch], window: Window, dtype: str, n_jobs: int) -> Iterator[Chunk]:
    """The chunks of all pieces in order, made by ``n_jobs`` processes, few of them at a time."""
    from joblib import Parallel, delayed, parallel_config

    # a process each: threads inside them would only be in each other's way
    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(n_jobs=n_jobs, return_as="generator", pre_dispatch=n_jobs)
    yield from pool(delayed(cut_trials)(piece, window, dtype) for piece in pieces)
