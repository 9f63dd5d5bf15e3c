"""How good the miniatures are, on pictures they were not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from miniworld import judge, pictures, renders


@torch.no_grad()
def clip_retrieval(clip: Clip, split: str, n: int) -> dict[str, float]:
    """Top-1 of picture -> caption and superpixels -> caption among n unseen concepts."""
    scenes = renders.unseen_scenes(split, n, seed=0)
    gallery = F.normalize(clip.encode_texts([pictures.caption(scene) for scene in scenes]), dim=1)
    found = {}
    views = embeddings(clip, scenes)
    for name, rows in views.items():
        best = (F.normalize(rows, dim=1) @ gallery.T).argmax(dim=1)
        found[f"clip_{name}"] = float((best == torch.arange(n)).float().mean())
    return found | {"n": n}


def vae_psnr(vae: Any, split: str, n: int) -> dict[str, float]:
    """Mean PSNR in dB of n unseen pictures of 128 px, from the posterior's mean."""
    scenes = renders.unseen_scenes(split, n, seed=0)
    found = []
    for scene in scenes:
        picture = torch.from_numpy(pictures.render(scene, renders.SIZE_PX)).permute(2, 0, 1)
        pixels = picture[None].float() / 127.5 - 1
        made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = (made - pixels).div(2).square().mean()
        found.append(float(-10 * torch.log10(error)))
    return {"vae_psnr": float(np.mean(found)), "n": n}


def judge_accuracy(model: judge.Judge, split: str, n: int) -> dict[str, float]:
    """Share of right answers on n unseen renders."""
    scenes = renders.unseen_scenes(split, n, seed=0)
    images = np.stack([pictures.render(scene, renders.SIZE_PX) for scene in scenes])
    right = judge.verdicts(model, images, scenes)
    return {f"judge_{name}": float(rows.mean()) for name, rows in right.items()} | {"n": n}
