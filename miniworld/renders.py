"""Pictures to train the miniatures on, drawn once and kept as arrays; never a test concept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

import util
from datafiles import superpixel
from datafiles.stimuli import PICTURES, Stimulus
from miniworld import models, pictures
from rundirs.files import atomic_write, json_hash

SUPERPIXEL_SHARE = 10  # one picture in this many is also kept as superpixels
SHAPE_SHARE = 0.75  # of near misses
CAMERA_NOISE = 3.0  # of 255, standard deviation
SCENES = 2  # pictures of each training concept: they differ in the shape's place
POSES = {"place": ("x", "y"), "size": ("size",), "rotation": ("rotation",)}


@functools.cache
def training_concepts() -> tuple[pictures.Concept, ...]:
    """All concepts that are no split's, shuffled."""
    parts = itertools.product(*pictures.ATTRIBUTES.values())
    every = [pictures.Concept(*part) for part in parts if part[1] != part[2]]
    kept = [concept for concept in every if pictures.split_of(concept) == "training"]
    order = util.numpy_generator_for(0, "concepts", "training").permutation(len(kept))
    return tuple(kept[i] for i in order)


def near_miss(concept: pictures.Concept, random: np.random.Generator) -> pictures.Concept:
    """A training concept that differs in one attribute: mostly shape, the hardest to see."""
    values = pictures.ATTRIBUTES
    own = {name: getattr(concept, name) for name in values}
    while True:
        hard = random.random() < SHAPE_SHARE
        name = "shape" if hard else tuple(values)[random.integers(len(values))]
        changed = own | {name: values[name][random.integers(len(values[name]))]}
        if changed != own and changed["colour"] != changed["background"]:
            made = pictures.Concept(**changed)
            if pictures.split_of(made) == "training":
                return made


def rival(scene: pictures.Scene, random: np.random.Generator) -> pictures.Scene:
    """The scene with one thing changed: half the time an attribute, else place, size or rotation.

    Where an embedding does not tell a picture from its rival, a generator has to guess.
    """
    changed = asdict(scene)
    if random.random() < 0.5:
        changed |= asdict(near_miss(scene, random))
    else:
        drawn = asdict(pictures.sample_scene(scene, random))
        names = tuple(POSES.values())[random.integers(len(POSES))]
        changed |= {name: drawn[name] for name in names}
        inside = changed["size"] / 2
        changed |= {name: min(max(changed[name], inside), 1 - inside) for name in POSES["place"]}
    return pictures.Scene(**changed)


def shrunk_render(scene: pictures.Scene) -> np.ndarray:
    """A picture as CLIP sees it: uint8 [64, 64, 3]."""
    return shrunk(pictures.render(scene, models.SIZE_PX))


def training_scenes(n: int, seed: int) -> list[pictures.Scene]:
    """Scenes 2i and 2i + 1 show the same concept at two places; concepts repeat after all."""
    chosen = itertools.islice(itertools.cycle(training_concepts()), -(-n // SCENES))
    each = [concept for concept in chosen for _ in range(SCENES)]
    return [
        pictures.sample_scene(concept, util.numpy_generator_for(seed, "scene", number))
        for number, concept in enumerate(each[:n])
    ]


def unseen_scenes(split: str, n: int, seed: int) -> list[pictures.Scene]:
    """One scene of each of n concepts of ``validation`` or ``test``, as a world would show them."""
    plan = pictures.plan_scenes(len(pictures.SHAPES), 1, n, seed, split)
    return list(plan["test"].values())


def picture_files(
    folder: Path | None, n: int, size_px: int, made: Path, seed: int
) -> list[Stimulus]:
    """For benchmarks: the first n pictures below ``folder``; without it, renders in ``made``.

    These have a camera's noise: in areas of one colour, SLIC has ties. Raises DataError if
    ``folder`` has fewer.
    """
    if folder is not None:
        found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
        if len(found) < n:
            raise util.DataError(
                folder, f"{len(found)} pictures", f"{n} or more", "name another folder"
            )
        return [Stimulus(str(file.relative_to(folder)), file) for file in found[:n]]
    stimuli = [Stimulus(f"{row:03d}.png", made / f"{row:03d}.png") for row in range(n)]
    for stimulus, scene in zip(stimuli, unseen_scenes("test", n, seed), strict=True):
        noise = util.numpy_generator_for(seed, "noise", stimulus.key)
        noisy = noise.normal(pictures.render(scene, size_px), CAMERA_NOISE).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(stimulus.path)
    return stimuli


def shrunk(picture: np.ndarray, size_px: int = models.CLIP_PX) -> np.ndarray:
    """uint8 [H, W, 3] -> [size_px, size_px, 3], bicubic as open_clip's own transform."""
    small = Image.fromarray(picture).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(small)


def clip_views(picture: np.ndarray) -> np.ndarray:
    """The superpixel versions as CLIP sees them: uint8 [levels, 64, 64, 3].

    Segmented at the picture's own size, where the stages take superpixel.SIZE_PX: a tenth of the
    time, and nearly the same at 64 px.
    """
    return np.stack([shrunk(level) for level in superpixel.superpixels(picture).values()])


def cached(path: Path, what: str, make: Callable, items: Sequence) -> np.ndarray:
    """np.stack of ``make(item)``, from ``path`` if it is there, else made and written."""
    from rundirs.progress import Progress

    if not path.exists():
        with ProcessPoolExecutor() as workers:
            made = workers.map(make, items, chunksize=16)
            rows = np.stack(list(Progress(made, desc=what, total=len(items), unit="picture")))
        with atomic_write(path, "wb") as file:
            np.save(file, rows)
    return np.load(path, mmap_mode="r")


class Renders:
    """Training pictures of a run, made on first use and kept in ``folder`` under their own hash."""

    def __init__(self, folder: Path, n: int, seed: int) -> None:
        self.scenes = training_scenes(n, seed)
        key = json_hash([asdict(scene) for scene in self.scenes])
        self.folder = folder / key[:12]

    def __len__(self) -> int:
        return len(self.scenes)

    @functools.cached_property
    def captions(self) -> list[str]:
        return [pictures.scene_caption(scene) for scene in self.scenes]

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """uint8 [n, 128, 128, 3]."""
        path = self.folder / "pictures.npy"
        render = functools.partial(pictures.render, size_px=models.SIZE_PX)
        return cached(path, "rendering", render, self.scenes)

    @functools.cached_property
    def small(self) -> np.ndarray:
        """As CLIP and the judge see them: uint8 [n, 64, 64, 3]."""
        return cached(self.folder / "small.npy", "shrinking", shrunk, self.whole)

    @functools.cached_property
    def rival_scenes(self) -> list[pictures.Scene]:
        return [
            rival(scene, util.numpy_generator_for(0, "rival", number))
            for number, scene in enumerate(self.scenes)
        ]

    @functools.cached_property
    def rivals(self) -> np.ndarray:
        """A rival of each picture as CLIP sees it: uint8 [n, 64, 64, 3]."""
        key = json_hash([asdict(scene) for scene in self.rival_scenes])
        path = self.folder / f"rivals-{key[:12]}.npy"  # their own hash: the rule may change
        return cached(path, "rivals", shrunk_render, self.rival_scenes)

    @functools.cached_property
    def superpixels(self) -> np.ndarray:
        """Of the first n / SUPERPIXEL_SHARE pictures: uint8 [., levels, 64, 64, 3]."""
        first = self.whole[: max(SCENES, len(self) // SUPERPIXEL_SHARE)]
        return cached(self.folder / "superpixels.npy", "superpixels", clip_views, first)
