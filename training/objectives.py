"""What the loop minimises and how a model is judged on held-out concepts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
    truth = torch.arange(len(data.val_rows)).repeat(len(data.recordings))
    galleries = {name: rows[data.val_rows] for name, rows in data.targets.items()}
    galleries["image"] = decoder.gallery(galleries)
    scores = {}
    for name in (name for name in NAMES if name in galleries):
        result = retrieval_topk(embeddings, galleries[name], truth)
        scores |= {f"val_{name}_top1": result["top1"], f"val_{name}_top5": result["top5"]}
    return scores | {"val_gallery": len(data.val_rows)}


def global_losses(
    decoder: Decoder,
    embedding: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    how: Contrast,
    groups: torch.Tensor | None,
    contrast_weight: float,
    part: Part,
) -> dict[str, torch.Tensor]:
    """:func:`loss.embedding_losses` over the rows of all processes that compute parts of a batch.

    In float32 whatever autocast says: cosines times 100 need it.
    """
    # what is WHOLE one process computes alone: nobody else would answer
    everybody = gathered if part.count > 1 else _as_they_are
    with torch.autocast(embedding.device.type, enabled=False):
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        everyone = {"image": decoder.image_side(everybody(targets[decoder.picture_features]))}
        if how.text_contrast:  # else a bank needs no texts
            everyone["text"] = everybody(targets["text"])
        together = None if groups is None else everybody(groups)
        scale = decoder.encoder.similarity_scale
        return embedding_losses(everybody(wide), everyone, scale, how, together, contrast_weight)


def _as_they_are(rows: torch.Tensor) -> torch.Tensor:
    return rows
