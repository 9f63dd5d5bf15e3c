"""Pictures to train the miniatures on, drawn once and kept as arrays; never a test concept.

``training``: concepts of every fold but two. ``validation``: a fold of its own, for choosing.
``test``: what ``python -m miniworld --test_concepts 200`` shows; for the final measurement only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import superpixel
import util
from miniworld import pictures

SIZE_PX = 128  # of the miniature SDXL
CLIP_PX = 64
SUPERPIXEL_SHARE = 10  # one picture in this many is also kept as superpixels
SCENES = 2  # pictures of each training concept: they differ in the shape's place
VALIDATION_FOLD = 0
SPLITS = ("validation", "test")


@functools.cache
def concepts(split: str) -> tuple[pictures.Concept, ...]:
    """Concepts of ``training`` (all folds but two, shuffled), ``validation`` or ``test`` (200)."""
    if split == "test":
        return tuple(pictures.sample_concepts(len(pictures.SHAPES), 200, seed=0)[1])
    parts = itertools.product(
        pictures.SHAPES, pictures.COLOURS, pictures.COLOURS, pictures.PATTERNS
    )
    every = [pictures.Concept(*part) for part in parts if part[1] != part[2]]
    kept = [
        concept
        for concept in every
        if (pictures.fold_of(concept) == VALIDATION_FOLD) == (split == "validation")
        and pictures.fold_of(concept) != pictures.TEST_FOLD
    ]
    order = util.numpy_generator_for(0, "concepts", split).permutation(len(kept))
    return tuple(kept[i] for i in order)


def training_scenes(n: int, seed: int) -> list[pictures.Scene]:
    """Scenes 2i and 2i + 1 show the same concept at two places; concepts repeat after all."""
    chosen = itertools.islice(itertools.cycle(concepts("training")), -(-n // SCENES))
    each = [concept for concept in chosen for _ in range(SCENES)]
    return [
        pictures.sample_scene(concept, util.numpy_generator_for(seed, "scene", number))
        for number, concept in enumerate(each[:n])
    ]


def unseen_scenes(split: str, n: int, seed: int) -> list[pictures.Scene]:
    """One scene of each of the first n concepts of ``validation`` or ``test``."""
    return [
        pictures.sample_scene(concept, util.numpy_generator_for(seed, split, number))
        for number, concept in enumerate(concepts(split)[:n])
    ]


def shrunk(picture: np.ndarray, size_px: int = CLIP_PX) -> np.ndarray:
    """uint8 [H, W, 3] -> [size_px, size_px, 3], bicubic as open_clip's own transform."""
    small = Image.fromarray(picture).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(small)


def clip_views(picture: np.ndarray) -> np.ndarray:
    """The superpixel versions as CLIP sees them: uint8 [levels, CLIP_PX, CLIP_PX, 3].

    Segmented at the picture's own size, where the stages take superpixel.SIZE_PX: a tenth of the
    time, and nearly the same at CLIP_PX.
    """
    return np.stack([shrunk(level) for level in superpixel.superpixels(picture).values()])


def cached(path: Path, what: str, make: Callable, items: Sequence) -> np.ndarray:
    """np.stack of ``make(item)``, from ``path`` if it is there, else made and written."""
    from tqdm import tqdm

    if path.exists():
        return np.load(path, mmap_mode="r")
    made = np.stack([make(item) for item in tqdm(items, desc=what, unit="picture")])
    with util.atomic_write(path, "wb") as file:
        np.save(file, made)
    return made


class Renders:
    """Training pictures of a run, made on first use and kept in ``folder``."""

    def __init__(self, folder: Path, n: int, seed: int) -> None:
        self.folder, self.scenes = folder, training_scenes(n, seed)

    def __len__(self) -> int:
        return len(self.scenes)

    @functools.cached_property
    def captions(self) -> list[str]:
        return [pictures.caption(scene) for scene in self.scenes]

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """uint8 [n, 128, 128, 3]."""
        path = self.folder / "pictures.npy"
        return cached(path, "rendering", lambda scene: pictures.render(scene, SIZE_PX), self.scenes)

    @functools.cached_property
    def small(self) -> np.ndarray:
        """As CLIP and the judge see them: uint8 [n, 64, 64, 3]."""
        return cached(self.folder / "small.npy", "shrinking", shrunk, self.whole)

    @functools.cached_property
    def superpixels(self) -> np.ndarray:
        """Of the first n / SUPERPIXEL_SHARE pictures: uint8 [., levels, 64, 64, 3]."""
        first = self.whole[: max(SCENES, len(self) // SUPERPIXEL_SHARE)]
        return cached(self.folder / "superpixels.npy", "superpixels", clip_views, first)
