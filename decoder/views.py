"""Test-time augmentation: the embedding of EEG as the mean over shifted, thinned views of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import util

SHIFT_S = 0.02  # at most, to either side
DROPPED = 0.1  # share of the channels that a view sees nothing of


def shifted(eeg: torch.Tensor, samples: int) -> torch.Tensor:
    """EEG [..., T] later by ``samples``; the first or last one stands in where there is none."""
    times = torch.arange(eeg.shape[-1], device=eeg.device) - samples
    return eeg[..., times.clamp(0, eeg.shape[-1] - 1)]


def views_of(eeg: torch.Tensor, number: int, rate_hz: float) -> Iterator[torch.Tensor]:
    """EEG [N, C, T] as it is, then ``number - 1`` views that are shifted and lack some channels.

    What a view changes depends on its number alone: it is the same for all rows, so that none
    depends on its neighbours.
    """
    yield eeg
    most = max(1, round(SHIFT_S * rate_hz))
    for view in range(1, number):
        draw = util.generator_for(0, "test view", view)
        samples = int(torch.randint(-most, most + 1, (1,), generator=draw))
        kept = torch.rand(eeg.shape[1], generator=draw) >= DROPPED
        yield shifted(eeg, samples) * kept.to(eeg)[:, None]
