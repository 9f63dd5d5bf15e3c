"""Retrieval against the number of repetitions averaged, single trials first.

Published figures average all repetitions (80 in THINGS-EEG2); a person who looks once gives one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import metrics
import util
from dataset import TestEEG
from decoder import controls
from decoder.controls import shuffled_top_k
from decoder.decoder import Decoder
from evaluation.retrieval import check_finite

MOST_GROUPS = 10
HOW_AVERAGED = (
    "encoder -> image among the test gallery; the repetitions of each stimulus are dealt at random "
    f"to groups without overlap, at most {MOST_GROUPS}; a stimulus' score is its mean over the "
    "groups, 95 % bootstrap over stimuli; control: EEG dealt to other stimuli"
)


def check_average(test: TestEEG, counts: Sequence[int]) -> None:
    """Raise UserError for more repetitions than the recording has."""
    most = test.trials.repetitions if test.trials else 1
    if max(counts) > most:
        raise util.UserError(
            f"--average {max(counts)}",
            f"{most} repetitions of each stimulus in {test.source}",
            f"1 to {most}",
            "leave the larger numbers out",
        )


def dealt(test: TestEEG, count: int, seed: int) -> Iterator[TestEEG]:
    """The recording averaged over ``count`` repetitions, once for each group of them."""
    assert test.trials is not None  # check_average has refused
    order = test.trials.dealt(util.numpy_generator_for(seed, "repetitions", test.subject))
    for group in range(min(test.trials.repetitions // count, MOST_GROUPS)):
        chosen = order[:, group * count : (group + 1) * count]
        yield replace(test, eeg=test.trials.mean(chosen))


def repetition_row(
    decoder: Decoder,
    test: TestEEG,
    gallery: torch.Tensor,
    count: int,
    control: str | None,
    seed: int,
    permutations: int,
) -> dict[str, Any]:
    """Scores with ``count`` repetitions averaged; gallery [N, D]."""
    hits: dict[str, list[torch.Tensor]] = {"top1": [], "top5": []}
    ranked, shuffled = [], []
    for group in dealt(test, count, seed):
        read = controls.controlled_eeg(group, control, seed)
        encoded = decoder.condition(read, range(len(read.eeg)))
        check_finite("the encoder's output", encoded, test)
        similarity = metrics.cosine_similarity(encoded, gallery)
        truth = torch.arange(len(similarity))
        better, tied = metrics.ranks(similarity, truth)
        for name, found in hits.items():
            found.append(metrics.top_k_probability(better, tied, int(name[3:])).double())
        ranked.append(1 + better + tied / 2)
        shuffled.append(shuffled_top_k(similarity, truth, 1, seed, permutations))
    row: dict[str, Any] = {
        "subject": test.subject, "n": len(test.eeg), "repetitions": count, "groups": len(ranked),
        "median_rank": float(torch.stack(ranked).median()),
        "top1_shuffled": float(np.mean(shuffled)), "top1_chance": 1 / len(gallery),
        "top5_chance": 5 / len(gallery),
    }  # fmt: skip
    for name, found in hits.items():
        of_stimulus = torch.stack(found).mean(dim=0).numpy()
        row[name] = float(of_stimulus.mean())
        row[f"{name}_interval"] = metrics.bootstrap_interval(of_stimulus, seed)
    return row
