"""Repetitions of a stimulus joined to one trial: their mean, or by how noisy each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from datafiles.eeg_files import Recording, Signal, average_trials

MEAN, WEIGHTED = "mean", "weighted"
LEAST_NOISE = 1e-12  # of the mean noise: a trial that equals the others' mean


def trial_weights(trials: np.ndarray) -> np.ndarray:
    """[R] of trials [R, C, T], sum 1: the inverse of each one's noise variance.

    The noise of a trial is what is left of it beside the mean of the other trials, as in weighted
    averaging of evoked potentials (Davila & Mobin 1992, doi:10.1109/10.141198). Equal for fewer
    than three trials, of which none can be told to be the noisier.
    """
    count = len(trials)
    if count < 3:
        return np.full(count, 1 / max(count, 1))
    others = (trials.sum(axis=0) - trials) / (count - 1)
    noise = np.square(trials - others).mean(axis=(1, 2))
    weights = 1 / np.maximum(noise, LEAST_NOISE * noise.mean() or 1.0)
    return weights / weights.sum()


def join_repetitions(recording: Recording, signal: Signal, how: str) -> torch.Tensor:
    """Each stimulus' repetitions as one trial: float32 [N, C, T]. ``how``: MEAN or WEIGHTED."""
    if how == MEAN:
        return average_trials(recording, signal)
    rows = []
    for row in range(len(recording.eeg)):
        trials = signal.cut(recording.trials(row)).astype(np.float64)
        rows.append(np.tensordot(trial_weights(trials), trials, axes=1))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


@dataclass(frozen=True)
class SingleTrials:
    """The single trials of a recording, cut to a model's signal, read as they are wanted."""

    recording: Recording
    signal: Signal

    @property
    def repetitions(self) -> int:
        """That every stimulus has."""
        return int(self.recording.trial_counts.min())

    def dealt(self, draw: np.random.Generator) -> np.ndarray:
        """int [N, repetitions]: that many of each stimulus' trials, in random order."""
        counts = self.recording.trial_counts
        whole = np.tile(np.arange(counts.max()), (len(counts), 1))
        order = draw.permuted(whole, axis=1)
        # a stimulus' missing trials go to the end, the others keep their order
        late = np.argsort(order >= counts[:, None], axis=1, kind="stable")
        return np.take_along_axis(order, late, axis=1)[:, : self.repetitions]

    def mean(self, chosen: np.ndarray) -> torch.Tensor:
        """Mean over the repetitions ``chosen`` [N, n] of each stimulus: float32 [N, C, T]."""
        rows = [
            self.signal.cut(self.recording.eeg[row][repetitions]).mean(axis=0)
            for row, repetitions in enumerate(chosen)
        ]
        return torch.from_numpy(np.stack(rows).astype(np.float32, copy=False))
