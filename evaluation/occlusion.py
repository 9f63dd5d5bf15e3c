"""Explain a decoder: what retrieval loses when channels, regions or time windows are taken away.

A part of the EEG is taken away by giving every stimulus the mean over all stimuli there: what is
common to all pictures stays, what tells them apart is gone, and the encoder sees no edge that it
was never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import metrics
import util
from datafiles import electrodes
from dataset import TestEEG
from decoder.decoder import Decoder

OCCLUDED_S = 0.05
HOW = (
    "encoder -> image among the test gallery; the channels or the window are set to their mean "
    "over all test stimuli; drop = whole - without, paired by stimulus, 95 % bootstrap over stimuli"
)


@dataclass(frozen=True)
class Occluded:
    """What is taken away: some ``rows`` of channels, from ``start`` to ``stop`` in samples."""

    kind: str  # "channel", "region" or "window"
    name: str
    rows: tuple[int, ...]
    start: int
    stop: int


def channel_parts(channels: Sequence[str], samples: int) -> list[Occluded]:
    """Every channel, then every region that has one."""
    whole = (0, samples)
    singles = [Occluded("channel", name, (row,), *whole) for row, name in enumerate(channels)]
    return singles + [
        Occluded("region", name, tuple(channels.index(member) for member in members), *whole)
        for name, members in electrodes.regions_of(channels).items()
    ]


def window_parts(channels: Sequence[str], times_s: Sequence[float]) -> list[Occluded]:
    """Windows of WINDOW_S from the first sample on; each sample is in one, by its time."""
    everywhere = tuple(range(len(channels)))
    # a microsecond is lent, so that a sample on an edge is in the later window in spite of rounding
    number = [int((time - times_s[0] + 1e-6) / OCCLUDED_S) for time in times_s]
    parts = []
    for window in dict.fromkeys(number):
        start, first = number.index(window), times_s[0] + window * OCCLUDED_S
        name = f"{first:.3f}-{first + OCCLUDED_S:.3f} s"
        parts.append(Occluded("window", name, everywhere, start, start + number.count(window)))
    return parts


def without(eeg: torch.Tensor, part: Occluded) -> torch.Tensor:
    """EEG [N, C, T] with the part replaced by its mean over the N stimuli."""
    occluded, rows = eeg.clone(), list(part.rows)
    there = eeg[:, rows, part.start : part.stop]
    occluded[:, rows, part.start : part.stop] = there.mean(dim=0, keepdim=True)
    return occluded


def hits(decoder: Decoder, test: TestEEG, gallery: torch.Tensor) -> dict[str, np.ndarray]:
    """Per stimulus, of encoder -> image retrieval: top1, top5, reciprocal rank; float64 [N]."""
    query = decoder.condition(test, range(len(test.eeg)))
    similarity = metrics.cosine_similarity(query, gallery)
    better, tied = metrics.ranks(similarity, torch.arange(len(similarity)))
    found = {f"top{k}": metrics.top_k_probability(better, tied, k) for k in (1, 5)}
    found["mrr"] = metrics.reciprocal_rank(better, tied)
    return {name: column.double().numpy() for name, column in found.items()}


def occlusion_rows(
    decoder: Decoder, test: TestEEG, gallery: torch.Tensor, kinds: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """The drop of every part. ``kinds``: "channels" (and regions), "time"; gallery [N, D]."""
    from rundirs.progress import Progress

    channels, times_s = decoder.signal["channels"], decoder.signal["times"]
    parts = channel_parts(channels, len(times_s)) if "channels" in kinds else []
    parts += window_parts(channels, times_s) if "time" in kinds else []
    whole, step_s = hits(decoder, test, gallery), times_s[1] - times_s[0]
    rows = []
    for part in Progress(parts, desc=f"occlusion {test.subject}", unit="part"):
        left = hits(decoder, replace(test, eeg=without(test.eeg, part)), gallery)
        drops = {name: whole[name] - left[name] for name in whole}
        rows.append(
            {
                "kind": part.kind,
                "name": part.name,
                "channels": [channels[row] for row in part.rows],
                "start_s": times_s[part.start],
                "end_s": times_s[part.stop - 1] + step_s,
                "subject": test.subject,
                "n": len(test.eeg),
                "drops": {
                    name: {
                        "value": float(drop.mean()),
                        "interval": metrics.bootstrap_interval(drop, seed),
                    }
                    for name, drop in drops.items()
                },
            }
        )
    util.LOG.info(
        "%s: whole EEG %s", test.subject, {k: f"{v.mean():.3f}" for k, v in whole.items()}
    )
    return rows


def largest(rows: Sequence[dict[str, Any]], kind: str, score: str = "mrr") -> dict[str, Any] | None:
    """The part of a kind with the largest drop, averaged over subjects; None without any."""
    drops: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == kind:
            drops.setdefault(row["name"], []).append(row["drops"][score]["value"])
    if not drops:
        return None
    name = max(drops, key=lambda name: np.mean(drops[name]))
    return next(row for row in rows if row["kind"] == kind and row["name"] == name)
