"""Scores as pure functions on arrays: retrieval, paired pictures, distributions, intervals.

Definitions follow the MindEye lineage (Scotti et al. 2023/2024, final_evaluations.ipynb) and, where
the protocol says so, Brain-Diffuser (Ozcelik and VanRullen 2023). N is a number of pictures, D of
features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

START_PX = 256  # mindeye brings all pictures to this size first; LPIPS is computed at it
PIXEL_PX = 425  # PixCorr and SSIM are computed at this size
PROTOCOLS = ("mindeye", "braindiffuser")
_DIMENSIONS_AT_ONCE = 1 << 14  # of float64 copies of wide features


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

    similarity: [Q, G]; truth: int64 [Q], column of the true item. Raises ValueError for NaN.
    """
    if similarity.ndim != 2 or truth.shape != (len(similarity),):
        raise ValueError(
            f"similarity {tuple(similarity.shape)}, truth {tuple(truth.shape)}; "
            "expected [Q, G] and [Q]"
        )
    if similarity.isnan().any():  # nothing is above NaN: it would be ranked first everywhere
        raise ValueError("NaN among the similarities")
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


WAYS = (2, 4, 10, 50, 100)


def retrieval_scores(
    similarity: torch.Tensor, truth: torch.Tensor, ks: Sequence[int] = WAYS
) -> dict[str, float]:
    """Retrieval by similarity [Q, G]; truth int64 [Q]: gallery column of each query.

    Returns top1 and top5 over the whole gallery, the exact expectation of k-way top-1 for each k of
    ``ks`` that fits (``2-way`` ...), the mean reciprocal rank ``mrr``, and ``n``, ``gallery``. No
    random draws.
    """
    better, tied = ranks(similarity, truth)
    size = similarity.shape[1]
    scores = {f"top{k}": float(top_k_probability(better, tied, k).mean()) for k in (1, 5)}
    scores |= {
        f"{k}-way": float(k_way_probability(better, tied, size, k).mean()) for k in ks if k <= size
    }
    scores["mrr"] = float(reciprocal_rank(better, tied).mean())
    return scores | {"n": len(similarity), "gallery": size}


def reciprocal_rank(better: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
    """1 / rank, float64 [Q]; among ties the true item has their middle place."""
    return 1 / (1 + better.double() + tied.double() / 2)


def retrieval_topk(
    query: torch.Tensor, gallery: torch.Tensor, truth: torch.Tensor, ks: Sequence[int] = WAYS
) -> dict[str, float]:
    """:func:`retrieval_scores` by the cosine of query [Q, D] and gallery [G, D]."""
    return retrieval_scores(cosine_similarity(query, gallery), truth, ks)


# ---------------------------------------------------------------- paired pictures


def resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """float32 [N, 3, H, W] -> [N, 3, size_px, size_px]: bilinear, antialiased where it shrinks."""
    return F.interpolate(
        images, (size_px, size_px), mode="bilinear", antialias=True, align_corners=False
    )


def prepared(
    picture: np.ndarray, size_px: int, protocol: str, *, for_network: bool = True
) -> torch.Tensor:
    """A picture uint8 [H, W, 3] as the protocol shows it to a score: float32 [3, px, px] in 0..1.

    ``mindeye``: to 256 px, then to ``size_px``, bilinear, antialiased. ``braindiffuser``: Pillow on
    8 bits, bilinear for networks and bicubic for pixels. Neither crops. Raises ValueError.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture {picture.shape} {picture.dtype}, expected uint8 [H, W, 3]")
    if protocol == "mindeye":
        tensor = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
        return resized(resized(tensor, START_PX), size_px)[0]
    if protocol != "braindiffuser":
        raise ValueError(f"unknown protocol {protocol!r}; known are {', '.join(PROTOCOLS)}")
    from PIL import Image

    kind = Image.Resampling.BILINEAR if for_network else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(picture).resize((size_px, size_px), kind))
    return torch.tensor(small).permute(2, 0, 1).float() / 255


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


def psnr(truth: torch.Tensor, drawn: torch.Tensor) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of pictures in 0..1: [N, 3, H, W] twice -> float64 [N]."""
    error = (truth - drawn).double().square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).numpy()


def correlation_matrix(truth: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Pearson r of every truth row [N, D] with every drawn row [M, D]: float32 [N, M].

    Of a float64 product, so that equal ones tie. NaN where a row is flat. Wide features are taken
    in pieces, so that memory stays low.
    """
    if truth.ndim != 2 or drawn.ndim != 2 or truth.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"features {tuple(truth.shape)} and {tuple(drawn.shape)}, expected [N, D] and [M, D]"
        )
    means = [rows.double().mean(1, keepdim=True) for rows in (truth, drawn)]
    product = torch.zeros(len(truth), len(drawn), dtype=torch.float64)
    squares = [torch.zeros(len(rows), dtype=torch.float64) for rows in (truth, drawn)]
    for start in range(0, truth.shape[1], _DIMENSIONS_AT_ONCE):
        a, b = (
            rows[:, start : start + _DIMENSIONS_AT_ONCE].double() - mean
            for rows, mean in zip((truth, drawn), means, strict=True)
        )
        product += a @ b.T
        for total, piece in zip(squares, (a, b), strict=True):
            total += piece.square().sum(1)
    # 0 / 0 of a flat row is NaN: no correlation, not a bad one
    return (product / (squares[0].sqrt()[:, None] * squares[1].sqrt()[None])).float()


def two_way(
    truth: torch.Tensor, drawn: torch.Tensor, owner: torch.Tensor | None = None
) -> np.ndarray:
    """Two-way identification of features [N, D] and [M, D]: float64 [M], share of others beaten.

    ``owner`` int64 [M]: the truth row of each drawn one; None: the same row. Score of picture j: in
    how many of the N - 1 pairs its own stimulus correlates with it more than the other one does;
    ties lose (MindEye). Chance .5. NaN for a picture without variance.
    """
    matrix = correlation_matrix(truth, drawn)
    owner = torch.arange(len(drawn)) if owner is None else owner
    own = matrix[owner, torch.arange(len(drawn))]
    scores = (matrix < own[None]).double().sum(0) / (len(matrix) - 1)
    return torch.where(matrix.isnan().any(0), torch.nan, scores).numpy()


def correlation_distance(truth: torch.Tensor, drawn: torch.Tensor) -> np.ndarray:
    """1 - Pearson r of paired features [N, D] twice: float64 [N]; lower is better."""
    a, b = (rows.double() - rows.double().mean(1, keepdim=True) for rows in (truth, drawn))
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).numpy()


# ---------------------------------------------------------------- distributions of pictures


def frechet_distance(truth: torch.Tensor, drawn: torch.Tensor) -> float:
    """FID of features [N, D] and [M, D]: Frechet distance of two Gaussians, unbiased covariances.

    With fewer rows than dimensions from N x M inner products, without any D x D matrix:
    Tr((S1 S2)^1/2) is the nuclear norm of A B^T for A, B the centred features / sqrt(n - 1).
    Heusel et al. 2017. Needs two rows of each.
    """
    if min(len(truth), len(drawn)) < truth.shape[1]:
        return _frechet_of_products(*_products(truth, drawn))
    a, b = (
        (rows.double() - rows.double().mean(0)) / math.sqrt(len(rows) - 1)
        for rows in (truth, drawn)
    )
    values, vectors = torch.linalg.eigh(a.T @ a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()
    shift = (truth.double().mean(0) - drawn.double().mean(0)).square().sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * cross)


def _products(
    truth: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inner products within truth, within drawn and across, about the mean of truth; float64."""
    centre = truth.double().mean(0)  # any common shift is allowed: this one keeps numbers small
    a, b = truth.double() - centre, drawn.double() - centre
    return a @ a.T, b @ b.T, a @ b.T


def _frechet_of_products(aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor) -> float:
    n, m = ab.shape
    shift = aa.mean() + bb.mean() - 2 * ab.mean()
    traces = [(x.diagonal().sum() - x.mean() * len(x)) / (len(x) - 1) for x in (aa, bb)]
    centred = ab - ab.mean(0, keepdim=True) - ab.mean(1, keepdim=True) + ab.mean()
    cross = torch.linalg.svdvals(centred).sum() / math.sqrt((n - 1) * (m - 1))
    return float(shift + traces[0] + traces[1] - 2 * cross)


def kernel_distance(truth: torch.Tensor, drawn: torch.Tensor) -> float:
    """KID of features [N, D] and [M, D]: unbiased MMD^2 with (x.y / D + 1)^3, over all rows once.

    Deterministic; may be negative. Binkowski et al. 2018.
    """
    kernels = _cubic_kernels(truth, drawn)
    return _mmd(*kernels, *(torch.ones(len(rows)) for rows in (truth, drawn)))


def _cubic_kernels(
    truth: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = truth.double(), drawn.double()
    return tuple((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))


def _mmd(
    aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> float:
    """MMD^2 of rows counted ``p`` and ``q`` times; a row is never paired with itself."""
    total = -2 * (p.double() @ ab @ q.double()) / (p.sum() * q.sum())
    for kernel, weight in ((aa, p.double()), (bb, q.double())):
        pairs = weight.sum() ** 2 - weight.square().sum()
        total += (weight @ kernel @ weight - weight.square() @ kernel.diagonal()) / pairs
    return float(total)


def inception_score(logits: torch.Tensor, splits: int) -> float:
    """IS of logits [N, classes]: exp of the mean KL to the split's marginal, mean over splits.

    Splits are consecutive, in the order given. At most :func:`inception_score_bound`. Salimans et
    al. 2016. Raises ValueError with fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} rows in {splits} splits, expected at least one row each")
    log_p = logits.double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(splits):
        marginal = (part.logsumexp(0) - math.log(len(part)))[None]
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def inception_score_bound(rows: int, classes: int, splits: int) -> float:
    """The largest IS that so many pictures can get: of n pictures per split, at most n."""
    return min(classes, rows / splits)


# ---------------------------------------------------------------- intervals and tests


def bootstrap_interval(values: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of values [N], resampling the N stimuli."""
    rows = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.asarray(values)[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


def centred_interval(value: float, resampled: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of resampled scores, moved so that their mean lies on ``value``.

    For FID, KID and IS: drawing with replacement repeats rows, which biases all three.
    """
    low, high = np.percentile(np.asarray(resampled) - np.mean(resampled), [2.5, 97.5])
    return float(value + low), float(value + high)


def _resampled(
    owner: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """n stimuli drawn with replacement, and the rows of all their pictures."""
    stimuli = rng.integers(0, n, n)
    return stimuli, np.concatenate([np.flatnonzero(owner == item) for item in stimuli])


def frechet_interval(
    truth: torch.Tensor, drawn: torch.Tensor, owner: np.ndarray, seed: int, draws: int = 200
) -> tuple[float, float]:
    """95 % bootstrap of :func:`frechet_distance` over stimuli.

    truth [N, D]; drawn [M, D]; owner int [M]: the truth row of each drawn picture.
    """
    aa, bb, ab = _products(truth, drawn)
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows, columns = map(torch.from_numpy, _resampled(owner, len(truth), rng))
        parts = (aa[rows][:, rows], bb[columns][:, columns], ab[rows][:, columns])
        found.append(_frechet_of_products(*parts))
    return centred_interval(_frechet_of_products(aa, bb, ab), found)


def kernel_interval(
    truth: torch.Tensor, drawn: torch.Tensor, owner: np.ndarray, seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap of :func:`kernel_distance` over stimuli; arguments as above."""
    kernels = _cubic_kernels(truth, drawn)
    rng, n, found = np.random.default_rng(seed), len(truth), []
    for _ in range(draws):
        counts = np.bincount(rng.integers(0, n, n), minlength=n)
        weights = (torch.from_numpy(counts).double(), torch.from_numpy(counts[owner]).double())
        found.append(_mmd(*kernels, *weights))
    return centred_interval(kernel_distance(truth, drawn), found)


def inception_interval(
    logits: torch.Tensor, owner: np.ndarray, splits: int, seed: int, draws: int = 200
) -> tuple[float, float]:
    """95 % bootstrap of :func:`inception_score` of logits [M, classes] over stimuli."""
    rng, n = np.random.default_rng(seed), int(owner.max()) + 1
    found = [inception_score(logits[_resampled(owner, n, rng)[1]], splits) for _ in range(draws)]
    return centred_interval(inception_score(logits, splits), found)


def sign_flip_p(differences: np.ndarray, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of "the mean difference is 0": paired permutation test on differences [N].

    Under it every difference could as well have the other sign; so many sign patterns are drawn.
    """
    values = np.asarray(differences, dtype=np.float64)
    rng, observed, beyond = np.random.default_rng(seed), abs(values.mean()), 0
    for size in [1000] * (draws // 1000) + [draws % 1000]:
        signs = rng.integers(0, 2, (size, len(values)), dtype=np.int8) * 2.0 - 1
        beyond += int((np.abs(signs @ values) / len(values) >= observed - 1e-12).sum())
    return (beyond + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of tests made (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(order)), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def effective_rank(rows: torch.Tensor) -> float:
    """In how many directions rows [N, D] vary: exp of the entropy of their singular values.

    Of the centred rows, shares of the sum. 1 = all on a line, at most min(N - 1, D). Source: Roy &
    Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = torch.linalg.svdvals(rows.double() - rows.double().mean(dim=0))
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(share).sum().exp())
