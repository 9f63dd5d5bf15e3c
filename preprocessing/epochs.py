"""Trials cut out of a continuous recording: baseline, resampling, covariance; a chunk at a time.

An hour at 1 kHz has 16,540 overlapping trials in THINGS-EEG2: 10 GB if all were cut at once.
NumPy, MNE and scikit-learn only: worker processes import this, and torch would cost them seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from preprocessing import whitening

CHUNK = 256  # trials: 155 MB of 63 channels x 1201 samples while they are cut


@dataclass(frozen=True)
class Window:
    """Seconds around the onset, the rate of the recording and the rate that is written."""

    start_s: float
    end_s: float
    raw_hz: float
    out_hz: float

    @property
    def offsets(self) -> tuple[int, int]:
        """First and last sample of a trial relative to its onset, as MNE rounds them.

        Where the two rates round to one sample less than is kept, some more are read.
        """
        first, last = round(self.start_s * self.raw_hz), round(self.end_s * self.raw_hz)
        while self._resampled(first, last) < self.kept:
            last += 1
        return first, last

    def _resampled(self, first: int, last: int) -> int:
        """Samples from the onset on, of those from ``first`` to ``last`` at the rate written."""
        length = round((last - first + 1) * self.out_hz / self.raw_hz)
        times = first / self.raw_hz + np.arange(length) / self.out_hz
        return length - int(np.abs(times).argmin())

    @property
    def raw_samples(self) -> int:
        return self.offsets[1] - self.offsets[0] + 1

    @property
    def kept(self) -> int:
        """Samples after the onset: its own is the first, the one at ``end_s`` is left out."""
        return round(self.end_s * self.out_hz)

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
    epochs = _epochs(piece, window)
    data, times = epochs.get_data(copy=False), np.asarray(epochs.times)
    onset = int(np.abs(times).argmin())
    trials = data[:, :, onset : onset + window.kept]
    sigma = np.zeros((trials.shape[1],) * 2)
    if piece.weights is not None:
        for weight, trial in zip(piece.weights, trials, strict=True):
            sigma += weight * whitening.trial_covariance(trial)
    shown = times[: onset + window.kept]
    evoked = data[:, :, : len(shown)].sum(axis=0)
    return Chunk(piece.rows, trials.astype(dtype), evoked, sigma, shown)


def _epochs(piece: Stretch, window: Window) -> object:
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
    if window.out_hz != window.raw_hz:
        epochs.resample(window.out_hz, verbose="error")
    return epochs


def cut_all(pieces: Iterator[Stretch], window: Window, dtype: str, n_jobs: int) -> Iterator[Chunk]:
    """The chunks of all pieces in order, made by ``n_jobs`` processes, few of them at a time."""
    from joblib import Parallel, delayed, parallel_config

    # a process each: threads inside them would only be in each other's way
    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(n_jobs=n_jobs, return_as="generator", pre_dispatch=n_jobs)
    yield from pool(delayed(cut_trials)(piece, window, dtype) for piece in pieces)
