"""Timesteps of a diffusion as vectors: sinusoids, and the small network on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def timestep_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of integer timesteps t [...] -> float32 [..., width]: cosines, then sines."""
    half = width // 2
    frequency = torch.exp(
        torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(1e4) / half)
    )
    angle = t[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def distinct_timesteps(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps t [..., B] -> (each row's different ones [..., K], the place of each t [..., B]).

    Rows with fewer than K repeat step 0. Places count through all rows' K one after another.
    """
    found = [row.unique(return_inverse=True) for row in t.reshape(-1, t.shape[-1])]
    most = max(len(values) for values, _ in found)
    distinct = torch.stack([F.pad(values, (0, most - len(values))) for values, _ in found])
    place = torch.stack([number * most + inverse for number, (_, inverse) in enumerate(found)])
    return distinct.reshape(*t.shape[:-1], most), place.reshape(t.shape)


class TimeEmbedding(nn.Module):
    """Timestep features [B, width_in] -> [B, width]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))
