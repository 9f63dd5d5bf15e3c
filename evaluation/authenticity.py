"""Whether pictures are drawn, or copied from training: the nearest training picture of each.

A generator that knows the training pictures can answer with one of them, and score well. Each
drawn picture's distance to its nearest training picture stands beside that to what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datafiles.pictures import read_pixels
from datafiles.stimuli import Stimulus
from evaluation import networks
from evaluation.pairing import Group

SEEN_PX = 32  # pictures are compared as pixels at this width and height
KEPT_TOGETHER = 512  # pictures whose features are computed, and cached, at once
COPY_SHARE = 0.5
READ_BY = {"clip": ("embedding", "CLIP ViT-L/14"), "lite0": ("avgpool", "EffNet-Lite0")}
HOW_AUTHENTIC = (
    f"Distance of each drawn picture to the nearest training picture and to its own stimulus; "
    f"pixels: RMSE at {SEEN_PX} px, 0 to 1; features: 1 - cosine. COPY: nearer to a training "
    f"picture than {COPY_SHARE:g} of the nearest that any test stimulus is to one. Stimuli: the "
    "same of what was seen, which is no copy"
)


@dataclass(frozen=True)
class Space:
    """Where pictures are compared: ``vectors`` of files [N, D], ``distance`` [N, M] of two sets.

    ``kept``: the same of files that are there for good, from a cache.
    """

    name: str
    vectors: Callable[[Sequence[Path]], np.ndarray]
    kept: Callable[[Sequence[Path]], np.ndarray]
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]


def small_pixels(paths: Sequence[Path]) -> np.ndarray:
    """float32 [N, 3 x 32 x 32] in 0..1."""
    from rundirs.progress import Progress

    size = (SEEN_PX, SEEN_PX)
    rows = [
        np.asarray(Image.fromarray(read_pixels(path)).resize(size, Image.Resampling.BILINEAR))
        for path in Progress(paths, desc="pixels", unit="picture", leave=False)
    ]
    return np.stack(rows).reshape(len(rows), -1).astype(np.float32) / 255


def root_mean_square(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[N, M] of rows [N, D] and [M, D]."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squares, 0) / one.shape[1])


def cosine_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - cosine [N, M] of rows."""
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return 1 - a @ b.T


def spaces(eye: networks.Eye | None, cache: Path) -> list[Space]:
    """Pixels, and the features of a network where there is one."""
    found = [Space("pixels", small_pixels, small_pixels, root_mean_square)]
    if eye is not None:
        layer, label = READ_BY[eye.name]

        def features(paths: Sequence[Path]) -> np.ndarray:
            return eye.features(paths)[layer].numpy()

        def cached(paths: Sequence[Path]) -> np.ndarray:
            from rundirs.progress import Progress

            starts = Progress(
                range(0, len(paths), KEPT_TOGETHER), desc=label, unit="chunk", leave=False
            )
            parts = [networks.cached_features(eye, paths[at : at + KEPT_TOGETHER], cache)[layer]
                     for at in starts]  # fmt: skip
            return torch.cat(parts).numpy()

        found.append(Space(label, features, cached, cosine_distance))
    return found


def authenticity_rows(
    groups: Sequence[Group], training: Sequence[Stimulus], compared: Sequence[Space]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row per group and space for results.json, a line per picture and space)."""
    rows, lines = [], []
    for space in compared:
        known = space.kept([item.path for item in training])
        of_stimuli: dict[tuple[Stimulus, ...], tuple[np.ndarray, np.ndarray]] = {}
        for group in groups:
            shown = tuple(group.stimuli)
            if shown not in of_stimuli:
                vectors = space.kept([item.path for item in shown])
                of_stimuli[shown] = vectors, space.distance(vectors, known).min(axis=1)
            seen, of_seen = of_stimuli[shown]
            drawn = space.vectors(group.pictures)
            to_known = space.distance(drawn, known)
            nearest, place = to_known.min(axis=1), to_known.argmin(axis=1)
            true = space.distance(drawn, seen)[np.arange(len(drawn)), list(group.owner)]
            copies = nearest < COPY_SHARE * of_seen.min()
            own = [
                {
                    "images": group.images, "recipe": group.recipe, "space": space.name,
                    "drawn": group.pictures[row].name,
                    "picture": group.stimuli[group.owner[row]].key,
                    "nearest": training[place[row]].key, "distance": float(nearest[row]),
                    "to_stimulus": float(true[row]), "copy": bool(copies[row]),
                }
                for row in range(len(drawn))
            ]  # fmt: skip
            lines += own
            rows.append({
                "images": group.images, "recipe": group.recipe, "space": space.name,
                "samples": len(drawn), "training": len(training),
                "nearest": float(nearest.mean()), "to_stimulus": float(true.mean()),
                "stimuli_nearest": float(of_seen.mean()), "below": float(of_seen.min()),
                "nearer_than_stimulus": float((nearest < true).mean()),
                "copies": [{key: line[key] for key in ("drawn", "picture", "nearest", "distance")}
                           for line in own if line["copy"]],
            })  # fmt: skip
    return rows, lines
