"""Repetitions by their noise: artefacts count little, equal trials alike, nothing is invented."""

from __future__ import annotations

import builders
import numpy as np
import pytest
import torch

import dataset
from datafiles.alignment import Reading
from datafiles.averaging import MEAN, WEIGHTED, trial_weights
from datafiles.eeg_files import eeg_file


def trials(noise: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Response [C, T], and trials [R, C, T] of it with noise of these deviations."""
    draw = np.random.default_rng(seed)
    response = draw.normal(size=(17, 150))
    own = np.array(noise)[:, None, None] * draw.normal(size=(len(noise), 17, 150))
    return response, response + own


def test_as_the_definition_has_it():
    _, found = trials([1, 2, 1, 4])
    noise = [np.mean((found[n] - np.delete(found, n, axis=0).mean(axis=0)) ** 2) for n in range(4)]
    expected = (1 / np.array(noise)) / (1 / np.array(noise)).sum()
    assert np.allclose(trial_weights(found), expected)


def test_an_artefact_counts_little_and_the_mean_gets_better():
    response, found = trials([1.0] * 19 + [30.0])
    weights = trial_weights(found)
    assert weights[-1] < 0.01 and weights.sum() == pytest.approx(1)
    errors = [np.square(mean - response).mean()
              for mean in (np.tensordot(weights, found, 1), found.mean(0))]  # fmt: skip
    assert errors[0] < 0.1 * errors[1]


def test_alike_trials_count_about_alike():
    weights = trial_weights(trials([1.0] * 80)[1])
    assert np.abs(80 * weights - 1).max() < 0.1


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_trials_none_is_the_noisier(count):
    assert np.allclose(trial_weights(trials([1.0, 9.0][:count])[1]), 1 / count)


def test_equal_trials_and_silence_are_no_division_by_zero():
    for found in (np.ones((4, 3, 5)), np.zeros((4, 3, 5))):
        assert np.allclose(trial_weights(found), 0.25)


def test_test_eeg_is_joined_so(tmp_path):
    root = builders.write_world(tmp_path / "DATA")
    file = eeg_file(root, "sub-01", "test")
    _, found = trials([1, 1, 1, 20])
    eeg = np.stack([found[:, :5, :20] + row for row in range(3)])
    builders.write_published(file, builders.published(0, 3) | {"preprocessed_eeg_data": eeg})
    channels = list(builders.CHANNELS)
    reading = Reading(channels, np.arange(20) / builders.RATE_HZ)
    for how in (MEAN, WEIGHTED):
        test = dataset.open_test(file, "sub-01", root, tmp_path, reading, how)
        for row in range(3):
            own = eeg[row].astype(np.float32)
            weights = np.full(4, 0.25) if how == MEAN else trial_weights(own)
            expected = torch.from_numpy(np.tensordot(weights, own, 1)).float()
            torch.testing.assert_close(test.eeg[row], expected, rtol=1e-4, atol=1e-5)
