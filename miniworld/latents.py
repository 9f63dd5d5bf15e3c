"""Pictures as the miniatures read them: pixels, latents, and weights as they are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As shipped: float16, which halves the files; whole numbers stay."""
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_latents(vae: Any, pictures: np.ndarray) -> torch.Tensor:
    """Posterior means float32 [n, 4, 16, 16] on CPU of uint8 [n, 128, 128, 3]."""
    from rundirs.progress import Progress

    starts = Progress(range(0, len(pictures), 32), desc="latents", unit="batch")
    parts = [
        vae.encode(as_pixels(pictures[i : i + 32]).to(vae.device)).latent_dist.mean.cpu()
        for i in starts
    ]
    return torch.cat(parts)


def set_latent_statistics(vae: Any, pictures: np.ndarray) -> None:
    """Measure what diffusers divides latents by: mean and std of each channel."""
    latents = encode_latents(vae, pictures)
    vae.register_to_config(
        scaling_factor=1.0,
        latents_mean=latents.mean(dim=(0, 2, 3)).tolist(),
        latents_std=latents.std(dim=(0, 2, 3)).tolist(),
    )


def whitened_latents(vae: Any, whole: np.ndarray) -> torch.Tensor:
    """What the U-Net sees of uint8 [n, 128, 128, 3]: float32 [n, 4, 16, 16] on CPU."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (encode_latents(vae, whole) - mean) / std
