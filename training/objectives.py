"""What the loop minimises and how a model is judged on held-out concepts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from datafiles.blurs import DRAWN_IMAGE
from dataset import TrainingData
from decoder.decoder import Decoder
from loss import Contrast, embedding_losses
from metrics import retrieval_topk
from modalities import NAMES
from training.processes import gathered
from util import Part


def validation_retrieval(
    decoder: Decoder, embeddings: torch.Tensor, data: TrainingData
) -> dict[str, float]:
    """Retrieval per modality of held-out stimuli by EEG embeddings [stimuli x subjects, D].

    Of the modalities that the bank has: an imported one may have but two.
    """
    truth, people = torch.arange(len(data.val_rows)), len(data.recordings)
    pictures = {name: rows[data.val_rows] for name, rows in data.targets.items()}
    scores: dict[str, float] = {}
    for index, own in enumerate(embeddings.split(len(truth))):
        seen = pictures | {"image": decoder.gallery(pictures, data.first_subject + index)}
        for name in (name for name in NAMES if name in pictures):
            result = retrieval_topk(own, seen[name], truth)
            for top in ("top1", "top5"):
                key = f"val_{name}_{top}"
                scores[key] = scores.get(key, 0.0) + result[top] / people
    return scores | {"val_gallery": len(data.val_rows)}


def global_losses(
    decoder: Decoder,
    embedding: torch.Tensor,
    subject: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    how: Contrast,
    groups: torch.Tensor | None,
    contrast_weight: float,
    part: Part,
) -> dict[str, torch.Tensor]:
    """:func:`loss.embedding_losses` over the rows of all processes that compute parts of a batch.

    In float32 whatever autocast says: cosines times 100 need it. The image that is contrasted is
    the blurred one where the batch has one drawn.
    """
    # what is WHOLE one process computes alone: nobody else would answer
    everybody = gathered if part.count > 1 else _as_they_are
    with torch.autocast(embedding.device.type, enabled=False):
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        drawn = {"image": targets[DRAWN_IMAGE]} if DRAWN_IMAGE in targets else {}
        pictures = {name: everybody((targets | drawn)[name]) for name in decoder.picture_features}
        everyone = {"image": decoder.image_side(pictures, everybody(subject))}
        if how.text_contrast:  # else a bank needs no texts
            everyone["text"] = everybody(targets["text"])
        together = None if groups is None else everybody(groups)
        scale = decoder.encoder.similarity_scale
        return embedding_losses(everybody(wide), everyone, scale, how, together, contrast_weight)


def _as_they_are(rows: torch.Tensor) -> torch.Tensor:
    return rows
