"""Retrieval of the test concepts from EEG, beside shuffled EEG and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import metrics
import util
from datafiles.feature_bank import Bank
from datafiles.stimuli import Stimulus
from dataset import TestEEG
from decoder import controls
from decoder.controls import shuffled_top_k
from decoder.decoder import Decoder
from evaluation import tables
from modalities import MODALITIES, NAMES, WITHOUT_EEG


@dataclass(frozen=True)
class Query:
    """Similarity [N, N] of what was predicted from EEG with a gallery, truth on the diagonal.

    ``plain``: the same by the cosine of the embeddings as they are, where ``similarity`` is that
    of standardised ones.
    """

    name: str
    subject: str
    similarity: torch.Tensor
    plain: torch.Tensor | None = None
    effective_rank: tuple[float, float] | None = None  # of the predictions, of the gallery

    @property
    def truth(self) -> torch.Tensor:
        return torch.arange(len(self.similarity))


def retrieval_row(query: Query, seed: int, permutations: int) -> dict[str, Any]:
    """Scores of a query in both directions, with intervals, shuffled EEG and chance."""
    similarity, truth = query.similarity, query.truth
    row: dict[str, Any] = {
        "query": query.name,
        "subject": query.subject,
        **metrics.retrieval_scores(similarity, truth),
    }
    better, tied = metrics.ranks(similarity, truth)
    row["median_rank"] = float((1 + better + tied / 2).median())
    if query.effective_rank is not None:
        row["effective_rank"], row["effective_rank_true"] = query.effective_rank
    ways = {"": metrics.ranks(similarity, truth), "back_": metrics.ranks(similarity.T, truth)}
    for k in (1, 5):
        for prefix, ranked in ways.items():
            hits = metrics.top_k_probability(*ranked, k).numpy()
            row[f"{prefix}top{k}"] = float(hits.mean())
            row[f"{prefix}top{k}_interval"] = metrics.bootstrap_interval(hits, seed)
        row[f"top{k}_chance"] = k / len(similarity)
        shuffled = shuffled_top_k(similarity, truth, k, seed, permutations)
        row[f"top{k}_shuffled"] = float(shuffled.mean())
        row[f"top{k}_shuffled_range"] = np.percentile(shuffled, [2.5, 97.5]).tolist()
        if query.plain is not None:
            hits = metrics.top_k_probability(*metrics.ranks(query.plain, truth), k).numpy()
            row[f"top{k}_plain"] = float(hits.mean())
            row[f"top{k}_plain_interval"] = metrics.bootstrap_interval(hits, seed)
    return row


def across_subjects(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per query of two subjects or more: mean of every score, and the standard error over them."""
    found = []
    for query in dict.fromkeys(row["query"] for row in rows):
        own = [row for row in rows if row["query"] == query]
        if len(own) < 2:
            continue
        scores = {}
        for name in tables.ACROSS_SUBJECTS:
            values = np.array([row[name] for row in own])
            error = values.std(ddof=1) / np.sqrt(len(values))
            scores[name] = {"mean": float(values.mean()), "se": float(error)}
        found.append({"query": query, "subjects": len(own), "scores": scores})
    return found


def check_finite(what: str, rows: torch.Tensor, test: TestEEG) -> None:
    """Raise DataError for rows [N, D] of NaN or infinity: they have no rank."""
    bad = (~rows.isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        raise util.DataError(
            f"{test.subject}: {what}",
            f"NaN or infinity for {len(bad)} of {len(rows)} stimuli, e.g. {test.names[bad[0]]}",
            "numbers",
            "the model is damaged, or its training went wrong: look at its metrics.jsonl, and take "
            "another --checkpoint",
        )


def subject_queries(
    decoder: Decoder, test: TestEEG, bank: Bank, how: controls.Prediction
) -> list[Query]:
    """What one subject's EEG retrieves with: the encoder's output, each prior, the five fused.

    Predicted embeddings are ranked by the cosine of standardised ones: embeddings of CLIP share a
    large mean, so that by their plain cosine what lies near the mean is nearest to everything.
    """
    everything, true = range(len(test.eeg)), bank.rows_for(test.stimuli)
    found = []
    if how.control not in WITHOUT_EEG:
        read = controls.controlled_eeg(test, how.control, how.seed)
        encoded = decoder.condition(read, everything)
        check_finite("the encoder's output", encoded, test)
        gallery = decoder.gallery(true, decoder.subject_index(test.subject))
        similarity = metrics.cosine_similarity(encoded, gallery)
        ranks = metrics.effective_rank(encoded), metrics.effective_rank(gallery)
        found.append(Query("encoder -> image", test.subject, similarity, effective_rank=ranks))
    if decoder.bank is not None:
        samples = controls.predict_embeddings(decoder, test, everything, how)
        for name in NAMES:
            check_finite(f"the predicted {name} embedding", samples[name], test)
        found += prior_queries(decoder, samples, true, test.subject)
    return found


def prior_queries(
    decoder: Decoder,
    predicted: Mapping[str, torch.Tensor],
    true: Mapping[str, torch.Tensor],
    subject: str,
) -> list[Query]:
    """Of embeddings {modality: [N, D]} predicted and true: each modality, and the five fused."""
    by_space = []
    for space in (decoder.standardised, dict):
        query, gallery = space(predicted), space(true)
        of = {name: metrics.cosine_similarity(query[name], gallery[name]) for name in NAMES}
        fused = sum(item.gain * of[item.name] for item in MODALITIES)
        by_space.append({f"prior {name}": of[name] for name in NAMES} | {"fused priors": fused})
    standardised, plain = by_space
    ranks = {
        f"prior {name}": (
            metrics.effective_rank(predicted[name]),
            metrics.effective_rank(true[name]),
        )
        for name in NAMES
    }
    return [
        Query(name, subject, standardised[name], plain[name], ranks.get(name))
        for name in standardised
    ]


def rank_lines(query: Query, stimuli: Sequence[Stimulus]) -> list[dict[str, Any]]:
    """A line of ``ranks.csv`` per stimulus: its rank (1 = right), and what was put first."""
    better, tied = metrics.ranks(query.similarity, query.truth)
    rank = (1 + better + tied / 2).tolist()
    cosine, first = query.similarity.max(dim=1)
    return [
        {
            "subject": query.subject,
            "query": query.name,
            "stimulus": item.id,
            "picture": item.key,
            "concept": item.concept,
            "rank": rank[row],
            "chosen": stimuli[first[row]].key,
            "chosen_concept": stimuli[first[row]].concept,
            "chosen_similarity": round(float(cosine[row]), 6),
        }
        for row, item in enumerate(stimuli)
    ]
