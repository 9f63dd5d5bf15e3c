"""Retrieval as NeuralBench's image task scores it, from single trials of everybody.

Source: facebookresearch/neuroai, neuralbench/callbacks.py and defaults/metrics.py,
neuraltrain/metrics/metrics.py (Rank, InverseNormalizedRank, TopkAcc).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import metrics
import util
from datafiles.feature_bank import Bank
from dataset import TestEEG
from decoder.decoder import Decoder
from evaluation.retrieval import check_finite

NEURALBENCH = "neuralbench"  # of --protocol
HOW_BENCHED = (
    "as NeuralBench's image task: the encoder reads single trials, and cosine ranks all test "
    "pictures. Rank: of the true one from 0, ties as their mean; inverse rank: 1 - rank / "
    "(pictures - 1), chance 0.5, its mean is the benchmark's headline; median rank is counted from "
    "1. Single trials: each is a query. Per subject: predictions averaged over a person's trials "
    "of a picture. Per instance: over all people's. 95 % bootstrap over pictures; control: "
    "predictions dealt to other pictures. How the model was trained, and which embeddings it is "
    "ranked among, is this run's own: the benchmark's are of DINOv2-giant, two thirds up, mean "
    "token (--import_features)"
)
TRIALS, SUBJECTS, INSTANCES = "single trials", "per subject", "per instance"
EVERYBODY = "all"


@dataclass(frozen=True)
class Predictions:
    """What the trials of one person, or of all, predict [M, D], and the test picture of each."""

    subject: str
    of_trial: torch.Tensor
    picture: torch.Tensor  # int64 [M]
    gallery: torch.Tensor  # [N, D]

    def averaged(self) -> Predictions:
        """One prediction of each picture."""
        number = torch.bincount(self.picture, minlength=len(self.gallery))
        total = torch.zeros(len(self.gallery), self.of_trial.shape[1], dtype=self.of_trial.dtype)
        mean = total.index_add(0, self.picture, self.of_trial) / number[:, None].clamp(min=1)
        shown = number.nonzero().squeeze(1)
        return Predictions(self.subject, mean[shown], shown, self.gallery)


def predictions(decoder: Decoder, test: TestEEG, bank: Bank) -> Predictions:
    """Of every single trial of a test recording. Raises UserError / DataError."""
    if test.trials is None:
        raise util.UserError(
            "--protocol neuralbench", f"{test.source} has no single trials", "a recording of them",
            "leave it out, or score the recording before it was averaged",
        )  # fmt: skip
    recording, index = test.trials.recording, decoder.subject_index(test.subject)
    counts = recording.trial_counts
    found = []
    for row, count in enumerate(counts):
        eeg = test.trials.signal.cut(recording.trials(row)).astype(np.float32)
        found.append(decoder.embed(torch.from_numpy(eeg), torch.full((count,), index)))
    of_trial = torch.cat(found)
    picture = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    check_finite("the encoder's output", of_trial, test)
    gallery = decoder.gallery(bank.rows_for(test.stimuli), index).cpu()
    return Predictions(test.subject, of_trial, picture, gallery)


def pooled(given: Sequence[Predictions]) -> Predictions | None:
    """Everybody's as one person's; None where their models rank other galleries."""
    first = given[0].gallery
    if any(not torch.equal(one.gallery, first) for one in given):
        return None
    return Predictions(
        EVERYBODY,
        torch.cat([one.of_trial for one in given]),
        torch.cat([one.picture for one in given]),
        first,
    )


def benchmark_rows(given: Sequence[Predictions], seed: int, draws: int) -> list[dict[str, Any]]:
    """A row per person and way of averaging, then of everybody's queries together."""
    levels: list[tuple[str, Predictions]] = []
    for one in given:
        levels += [(TRIALS, one), (SUBJECTS, one.averaged())]
    if len(given) > 1 and (everybody := pooled(given)) is not None:
        averaged = pooled([one.averaged() for one in given])
        assert averaged is not None  # of the same galleries
        levels += [(TRIALS, everybody), (SUBJECTS, averaged), (INSTANCES, everybody.averaged())]
    return [{"level": level, **_row(one, seed, draws)} for level, one in levels]


def _row(one: Predictions, seed: int, draws: int) -> dict[str, Any]:
    similarity, pictures = metrics.cosine_similarity(one.of_trial, one.gallery), len(one.gallery)
    better, tied = metrics.ranks(similarity, one.picture)
    rank = better + tied / 2
    hits, inverse = (rank < 5).double(), 1 - rank.double() / max(pictures - 1, 1)
    row: dict[str, Any] = {
        "subject": one.subject, "queries": len(rank), "n": pictures,
        "inverse_rank_median": float(inverse.median()), "median_rank": float(1 + rank.median()),
        "top5_chance": min(5 / pictures, 1.0),
    }  # fmt: skip
    for name, values in (("inverse_rank", inverse), ("top5", hits)):
        row[name] = float(values.mean())
        row[f"{name}_interval"] = _interval(values, one.picture, seed)
    ranked = similarity.argsort(dim=1, descending=True).argsort(dim=1)
    dealt = list(_dealt_elsewhere(ranked, one.picture, seed, draws))
    row["inverse_rank_shuffled"] = 1 - float(np.mean([of.mean() for of in dealt])) / max(
        pictures - 1, 1
    )
    row["top5_shuffled"] = float(np.mean([(of < 5).mean() for of in dealt]))
    return row


def _interval(values: torch.Tensor, picture: torch.Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap over pictures, each with all of its queries, of the mean of all queries."""
    number = np.bincount(picture)
    total = np.bincount(picture, values)[number > 0]
    number = number[number > 0]
    rows = np.random.default_rng(seed).integers(0, len(number), (2000, len(number)))
    low, high = np.percentile(total[rows].sum(1) / number[rows].sum(1), [2.5, 97.5])
    return float(low), float(high)


def _dealt_elsewhere(
    ranked: torch.Tensor, picture: torch.Tensor, seed: int, draws: int
) -> Iterator[np.ndarray]:
    """Ranks [M] from 0 with the pictures exchanged, all queries of one together."""
    draw = util.numpy_generator_for(seed, "shuffled EEG")
    for _ in range(draws):
        order = torch.from_numpy(draw.permutation(ranked.shape[1]))
        yield ranked.gather(1, order[picture][:, None]).double().numpy()


def score_neuralbench(
    models: Mapping[str, Decoder], tests: Sequence[TestEEG], bank: Bank, seed: int, draws: int
) -> list[dict[str, Any]]:
    """Rows for results.json. ``models``: of each subject, on the device that computes."""
    from rundirs.progress import Progress

    given = [
        predictions(models[test.subject], test, bank)
        for test in Progress(tests, desc="single trials", unit="subject", leave=False)
    ]
    return benchmark_rows(given, seed, draws)
