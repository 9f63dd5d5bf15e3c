"""A way around an aligner for what the encoder's output knows already."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

HORIZON_ROWS = 5000.0  # of training, over which a gain is fitted: the encoder changes meanwhile


class EncoderSkip(nn.Module):
    """A gain for each modality times the encoder's output: conditions [B, D] -> [M, B, D].

    The contrast draws that output near the image embedding, so that an aligner need not learn the
    identity from the data; it adds what is to be changed of it. A gain is the least-squares one of
    the standardised targets seen in training, not a parameter: it is right from the first steps.
    """

    shared: torch.Tensor  # [M]: sum of products with the targets
    power: torch.Tensor  # []: sum of squares

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.register_buffer("shared", torch.zeros(modalities))
        self.register_buffer("power", torch.zeros(()))

    @property
    def gain(self) -> torch.Tensor:
        """[M]; 0 before anything is fitted."""
        return self.shared / self.power.clamp(min=1e-12)

    @torch.no_grad()
    def fit(self, cond: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in a batch, of all processes: conditions [B, D] and targets [M, B, D]."""
        wide = cond.to(self.shared.dtype)
        products = (wide * targets.to(wide)).sum(dim=(1, 2))
        sums = torch.cat([products, wide.square().sum()[None]])
        rows = len(cond)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            rows *= dist.get_world_size()
        kept = math.exp(-rows / HORIZON_ROWS)
        self.shared.mul_(kept).add_(sums[:-1])
        self.power.mul_(kept).add_(sums[-1])

    def forward(self, cond: torch.Tensor) -> torch.Tensor:
        return self.gain.to(cond)[:, None, None] * cond


def add_skip(
    output: torch.Tensor,
    estimate: torch.Tensor,
    shares: tuple[torch.Tensor, torch.Tensor],
    predicts: str,
) -> torch.Tensor:
    """A prior's output [M, B, D] with the encoder's ``estimate`` [M, B, D] of the embedding in it.

    ``shares``: sqrt(a_t) and sqrt(1 - a_t). For an embedding of unit variance about the estimate g,
    given x_t alone, it is sqrt(a_t) x_t + (1 - a_t) g: of its velocity, -sqrt(1 - a_t) g is what g
    adds, and as much of the other quantities. All of it counts at pure noise, nothing at none.
    """
    kept, lost = shares
    factor = {"velocity": -lost, "embedding": lost * lost, "noise": -kept * lost}[predicts]
    return output + factor * estimate
