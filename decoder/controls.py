"""Controls: what is left of a score when the EEG says nothing, and what a perfect decoder gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import metrics
import util
from datafiles.feature_bank import check_clip, open_bank
from datafiles.stimuli import Stimulus
from dataset import TestEEG
from decoder.decoder import Decoder
from modalities import WITHOUT_EEG
from unet import Sampling


def controlled_eeg(test: TestEEG, control: str | None, seed: int) -> TestEEG:
    """``shuffled_eeg``: every stimulus gets the EEG of another one. ``noise_eeg``: none at all.

    The noise is Gaussian with the recording's own mean and standard deviation in each channel.
    """
    if control == "shuffled_eeg":
        order = torch.from_numpy(util.numpy_generator_for(seed, control).permutation(len(test.eeg)))
        eeg = torch.empty_like(test.eeg)
        eeg[order] = test.eeg[order.roll(1)]  # one cycle: nobody keeps their own
        return replace(test, eeg=eeg)
    if control == "noise_eeg":
        noise = torch.randn(test.eeg.shape, generator=util.generator_for(seed, control))
        mean = test.eeg.mean(dim=(0, 2), keepdim=True)
        return replace(test, eeg=mean + noise * test.eeg.std(dim=(0, 2), keepdim=True))
    return test


def shuffled_top_k(
    similarity: torch.Tensor, truth: torch.Tensor, k: int, seed: int, permutations: int
) -> np.ndarray:
    """top-k [permutations] with EEG dealt to other stimuli: rows of similarity [Q, G] permuted."""
    draw = util.numpy_generator_for(seed, "shuffled EEG")
    scores = []
    for _ in range(permutations):
        order = torch.from_numpy(draw.permutation(len(similarity)))
        scores.append(
            float(metrics.top_k_probability(*metrics.ranks(similarity[order], truth), k).mean())
        )
    return np.array(scores)


def banked_embeddings(
    control: str, decoder: Decoder, stimuli: Sequence[Stimulus], features: Path
) -> dict[str, torch.Tensor]:
    """{modality: [n, D]} without EEG, from the bank in ``features``. Raises DataError.

    ``true_embedding``: the stimuli's own, what a perfect decoder would predict.
    ``mean_embedding``: the mean over training stimuli, the best guess without any EEG.
    """
    bank = open_bank(features, "test" if control == "true_embedding" else "training")
    check_clip(bank.clip, bank.path, decoder.clip, "the model")
    if control == "true_embedding":
        return bank.rows_for(stimuli)
    return {name: rows.mean(dim=0).expand(len(stimuli), -1) for name, rows in bank.features.items()}


@dataclass(frozen=True)
class Prediction:
    """How embeddings are predicted of test EEG, or not of it; names as the flags of ``args.py``."""

    prior_steps: int
    prior_guidance: float
    prior_sampler: str
    seed: int
    prior_draws: int = 1
    restore_variance: bool = False
    control: str | None = None
    clip_feature_path: Path | None = None  # for the controls that read a bank

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.prior_steps,
            self.prior_guidance,
            self.prior_sampler,
            self.prior_draws,
            self.restore_variance,
        )


def predict_embeddings(
    decoder: Decoder, test: TestEEG, rows: Sequence[int], how: Prediction
) -> dict[str, torch.Tensor]:
    """``Decoder.predict``, or what a control puts in its place."""
    if how.control in WITHOUT_EEG:
        if test.stimuli is None:
            raise util.UserError(
                f"--control {how.control}",
                "no stimuli beside the EEG",
                "test_images/",
                "give --data_path",
            )
        assert how.clip_feature_path is not None  # such a control is refused with the flags
        stimuli = [test.stimuli[row] for row in rows]
        return banked_embeddings(how.control, decoder, stimuli, how.clip_feature_path)
    read = controlled_eeg(test, how.control, how.seed)
    return decoder.predict(read, rows, how.sampling, how.seed)
