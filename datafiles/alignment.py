"""Euclidean alignment: every person's EEG whitened by its own mean covariance, without labels.

He & Wu 2020, doi:10.1109/TBME.2019.2913914.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from datafiles.eeg_files import Recording, Signal, check_scale, match_signal

LOOKED_AT = 1024  # pictures whose trials are looked at, evenly along the recording
LEAST_SHARE = 1e-6  # of the mean variance: a direction that holds none, as after average reference


def mean_covariance(recording: Recording, signal: Signal, rows: Sequence[int]) -> np.ndarray:
    """[C, C]: mean of X X^T / T over the single trials X [C, T] of some pictures."""
    chosen = np.asarray(rows)[np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int)]
    total, trials = np.zeros((len(signal.channels),) * 2), 0
    for row in chosen.tolist():
        own = signal.cut(recording.trials(row)).astype(np.float64)
        total += np.einsum("rct,rdt->cd", own, own) / own.shape[-1]
        trials += len(own)
    return total / max(trials, 1)


def inverse_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric C^(-1/2), float32 [C, C]; directions without variance stay near zero."""
    floor = LEAST_SHARE * np.trace(covariance) / len(covariance)
    values, vectors = np.linalg.eigh(covariance + floor * np.eye(len(covariance)))
    return ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32)


def euclidean(recording: Recording, signal: Signal, rows: Sequence[int]) -> np.ndarray:
    """The matrix that makes the mean covariance of a person's trials the identity: [C, C]."""
    return inverse_root(mean_covariance(recording, signal, rows))


@dataclass(frozen=True)
class Reading:
    """How a model reads one person's recording: by name and second, on the training's scale.

    ``aligned``: whether it was trained on aligned EEG; ``spatial``: the person's own matrix [C, C],
    if the person is one of the training's.
    """

    channels: Sequence[str]
    times: Sequence[float]
    scale: float = 1.0
    aligned: bool = False
    spatial: np.ndarray | None = None

    @property
    def transductive(self) -> bool:
        """Whether the recording that is read says how it is aligned."""
        return self.aligned and self.spatial is None

    def signal(self, recording: Recording) -> Signal:
        """Raises DataError for a recording of other channels, times or units."""
        found = replace(match_signal(recording, self.channels, self.times), scale=self.scale)
        check_scale(recording, found)
        if not self.aligned:
            return found
        rows = range(len(recording.eeg))
        own = euclidean(recording, found, rows) if self.spatial is None else self.spatial
        return replace(found, spatial=own)
