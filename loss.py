"""Losses: of the priors (MSE + cosine), CLIP contrast, and their weighted totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modalities import MODALITIES

MSE_SHARE, COSINE_SHARE = 0.7, 0.3  # the published prior loss: 0.7 MSE + 0.3 (1 - cos)


@dataclass(frozen=True)
class LossTerms:
    """Scalars of one modality, or [M]: ``total`` = 0.7 ``mse`` + 0.3 (1 - ``cosine``)."""

    total: torch.Tensor
    mse: torch.Tensor
    cosine: torch.Tensor


def check_pair(predicted: torch.Tensor, target: torch.Tensor) -> None:
    """Raise ValueError unless both are the same [B, D]: broadcasting hides swapped rows."""
    if predicted.ndim != 2 or predicted.shape != target.shape:
        raise ValueError(
            f"shapes {tuple(predicted.shape)} and {tuple(target.shape)}, expected the same [B, D]"
        )


def prior_loss(predicted: torch.Tensor, target: torch.Tensor) -> LossTerms:
    """Loss of a predicted velocity or noise [B, D] against the true one [B, D]."""
    check_pair(predicted, target)
    terms = stacked_prior_loss(predicted[None], target[None])
    return LossTerms(terms.total[0], terms.mse[0], terms.cosine[0])


def stacked_prior_loss(predicted: torch.Tensor, target: torch.Tensor) -> LossTerms:
    """:func:`prior_loss` of M modalities at once: [M, B, D] against [M, B, D] -> terms [M]."""
    if predicted.ndim != 3 or predicted.shape != target.shape:
        shapes = f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        raise ValueError(f"shapes {shapes}, expected the same [M, B, D]")
    mse = (predicted - target).square().mean(dim=(1, 2))
    cosine = F.cosine_similarity(predicted, target, dim=2).mean(dim=1)
    return LossTerms(MSE_SHARE * mse + COSINE_SHARE * (1 - cosine), mse, cosine)


def prior_total(
    terms: Mapping[str, LossTerms], log_variance: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over the modalities of weight x loss; the weights sum to 1 at the start of training.

    ``log_variance`` None: the registry's weights. [M] in registry order: exp(-s) x loss + s, over
    M, which learns how much of each loss is noise (Kendall et al. 2018, arXiv:1705.07115).
    """
    losses = torch.stack([terms[modality.name].total for modality in MODALITIES])
    if log_variance is not None:
        return ((-log_variance).exp() * losses + log_variance).mean()
    weights = torch.tensor([modality.loss_weight for modality in MODALITIES])
    return (weights.to(losses) * losses).sum()


def clip_loss(eeg: torch.Tensor, features: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric CLIP loss (Radford et al. 2021) of embeddings [B, D] against features [B, D].

    Both sides are L2-normalised here; ``scale`` multiplies the cosines (already exponentiated).
    Every other row of the batch is a negative.
    """
    check_pair(eeg, features)
    logits = scale * F.normalize(eeg, dim=1) @ F.normalize(features, dim=1).T
    truth = torch.arange(len(eeg), device=eeg.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def contrastive_total(
    eeg: torch.Tensor, targets: Mapping[str, torch.Tensor], scale: torch.Tensor, text_share: float
) -> torch.Tensor:
    """(1 - text_share) x CLIP loss to images + text_share x CLIP loss to texts. ATM uses 0.01."""
    to_images = clip_loss(eeg, targets["image"], scale)
    if text_share == 0:
        return to_images
    return (1 - text_share) * to_images + text_share * clip_loss(eeg, targets["text"], scale)


def first_non_finite(parts: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first part that is NaN or infinite, None if all are finite."""
    for name, value in parts.items():
        if not torch.isfinite(value):
            return name
    return None
