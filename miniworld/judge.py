"""An independent judge: what a small CNN, trained on rendered pictures only, sees in a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from miniworld import pictures
from rundirs.tensors import load_tensors

INPUT_PX = 64


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """[B, 3, 64, 64] in -1..1 -> {attribute: logits [B, values]}."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        self.body = nn.Sequential(
            *(_conv_block(a, b) for a, b in itertools.pairwise(widths)),
            nn.Flatten(),  # 4 x 4 places
            nn.Linear(widths[-1] * 16, 192),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(192, len(values)) for name, values in pictures.ATTRIBUTES.items()}
        )

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def labels(concepts: Sequence[pictures.Concept]) -> dict[str, torch.Tensor]:
    """{attribute: int64 [n]}."""
    return {
        name: torch.tensor([values.index(getattr(concept, name)) for concept in concepts])
        for name, values in pictures.ATTRIBUTES.items()
    }


def load(path: Path) -> Judge:
    model = Judge()
    tensors, _ = load_tensors(path)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


@torch.no_grad()
def verdicts(
    model: Judge, images: np.ndarray, concepts: Sequence[pictures.Concept]
) -> dict[str, np.ndarray]:
    """{attribute: whether seen right, bool [n]} of uint8 [n, H, W, 3], H and W multiples of 64."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = nn.functional.interpolate(pixels, size=(INPUT_PX, INPUT_PX), mode="area")
    truth = labels(concepts)
    return {
        name: (logits.argmax(dim=1) == truth[name]).numpy() for name, logits in model(small).items()
    }
