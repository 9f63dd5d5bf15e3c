"""What the miniature CLIP minimises."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grouped_contrast(
    first: torch.Tensor, second: torch.Tensor, group: int, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss. ``first`` [group * c, D]: ``group`` rows each for the first c of ``second``.

    ``second`` [>= c, D]: what follows the first c is wrong for every row.
    """
    logits = scale * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    mine = torch.arange(len(first)) // group
    back = logits.T.log_softmax(dim=1)[mine, torch.arange(len(first))].mean()
    return (F.cross_entropy(logits, mine) - back) / 2


def spread_penalties(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Penalties [] of rows [n, D]: columns off mean 0 and variance 1, and correlated columns.

    Without the second (VICReg's, arXiv:2105.04906) colours take most of it and shapes drown.
    """
    centred = rows - rows.mean(dim=0)
    covariance = centred.T @ centred / (len(rows) - 1)
    columns = covariance.diagonal()
    off = covariance.square().sum() - columns.square().sum()
    moments = (
        rows.mean(dim=0).square().mean() + (columns.clamp(min=1e-6).sqrt() - 1).square().mean()
    )
    return {"moments": moments, "overlap": off / rows.shape[1]}
