"""Scores of pictures: pairing them with what was shown, paired scores, distributions, controls.

Pictures come from a run of ``generate.py``, which journals what each of them is, or from any folder
whose files are named after the stimuli. They are joined by stimulus id or name, never by order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

import metrics
from datafiles.pictures import read_pixels
from datafiles.stimuli import Stimulus
from evaluation import networks
from evaluation.pairing import Group
from modalities import CONTROLS

# ---------------------------------------------------------------- what is scored


@dataclass(frozen=True)
class Score:
    """One number about pictures. ``network``: {protocol: name in NETWORKS}, or none for pixels."""

    label: str
    better: str  # "higher" or "lower"
    kind: str  # "pixels", "pair", "two_way", "distance", "frechet", "kernel", "inception"
    network: Mapping[str, str] = field(default_factory=dict)
    layer: str = ""

    @property
    def paired(self) -> bool:
        """Whether every picture has its own value."""
        return self.kind in ("pixels", "pair", "two_way", "distance")

    @property
    def chance(self) -> float | None:
        return 0.5 if self.kind == "two_way" else None


def _in_both(name: str) -> dict[str, str]:
    return dict.fromkeys(metrics.PROTOCOLS, name)


_B1_IN = dict(zip(metrics.PROTOCOLS, ("efficientnet_b1_v2", "efficientnet_b1_v1"), strict=True))
_LITE0, _FID = _in_both("lite0"), _in_both("fid_inception")
SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "pixcorr": Score("PixCorr", "higher", "pixels"),
        "ssim": Score("SSIM", "higher", "pixels"),
        "lpips": Score("LPIPS (alex)", "lower", "pair", _in_both("lpips")),
        "alexnet2": Score("AlexNet(2)", "higher", "two_way", _in_both("alexnet"), "2"),
        "alexnet5": Score("AlexNet(5)", "higher", "two_way", _in_both("alexnet"), "5"),
        "inception": Score("Inception", "higher", "two_way", _in_both("inception"), "avgpool"),
        "clip": Score("CLIP ViT-L/14", "higher", "two_way", _in_both("clip"), "embedding"),
        "effnet": Score("EffNet-B1", "lower", "distance", _B1_IN, "avgpool"),
        "swav": Score("SwAV", "lower", "distance", _in_both("swav"), "avgpool"),
        "lite0": Score("EffNet-Lite0 two-way", "higher", "two_way", _LITE0, "avgpool"),
        "lite0_distance": Score("EffNet-Lite0 distance", "lower", "distance", _LITE0, "avgpool"),
        "fid": Score("FID", "lower", "frechet", _FID, "2048"),
        "kid": Score("KID", "lower", "kernel", _FID, "2048"),
        "is1": Score("IS, 1 split", "higher", "inception", _FID, "logits_unbiased"),
        "is10": Score("IS, 10 splits", "higher", "inception", _FID, "logits_unbiased"),
        "fid_lite0": Score("Frechet EffNet-Lite0", "lower", "frechet", _LITE0, "avgpool"),
        "kid_lite0": Score("Kernel EffNet-Lite0", "lower", "kernel", _LITE0, "avgpool"),
    }
)
INCEPTION_SPLITS: Mapping[str, int] = MappingProxyType({"is1": 1, "is10": 10})
PIXEL_SCORES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], np.ndarray]] = MappingProxyType(
    {"pixcorr": metrics.pix_corr, "ssim": metrics.ssim}
)


# ---------------------------------------------------------------- paired scores


@dataclass(frozen=True)
class Values:
    """Per picture: its score, and the same against another stimulus; float64 [M] each."""

    own: np.ndarray
    other: np.ndarray


def pixel_values(group: Group, protocol: str, seed: int) -> dict[str, Values]:
    """PixCorr and SSIM of every picture, several at a time in threads."""

    @functools.lru_cache(maxsize=256)
    def prepared(path: Path) -> torch.Tensor:
        pixels = read_pixels(path)
        return metrics.prepared(pixels, metrics.PIXEL_PX, protocol, for_network=False)[None]

    def score(row: int, stimulus: int) -> list[float]:
        pair = prepared(group.stimuli[stimulus].path), prepared(group.pictures[row])
        return [float(function(*pair)[0]) for function in PIXEL_SCORES.values()]

    rows = range(len(group.pictures))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        own = np.array(list(pool.map(score, rows, group.owner)))
        other = np.array(list(pool.map(score, rows, group.shifted(seed))))
    return {name: Values(own[:, k], other[:, k]) for k, name in enumerate(PIXEL_SCORES)}


def _of_features(score: Score, truth: torch.Tensor, drawn: torch.Tensor, owner: Sequence[int]):
    rows = torch.tensor(owner)
    if score.kind == "two_way":
        return metrics.two_way(truth, drawn, rows)
    return metrics.correlation_distance(truth[rows], drawn)


def network_values(
    eye: networks.Eye, wanted: Mapping[str, Score], group: Group, cache: Path, seed: int
) -> tuple[dict[str, Values], dict[str, dict[str, Any]]]:
    """Everything one network says about a group: {paired score: Values}, {distribution: row}."""
    owner, shifted = group.owner, group.shifted(seed)
    shown = [item.path for item in group.stimuli]
    pair = [name for name, score in wanted.items() if score.kind == "pair"]
    if pair:
        own, other = (
            eye.distances([shown[row] for row in rows], group.pictures) for rows in (owner, shifted)
        )
        return dict.fromkeys(pair, Values(own, other)), {}
    truth = networks.cached_features(eye, shown, cache)
    drawn = eye.features(group.pictures)
    values, rows = {}, {}
    for name, score in wanted.items():
        layers = truth[score.layer], drawn[score.layer]
        if score.paired:
            values[name] = Values(*(_of_features(score, *layers, of) for of in (owner, shifted)))
        else:
            rows[name] = distribution_row(name, *layers, np.array(owner), seed)
    return values, rows


LEAST_RESAMPLED = 8  # stimuli: of fewer, some of 1000 draws are one stimulus alone, without pairs


def distribution_row(
    name: str, truth: torch.Tensor, drawn: torch.Tensor, owner: np.ndarray, seed: int
) -> dict[str, Any]:
    """FID, KID or IS of features or logits [N, D] and [M, D], with its interval.

    None where there are too few pictures for it.
    """
    row: dict[str, Any] = {"value": None, "interval": None, "nan": 0, "n": len(truth),
                           "pictures": len(drawn), "other_stimulus": None}  # fmt: skip
    kind = SCORES[name].kind
    if kind == "inception":
        splits, classes = INCEPTION_SPLITS[name], drawn.shape[1]
        row["splits"] = splits
        row["bound"] = metrics.inception_score_bound(len(drawn), classes, splits)
        if len(drawn) >= splits and len(truth) >= splits:
            row["value"] = metrics.inception_score(drawn, splits)
            row["interval"] = metrics.inception_interval(drawn, owner, splits, seed)
            row["stimuli"] = metrics.inception_score(truth, splits)
    elif min(len(truth), len(drawn)) >= 2:
        row["dimensions"] = drawn.shape[1]
        distance, interval = {
            "frechet": (metrics.frechet_distance, metrics.frechet_interval),
            "kernel": (metrics.kernel_distance, metrics.kernel_interval),
        }[kind]
        row["value"] = distance(truth, drawn)
        if len(truth) < LEAST_RESAMPLED:
            row["note"] = f"N = {len(truth)} is too small for an interval"
        else:
            row["interval"] = interval(truth, drawn, owner, seed)
    return row


def mean_per_stimulus(values: np.ndarray, owner: Sequence[int], n: int) -> np.ndarray:
    """Mean over the samples of each stimulus: [M] -> [n]. Never the best of them."""
    return np.bincount(owner, values, n) / np.bincount(owner, minlength=n)


def paired_row(values: Values, group: Group, seed: int) -> dict[str, Any]:
    """Mean over stimuli with interval and control. NaNs are counted, and make the mean NaN."""
    n = len(group.stimuli)
    own, other = (mean_per_stimulus(part, group.owner, n) for part in (values.own, values.other))
    return {
        "value": float(own.mean()),
        "interval": metrics.bootstrap_interval(own, seed),
        "nan": int(np.isnan(values.own).sum()),
        "n": n,
        "other_stimulus": float(other.mean()) if n > 1 else None,
    }


# ---------------------------------------------------------------- all of it


def available(
    protocol: str, weights_dir: Path | None
) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """({network: weight file}, [{metric, file, source} that are left out]). Raises DataError."""
    found, skipped = {}, []
    for score in SCORES.values():
        name = score.network.get(protocol)
        if name is None:
            continue
        path = found.get(name) or networks.find_weights(name, weights_dir)
        if path:
            found[name] = path
        else:
            network = networks.NETWORKS[name]
            skipped.append({"metric": score.label, "file": network.file, "source": network.source})
    return found, skipped


def _jobs(found: Mapping[str, Path], groups: Sequence[Group]) -> Iterator[tuple[str, Group]]:
    """Network by network, so that one is in memory at a time; "" = the pixels themselves."""
    for name in ("", *found):
        for group in groups:
            yield name, group


def score_groups(
    groups: Sequence[Group],
    found: Mapping[str, Path],
    protocol: str,
    device: torch.device,
    batch_size: int,
    cache: Path,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row per group for results.json, a row per stimulus and group for pictures.csv)."""
    from rundirs.progress import Progress

    values: dict[Group, dict[str, Values]] = {group: {} for group in groups}
    others: dict[Group, dict[str, dict[str, Any]]] = {group: {} for group in groups}
    eye = None
    jobs = list(_jobs(found, groups))
    for name, group in Progress(jobs, desc="scoring pictures", unit="recipe x network"):
        if not name:
            values[group] |= pixel_values(group, protocol, seed)
            continue
        if eye is None or eye.name != name:
            eye = networks.Eye.load(name, found[name], protocol, device, batch_size)
        wanted = {key: item for key, item in SCORES.items() if item.network.get(protocol) == name}
        paired, distributions = network_values(eye, wanted, group, cache, seed)
        values[group] |= paired
        others[group] |= distributions
    rows = [_result(group, values[group], others[group], seed) for group in groups]
    return rows, [line for group in groups for line in _lines(group, values[group])]


def _result(
    group: Group,
    values: Mapping[str, Values],
    distributions: Mapping[str, dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    scores = {name: paired_row(found, group, seed) for name, found in values.items()}
    scores |= distributions
    return {
        "images": group.images,
        "recipe": group.recipe,
        "prompt_source": group.prompt_source,
        "control": group.control,
        "mark": CONTROLS.get(group.control or "", ""),
        "beside": group.beside,
        "choice": group.choice,
        "unfinished": group.unfinished,
        "n": len(group.stimuli),
        "samples": len(group.pictures),
        "scores": {name: scores[name] for name in SCORES if name in scores},
    }


def _lines(group: Group, values: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    n = len(group.stimuli)
    columns = {
        name: mean_per_stimulus(values[name].own, group.owner, n)
        for name in SCORES
        if name in values
    }
    for row, item in enumerate(group.stimuli):
        yield {
            "images": group.images,
            "recipe": group.recipe,
            "stimulus": item.id,
            "picture": item.key,
            "concept": concept_of(item),
            **{name: float(column[row]) for name, column in columns.items()},
        }


def concept_of(stimulus: Stimulus) -> str:
    """Name of a stimulus' concept: of its folder, or of its file where it lies in no folder."""
    if stimulus.key.count("/") > 1:
        return stimulus.concept
    return stimulus.key.split("/")[-1].rsplit(".", 1)[0]


def described(rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, dict[str, Any]]:
    """What each score in the rows is, for those who read results.json."""
    used = {name for row in rows for name in row["scores"]}
    return {
        name: {
            "label": score.label,
            "better": score.better,
            "chance": score.chance,
            "network": score.network.get(protocol, ""),
            "paired": score.paired,
        }
        for name, score in SCORES.items()
        if name in used
    }
