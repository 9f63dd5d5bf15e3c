"""Losses: of the priors (MSE + cosine), CLIP contrast, and their weighted totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modalities import MODALITIES, NAMES

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


def terms_of(terms: LossTerms) -> dict[str, LossTerms]:
    """{modality: its scalars} of terms [M]."""
    parts = zip(terms.total, terms.mse, terms.cosine, strict=True)
    return {name: LossTerms(*part) for name, part in zip(NAMES, parts, strict=True)}


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
    # plain numbers as weights: a GPU would wait for a tensor of them
    pairs = zip(MODALITIES, losses.unbind(), strict=True)
    return torch.stack([modality.loss_weight * loss for modality, loss in pairs]).sum()


def clip_loss(
    eeg: torch.Tensor,
    features: torch.Tensor,
    scale: torch.Tensor,
    normalise: str = "both",
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric CLIP loss (Radford et al. 2021) of embeddings [B, D] against features [B, D].

    ``scale`` multiplies the cosines (already exponentiated). ``normalise``: ``both`` sides are
    L2-normalised; with ``targets`` only the features are, as in ATM's published code, and the EEG
    side keeps its length, in units of sqrt(D), which is the length that a LayerNorm gives: at the
    start of training the two kinds are equally sharp.

    ``groups`` int64 [B]: rows of one group are each other's positives, over which a row's truth is
    spread evenly (SupCon, arXiv:2004.11362). None: every other row of the batch is a negative.
    """
    check_pair(eeg, features)
    queries = F.normalize(eeg, dim=1) if normalise == "both" else eeg / eeg.shape[1] ** 0.5
    logits = scale * queries @ F.normalize(features, dim=1).T
    truth = torch.arange(len(eeg), device=eeg.device)
    if groups is not None:
        alike = (groups[:, None] == groups).to(logits.dtype)
        truth = alike / alike.sum(dim=1, keepdim=True)  # symmetric: right for columns, too
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


@dataclass(frozen=True)
class Contrast:
    """How EEG embeddings are drawn to their targets; names as the flags of ``args.py``.

    ``contrast_positives`` (``pair`` or ``concept``): which rows :func:`clip_loss` groups;
    ``target_mse``: weight of the MSE to the un-normalised image target.
    """

    text_contrast: float
    contrast_normalise: str = "both"
    contrast_positives: str = "pair"
    target_mse: float = 0.0


def contrastive_total(
    eeg: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    scale: torch.Tensor,
    how: Contrast,
    groups: torch.Tensor | None,
) -> torch.Tensor:
    """(1 - text_contrast) x CLIP loss to images + text_contrast x that to texts. ATM uses 0.01."""
    to_images = clip_loss(eeg, targets["image"], scale, how.contrast_normalise, groups)
    if how.text_contrast == 0:
        return to_images
    to_texts = clip_loss(eeg, targets["text"], scale, how.contrast_normalise, groups)
    return (1 - how.text_contrast) * to_images + how.text_contrast * to_texts


def embedding_losses(
    eeg: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    scale: torch.Tensor,
    how: Contrast,
    groups: torch.Tensor | None,
    contrast_weight: float,
) -> dict[str, torch.Tensor]:
    """Losses of EEG embeddings [B, D] themselves: ``contrast``, their weighted total ``loss``.

    With a weight also ``target_mse``, as in ATM's training for reconstruction: the contrast sees no
    lengths, but what is drawn from does.
    """
    contrast = contrastive_total(eeg, targets, scale, how, groups)
    parts = {"contrast": contrast, "loss": contrast_weight * contrast}
    if how.target_mse:
        parts["target_mse"] = F.mse_loss(eeg, targets["image"])
        parts["loss"] = parts["loss"] + how.target_mse * parts["target_mse"]
    return parts


def first_non_finite(parts: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first part that is NaN or infinite, None if all are finite."""
    for name, value in parts.items():
        if not torch.isfinite(value):
            return name
    return None
