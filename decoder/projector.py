"""The picture's side of retrieval: trainable projections of CLIP's layers, one or a mixture.

After Shallow Alignment: EEG is nearer to CLIP's middle layers than to its last one, which a linear
map beside the frozen CLIP makes up for; how near to which differs from person to person (SAMGA).
The five embeddings that pictures are drawn from stay the last layer's, as IP-Adapter needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self.layer, self.layers = layer, (layer,)
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

    def seen_by(self, features: Mapping[str, torch.Tensor], subject: torch.Tensor) -> torch.Tensor:
        """Pictures' features {layer: [N, W]} as the people [N] who saw them have them: [N, D]."""
        return self(features[self.layer])

    def add_subjects(self, count: int) -> None:
        """Nothing here is a person's own."""

    def subject_parameters(self) -> list[nn.Parameter]:
        return []


class LayerMixture(nn.Module):
    """Several projected layers, added with each person's own weights, which sum to 1.

    ``widths`` {name of the features in a bank: W}. The weights are the softmax of ``logits`` [S, L]
    and begin equal; somebody unknown (-1) has the mean of everybody's. With all of the weight on
    one layer it is that layer's :class:`Projector`, to the bit.
    """

    def __init__(self, widths: Mapping[str, int], embed_dim: int, n_subjects: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "widths": dict(widths), "embed_dim": embed_dim, "n_subjects": n_subjects,
        }  # fmt: skip
        self.layers = tuple(widths)
        self.projectors = nn.ModuleList(
            Projector(layer, width, embed_dim) for layer, width in widths.items()
        )
        self.logits = nn.Parameter(torch.zeros(n_subjects, len(widths)))

    def weights(self) -> torch.Tensor:
        """[S + 1, L] by person; the last row is that of somebody unknown, as -1 counts."""
        own = self.logits.softmax(dim=1)
        return torch.cat([own, own.mean(dim=0, keepdim=True)])

    def seen_by(self, features: Mapping[str, torch.Tensor], subject: torch.Tensor) -> torch.Tensor:
        """Pictures' features {layer: [N, W]} as the people [N] who saw them have them: [N, D]."""
        weights = self.weights()[subject]
        parts = zip(self.layers, self.projectors, weights.T[:, :, None], strict=True)
        mixed = [weight * projector(features[layer]) for layer, projector, weight in parts]
        return torch.stack(mixed).sum(dim=0)

    @torch.no_grad()
    def add_subjects(self, count: int) -> None:
        """Further people, who begin with the weights of somebody unknown."""
        unknown = self.weights()[-1:].log().expand(count, -1)
        self.logits = nn.Parameter(torch.cat([self.logits, unknown]))
        self.config["n_subjects"] += count

    def subject_parameters(self) -> list[nn.Parameter]:
        return [self.logits]


def projector_from(config: Mapping[str, Any]) -> Projector | LayerMixture:
    """An empty one of the kind that a checkpoint's header describes."""
    return LayerMixture(**config) if "widths" in config else Projector(**config)


def new_projector(
    layers: Sequence[str],
    targets: Mapping[str, torch.Tensor],
    rows: torch.Tensor,
    n_subjects: int,
    seed: int,
) -> Projector | LayerMixture | None:
    """A fresh projector of ``layers``, seeded, fit on the training ``rows``; None without layers.

    ``targets`` {name: [N, W]}: the layers' features, and the image embeddings for their width. In a
    mixture each layer begins as it would alone.
    """
    embed_dim = targets["image"].shape[1]
    alone = []
    for layer in layers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(util.seed_for(seed, "projector"))
            alone.append(Projector(layer, targets[layer].shape[1], embed_dim))
        alone[-1].fit(targets[layer][rows])
    if len(alone) < 2:
        return alone[0] if alone else None
    mixture = LayerMixture({one.layer: one.config["width"] for one in alone}, embed_dim, n_subjects)
    for made, one in zip(mixture.projectors, alone, strict=True):
        made.load_state_dict(one.state_dict())
    return mixture
