"""The picture's side of retrieval: a trainable projection of one of CLIP's layers.

After Shallow Alignment: EEG is nearer to CLIP's middle layers than to its last one, which a linear
map beside the frozen CLIP makes up for. The five embeddings that pictures are drawn from stay the
last layer's, as IP-Adapter needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import util
from unet import mean_and_std


class Projector(nn.Module):
    """Features [N, W] of one layer -> [N, D], which EEG embeddings are compared with.

    ``layer``: the name of the features in a bank. They are standardised per dimension first; mean
    and std [W] of the training rows are buffers.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, layer: str, width: int, embed_dim: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"layer": layer, "width": width, "embed_dim": embed_dim}
        self.layer = layer
        self.linear = nn.Linear(width, embed_dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, features: torch.Tensor) -> None:
        """Mean and std of training features [N, W]; ValueError if they do not vary at all."""
        mean, std = mean_and_std(self.layer, features.float())
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear((features - self.mean) / self.std)


def new_projector(
    layer: str | None, targets: Mapping[str, torch.Tensor], rows: torch.Tensor, seed: int
) -> Projector | None:
    """A fresh projector of ``layer``, seeded, fit on the training ``rows``; None without a layer.

    ``targets`` {name: [N, W]}: the layer's features, and the image embeddings for their width.
    """
    if layer is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(util.seed_for(seed, "projector"))
        made = Projector(layer, targets[layer].shape[1], targets["image"].shape[1])
    made.fit(targets[layer][rows])
    return made
