"""Blurred versions of the pictures as targets of the contrast, one of them by lot each time.

EEG holds little fine detail: UBP blurs what it is contrasted with, NeuroBridge takes several views.
The pictures' own embeddings stay what the aligner learns and what retrieval ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

import util
from datafiles.feature_bank import BLURRED, FINAL_LAYER

DRAWN_IMAGE = "image_drawn"  # in a batch: the image target or a blurred version of it, by lot


def blurs_of(targets: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the image targets that EEG is contrasted with by lot, the bank's own first."""
    return [FINAL_LAYER, *(name for name in targets if name.startswith(BLURRED))]


def lots_of(blurs: int, samples: int, seed: int, epoch: int) -> torch.Tensor | None:
    """int64 [samples]: which of the blurs each sample has in an epoch; None where there is one."""
    if blurs < 2:
        return None
    draw = util.generator_for(seed, "blurs", epoch)
    return torch.randint(blurs, (samples,), generator=draw)


def drawn_targets(
    targets: Mapping[str, torch.Tensor], row: torch.Tensor, lots: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Targets {name: [B, W]} of rows [B]; the blur that each row has under DRAWN_IMAGE."""
    if lots is None:
        return {name: rows[row] for name, rows in targets.items()}
    blurs = blurs_of(targets)
    versions = torch.stack([targets[name][row] for name in blurs])
    wanted = {name: rows[row] for name, rows in targets.items() if name not in blurs[1:]}
    return wanted | {DRAWN_IMAGE: versions[lots, torch.arange(len(row))]}
