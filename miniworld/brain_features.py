"""What of a picture drives the simulated brain: pixels, texture and the scene, as features."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from miniworld.pictures import (
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZE_RANGE,
    Scene,
    render,
    sample_concepts,
    sample_scene,
)

FEATURE_PX = 96  # low-level features see the picture at this width
N_REFERENCE = 400  # pictures that define mean, std and covariance of the features


@dataclass(frozen=True)
class Source:
    """A simulated cortical area: which features it carries, where on the scalp, and when."""

    name: str
    n_features: int
    latency_s: float  # peak of the response; subjects differ by about +-0.015
    width_s: float
    channels: tuple[str, ...]  # centres; features alternate between them
    gain: float  # std of its share of the evoked signal, relative to the other sources


# Gains: chosen on validation concepts, so that of each attribute a part can be decoded.
SOURCES = (
    # from the pixels; a square number of features with "grid" is retinotopic
    Source("luminance_grid", 16, 0.095, 0.016, ("Oz",), 0.6),
    Source("edge_grid", 9, 0.110, 0.018, ("Oz",), 0.5),
    Source("texture", 8, 0.120, 0.020, ("O1", "O2"), 0.4),
    Source("red_green_grid", 9, 0.130, 0.020, ("POz",), 0.6),
    Source("blue_yellow_grid", 9, 0.140, 0.022, ("POz",), 0.6),
    # from the scene
    Source("place", 4, 0.155, 0.025, ("PO7", "PO8"), 0.95),
    Source("pattern", 5, 0.170, 0.028, ("O1", "O2"), 0.65),
    Source("object_colour", 8, 0.185, 0.030, ("PO7", "PO8"), 2.05),
    Source("shape", 12, 0.210, 0.032, ("PO8", "PO7", "P8", "P7"), 1.4),
    Source("background", 6, 0.230, 0.035, ("PO3", "PO4"), 0.6),
    Source("size", 2, 0.250, 0.035, ("P4", "P3"), 0.35),
    Source("shape_late", 8, 0.310, 0.050, ("P8", "P7", "TP8", "TP7"), 0.95),
)
_CATEGORICAL = {  # source name -> (scene attribute, its values)
    "pattern": ("pattern", tuple(PATTERNS)),
    "object_colour": ("colour", tuple(COLOURS)),
    "shape": ("shape", tuple(SHAPES)),
    "background": ("background", tuple(COLOURS)),
    "shape_late": ("shape", tuple(SHAPES)),
}


def feature_slices() -> dict[str, slice]:
    """{source name: its columns in the feature matrix}."""
    stops = np.cumsum([source.n_features for source in SOURCES]).tolist()
    columns = zip(SOURCES, stops, strict=True)
    return {source.name: slice(stop - source.n_features, stop) for source, stop in columns}


def _pool(plane: np.ndarray, grid: int) -> np.ndarray:
    """Means of a [FEATURE_PX, FEATURE_PX] plane over grid x grid cells, flat [grid * grid]."""
    side = FEATURE_PX // grid
    return plane.reshape(grid, side, grid, side).mean(axis=(1, 3)).ravel()


def _texture(luminance: np.ndarray) -> np.ndarray:
    """Log contrast energy at 4 orientations x 2 scales, [8], from luminance [96, 96] in 0..1."""
    coarse = luminance.reshape(FEATURE_PX // 4, 4, FEATURE_PX // 4, 4).mean(axis=(1, 3))
    energies = []
    for plane in (luminance, coarse):
        dy, dx = np.gradient(plane)
        steps = (dx, dy, (dx + dy) / math.sqrt(2), (dx - dy) / math.sqrt(2))
        energies += [np.log(1e-4 + np.mean(step**2)) for step in steps]
    return np.array(energies)


def _pixel_features(image: np.ndarray) -> dict[str, np.ndarray]:
    """Raw features of the low-level sources from uint8 [H, W, 3] sRGB."""
    small = Image.fromarray(image).resize((FEATURE_PX, FEATURE_PX), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float64) / 255
    luminance = rgb @ (0.299, 0.587, 0.114)
    dy, dx = np.gradient(luminance)
    return {
        "luminance_grid": _pool(luminance, 4),
        "edge_grid": _pool(np.hypot(dx, dy), 3),
        "texture": _texture(luminance),
        "red_green_grid": _pool(rgb[:, :, 0] - rgb[:, :, 1], 3),
        "blue_yellow_grid": _pool(rgb[:, :, 2] - rgb[:, :, :2].mean(axis=2), 3),
    }


@functools.lru_cache(maxsize=4)
def _embeddings(seed: int) -> dict[str, np.ndarray]:
    """{categorical source: random code [n values, n features]}, shared by all subjects."""
    rng = np.random.default_rng([seed, 1])
    codes = {}
    for source in SOURCES:
        if source.name in _CATEGORICAL:
            n_values = len(_CATEGORICAL[source.name][1])
            codes[source.name] = rng.standard_normal((n_values, source.n_features))
    return codes


def _scene_features(scene: Scene, seed: int) -> dict[str, np.ndarray]:
    """Raw features of the sources that know what is in the picture."""
    x, y = scene.x - 0.5, scene.y - 0.5
    relative_size = (scene.size - SIZE_RANGE[0]) / (SIZE_RANGE[1] - SIZE_RANGE[0])
    raw = {
        # the right visual field's is in the left hemisphere, as the sources' channels alternate
        "place": np.maximum([x, -x, y, -y], 0),
        "size": np.array([relative_size, abs(relative_size - 0.5)]),
    }
    for name, code in _embeddings(seed).items():
        attribute, values = _CATEGORICAL[name]
        raw[name] = code[values.index(getattr(scene, attribute))]
    return raw


def _raw_features(images: Iterable[np.ndarray], scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """Features before standardisation, [n, D] float64, columns as in `feature_slices`."""
    rows = []
    for image, scene in zip(images, scenes, strict=True):
        raw = _pixel_features(image) | _scene_features(scene, seed)
        rows.append(np.concatenate([raw[source.name] for source in SOURCES]))
    return np.stack(rows)


@functools.lru_cache(maxsize=4)
def reference_statistics(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], std [D] and covariance of the z-scores [D, D] over reference pictures.

    A fixed reference keeps the features of one picture independent of all other pictures.
    """
    rng = np.random.default_rng([seed, 2])
    scenes = [sample_scene(concept, rng) for concept in sample_concepts(N_REFERENCE, 0, seed)[0]]
    raw = _raw_features((render(scene, FEATURE_PX) for scene in scenes), scenes, seed)
    mean, std = raw.mean(axis=0), raw.std(axis=0)
    return mean, std, np.cov((raw - mean) / std, rowvar=False)


def brain_features(images: Iterable[np.ndarray], scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """What drives the simulated brain: z-scored features [n, D] float32.

    images: uint8 [H, W, 3] each, may be a generator; scenes: the ground truth, same order.
    """
    mean, std, _ = reference_statistics(seed)
    return ((_raw_features(images, scenes, seed) - mean) / std).astype(np.float32)
