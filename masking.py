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
    channels; ``patch``: a ``span``-long piece of one channel is masked; ``subject``: whose EEG it
    is stays unknown. Raises ValueError outside 0..1.
    """

    channel: float = 0.0
    time: float = 0.0
    patch: float = 0.0
    span: int = 25
    subject: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channel", "time", "patch", "subject"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"masking: {name} = {getattr(self, name)}, expected a probability in 0..1"
                )
        if self.span < 1:
            raise ValueError(f"masking: span = {self.span} samples, expected >= 1")

    @property
    def active(self) -> bool:
        """Whether any EEG is masked."""
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


def mask_eeg(
    eeg: torch.Tensor, masking: Masking, generator: torch.Generator, index: int = 0, count: int = 1
) -> torch.Tensor:
    """A masked copy of ``eeg`` [B, C, T], which stays as it is; without masking, ``eeg`` itself.

    ``eeg`` is the ``index``-th of ``count`` parts of a batch, for all of which is drawn.
    """
    if eeg.ndim != 3:
        raise ValueError(f"eeg has shape {tuple(eeg.shape)}, expected [B, C, T]")
    if not masking.active:
        return eeg
    rows, channels, times = eeg.shape
    keep = keep_mask((count * rows, channels, times), masking, generator)
    keep = keep[index * rows : (index + 1) * rows]
    return eeg * keep.to(device=eeg.device, dtype=eeg.dtype)


def mask_subject(
    subject: torch.Tensor,
    probability: float,
    generator: torch.Generator,
    index: int = 0,
    count: int = 1,
) -> torch.Tensor:
    """Subject ids [B], some of them -1 = unknown; parts as in :func:`mask_eeg`.

    So the token for people the model has not seen is trained, too.
    """
    if probability == 0:
        return subject
    rows = len(subject)
    unknown = torch.rand(count * rows, generator=generator) < probability
    return subject.masked_fill(unknown[index * rows : (index + 1) * rows].to(subject.device), -1)
