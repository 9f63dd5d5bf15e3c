"""Multivariate noise normalisation (MVNN): channels whitened by the covariance within trials.

Guggenmos, Sterzer & Cichy 2018, doi:10.1016/j.neuroimage.2018.02.044, as THINGS-EEG2 applies it:
per trial the Ledoit-Wolf covariance over time samples, averaged over repetitions, then over
conditions. NumPy and scikit-learn only: worker processes import this.
"""

from __future__ import annotations

import numpy as np


def trial_covariance(trial: np.ndarray) -> np.ndarray:
    """[C, T] -> [C, C]: Ledoit-Wolf covariance over the samples of one trial.

    The channels are standardised before the shrinkage and scaled back after it, so that it does
    not depend on their units. A constant channel counts with variance 1 in the shrinkage.
    """
    from sklearn.covariance import ledoit_wolf
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    sigma, _ = ledoit_wolf(scaler.fit_transform(trial.T))
    return scaler.scale_[:, None] * sigma * scaler.scale_[None, :]


def whitener(sigma: np.ndarray) -> np.ndarray:
    """[C, C] covariance -> symmetric [C, C] ``W = sigma^(-1/2)``; a trial [C, T] becomes W @ trial.

    Raises ValueError for a matrix that is not positive definite.
    """
    values, vectors = np.linalg.eigh(sigma)
    if not values[0] > np.finfo(float).eps * values[-1]:
        raise ValueError(f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}")
    return (vectors / np.sqrt(values)) @ vectors.T


def condition_weights(conditions: np.ndarray) -> np.ndarray:
    """[n] condition of each trial -> [n] weights: mean over repetitions, then over conditions."""
    _, place, counts = np.unique(conditions, return_inverse=True, return_counts=True)
    return 1 / (counts[place] * len(counts))
