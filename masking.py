"""EEG masks for training: whole channels, time spans and channel x time patches set to zero.

Off by default. Published THINGS-EEG2 data are whitened with zero mean, so zero is "no signal".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Masking:
    """Stated probabilities, each per sample and element.

    ``channel``: a channel is masked; ``time``: a span of ``span`` samples is masked for all
    channels; ``patch``: a ``span``-long piece of one channel is masked. Raises ValueError outside
    0..1.
    """

    channel: float = 0.0
    time: float = 0.0
    patch: float = 0.0
    span: int = 25

    def __post_init__(self) -> None:
        for name in ("channel", "time", "patch"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"masking: {name} = {getattr(self, name)}, expected a probability in 0..1"
                )
        if self.span < 1:
            raise ValueError(f"masking: span = {self.span} samples, expected >= 1")

    @property
    def active(self) -> bool:
        return max(self.channel, self.time, self.patch) > 0


def keep_mask(
    shape: tuple[int, int, int], masking: Masking, generator: torch.Generator
) -> torch.Tensor:
    """Which values stay: bool [B, C, T], drawn on the CPU. Spans and patches tile the time axis."""
    batch, channels, times = shape
    tiles = -(-times // masking.span)
    keep_channel = torch.rand(batch, channels, 1, generator=generator) >= masking.channel
    keep_tile = torch.rand(batch, 1, tiles, generator=generator) >= masking.time
    keep_patch = torch.rand(batch, channels, tiles, generator=generator) >= masking.patch
    keep_time = (keep_tile & keep_patch).repeat_interleave(masking.span, dim=2)[..., :times]
    return keep_channel & keep_time


def mask_eeg(eeg: torch.Tensor, masking: Masking, generator: torch.Generator) -> torch.Tensor:
    """A masked copy of ``eeg`` [B, C, T], which stays as it is; without masking, ``eeg`` itself."""
    if eeg.ndim != 3:
        raise ValueError(f"eeg has shape {tuple(eeg.shape)}, expected [B, C, T]")
    if not masking.active:
        return eeg
    keep = keep_mask((eeg.shape[0], eeg.shape[1], eeg.shape[2]), masking, generator)
    return eeg * keep.to(device=eeg.device, dtype=eeg.dtype)
