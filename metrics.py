"""Scores as pure functions on arrays: retrieval, PixCorr, SSIM.

Definitions follow the MindEye lineage (Scotti et al. 2023/2024, final_evaluations.ipynb).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

MINDEYE_PX = 425  # PixCorr and SSIM are computed at this size


# ---------------------------------------------------------------- retrieval


def cosine_similarity(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Cosines [Q, G] of query [Q, D] and gallery [G, D].

    float32 of a float64 product, so that equal rows tie.
    """
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, gallery {tuple(gallery.shape)}; "
            "expected [Q, D] and [G, D]"
        )
    return (F.normalize(query.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).float()


def ranks(similarity: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many gallery items beat and tie with the true one: (better, tied) int64 [Q].

    similarity: [Q, G]; truth: int64 [Q], column of the true item.
    """
    if similarity.ndim != 2 or truth.shape != (len(similarity),):
        raise ValueError(
            f"similarity {tuple(similarity.shape)}, truth {tuple(truth.shape)}; "
            "expected [Q, G] and [Q]"
        )
    own = similarity.gather(1, truth[:, None])
    return (similarity > own).sum(1), (similarity == own).sum(1) - 1


def top_k_probability(better: torch.Tensor, tied: torch.Tensor, k: int) -> torch.Tensor:
    """Chance [Q] that the true item is among the first k when ties are broken at random."""
    return ((k - better).clamp(min=0) / (tied + 1)).clamp(max=1.0).double()


def k_way_probability(
    better: torch.Tensor, tied: torch.Tensor, gallery: int, k: int
) -> torch.Tensor:
    """Exact chance [Q] of top-1 among the true item and k-1 distractors drawn without replacement.

    No distractor may be better; ties count half a place each on average, by averaging over the
    positions the true item can take among its ties. Hypergeometric: C(G-1-r, k-1) / C(G-1, k-1)
    for rank r.
    """
    others = gallery - 1
    if not 2 <= k <= gallery:
        raise ValueError(f"{k}-way needs 2 <= k <= gallery size {gallery}")
    rank_chance = torch.ones(gallery, dtype=torch.float64)
    for drawn in range(k - 1):
        left = torch.arange(others, -1, -1, dtype=torch.float64) - drawn
        rank_chance *= left.clamp(min=0) / (others - drawn)
    mean_to = torch.cat([torch.zeros(1, dtype=torch.float64), rank_chance.cumsum(0)])
    better, tied = better.cpu(), tied.cpu()
    return (mean_to[better + tied + 1] - mean_to[better]) / (tied + 1)


def retrieval_topk(
    query: torch.Tensor,
    gallery: torch.Tensor,
    truth: torch.Tensor,
    ks: Sequence[int] = (2, 4, 10, 50, 100),
) -> dict[str, float]:
    """Cosine retrieval of gallery [G, D] by query [Q, D]; truth int64 [Q]: gallery row of each.

    Returns top1 and top5 over the whole gallery, the exact expectation of k-way top-1 for each k of
    ``ks`` that fits (``2-way`` ...), the mean reciprocal rank ``mrr``, and ``n``, ``gallery``. No
    random draws.
    """
    better, tied = ranks(cosine_similarity(query, gallery), truth)
    size = len(gallery)
    scores = {f"top{k}": float(top_k_probability(better, tied, k).mean()) for k in (1, 5)}
    scores |= {
        f"{k}-way": float(k_way_probability(better, tied, size, k).mean()) for k in ks if k <= size
    }
    scores["mrr"] = float((1 / (1 + better + tied / 2)).mean())
    return scores | {"n": len(query), "gallery": size}


# ---------------------------------------------------------------- paired pictures


def to_mindeye(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, 425, 425] in 0..1, by way of 256 px, antialiased."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images {images.shape} {images.dtype}, expected uint8 [N, H, W, 3]")
    tensor = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    for size in (256, MINDEYE_PX):
        tensor = F.interpolate(
            tensor, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
    return tensor


def pix_corr(truth: torch.Tensor, drawn: torch.Tensor) -> np.ndarray:
    """Pearson r over the RGB pixels: [N, 3, H, W] twice -> float64 [N]; NaN if one is flat."""
    a, b = (images.flatten(1).double() for images in (truth, drawn))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = a.norm(dim=1) * b.norm(dim=1)
    corr = (a * b).sum(1) / norms
    # float rounding leaves a flat picture a norm of about 1e-6: call it flat, not correlated
    return torch.where(norms > 1e-6, corr, torch.nan).numpy()


def ssim(truth: torch.Tensor, drawn: torch.Tensor) -> np.ndarray:
    """Gaussian SSIM (Wang et al. 2004) of gray pictures: [N, 3, H, W] twice -> float64 [N]."""
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    gray = [
        [rgb2gray(image.permute(1, 2, 0).numpy()) for image in images] for images in (drawn, truth)
    ]
    return np.array(
        [
            structural_similarity(
                a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
            )
            for a, b in zip(*gray, strict=True)
        ],
        dtype=np.float64,
    )


def bootstrap_interval(values: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of values [N], resampling the N stimuli."""
    rows = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.asarray(values)[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)
