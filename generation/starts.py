"""The coarse pictures that drawing may begin from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataset import TestEEG
from decoder import controls, low_level
from decoder.decoder import Decoder
from generation.sheets import marked, save_picture
from modalities import MARKS
from sdxl import sampler


def coarse_starts(
    decoder: Decoder,
    head: low_level.LowLevelHead,
    test: TestEEG,
    rows: Sequence[int],
    how: controls.Prediction,
) -> torch.Tensor:
    """Coarse pictures [n, 3, GRID, GRID] to start from, or what a control puts in their place."""
    if how.control == "true_embedding":
        return low_level.coarse_pictures([test.stimuli[row] for row in rows])
    if how.control == "mean_embedding":
        return head.mean_picture().expand(len(rows), -1, -1, -1)
    read = controls.controlled_eeg(test, how.control, how.seed)
    return head.predict(low_level.test_features(decoder, read, rows), test.subject)


def encode_starts(
    pipe: Any,
    coarse: torch.Tensor,
    size_px: int,
    out: Path,
    test: TestEEG,
    rows: Sequence[int],
    marks: Sequence[str],
) -> torch.Tensor:
    """Latents [n, 4, h, w] of coarse pictures, which are saved as ``start.png``, too."""
    note = "; ".join(MARKS[mark] for mark in marks) or "predicted from EEG"
    latents = []
    for row, small in zip(rows, coarse, strict=True):
        large = low_level.enlarged(small[None], size_px)
        pixels = (large[0] * 255).round().byte().permute(1, 2, 0).numpy()
        save_picture(out / test.names[row] / marked("start", marks), pixels, note)
        latents.append(sampler.picture_latents(pipe, large))
    return torch.cat(latents)
