"""Procedural pictures of one coloured shape on a patterned background.

A concept is a combination (shape, colour, background, pattern); pictures of one concept differ
in the place, size and rotation of the shape. Folders follow THINGS: `00001_<concept>/`.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

import util
from datafiles.stimuli import PARTITIONS
from rundirs.files import write_json

COLOURS = {  # sRGB, 0..255
    "red": (215, 35, 40),
    "orange": (255, 135, 0),
    "yellow": (250, 225, 40),
    "green": (35, 150, 55),
    "cyan": (50, 205, 220),
    "blue": (35, 65, 210),
    "purple": (125, 40, 165),
    "pink": (255, 150, 195),
    "brown": (115, 70, 35),
    "white": (245, 245, 245),
    "grey": (135, 135, 135),
    "black": (20, 20, 20),
}
PATTERNS = ("plain", "stripes", "checks", "dots", "rings", "waves")

MAX_ROTATION_RAD = 0.45  # small enough that a turned square is still no diamond
SIZE_RANGE = (0.40, 0.62)  # diameter of the shape's bounding circle / picture width
FOLDS = 8
HELD_OUT_FOLDS = {"test": 1, "validation": 0}  # folds of concepts that no world ever trains on
SUPERSAMPLING = 3  # each output pixel averages 3 x 3 samples, which is the antialiasing


@dataclass(frozen=True)
class Concept:
    """What all pictures of one folder share: names from SHAPES, COLOURS, COLOURS, PATTERNS."""

    shape: str
    colour: str
    background: str
    pattern: str

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.shape, SHAPES),
            (self.colour, COLOURS),
            (self.background, COLOURS),
            (self.pattern, PATTERNS),
        ):
            if value not in allowed:
                raise ValueError(f"unknown attribute {value!r}, choose from {sorted(allowed)}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} object on {self.background} would be invisible")


@dataclass(frozen=True)
class Scene(Concept):
    """One picture: a concept plus the place of its shape."""

    x: float  # centre, 0 = left edge, 1 = right edge
    y: float  # centre, 0 = top edge, 1 = bottom edge
    size: float  # diameter of the bounding circle / picture width
    rotation: float  # radians, clockwise on the screen


# --- shapes: polygons in a unit circle, x right, y down; later polygons are holes ---------------


def _disc(radius: float, x: float = 0.0, start: float = 0.0, stop: float = 2.0) -> np.ndarray:
    """Arc from start*pi to stop*pi as a polygon [64, 2]."""
    angles = np.linspace(start * math.pi, stop * math.pi, 64)
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _spokes(radii: list[float]) -> np.ndarray:
    """Polygon [len(radii), 2] with the given radii at equal angles, the first one on top."""
    angles = 2 * math.pi * np.arange(len(radii)) / len(radii) - math.pi / 2
    return np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 96)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 96)
    return np.stack([0.8 * np.sin(t) * np.sin(t / 2) ** 1.6, -np.cos(t)], axis=1)


def _flower() -> np.ndarray:
    petals = 0.72 + 0.27 * np.cos(6 * np.linspace(0, 2 * math.pi, 144, endpoint=False))
    return _spokes(petals.tolist())


def _points(*coordinates: tuple[float, float]) -> np.ndarray:
    return np.array(coordinates)


def _cross() -> np.ndarray:
    a, b = 0.94, 0.3
    return _points((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                   (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b))  # fmt: skip


def _arrow() -> np.ndarray:
    return _points((-0.95, -0.24), (0.1, -0.24), (0.1, -0.75), (1, 0),
                   (0.1, 0.75), (0.1, 0.24), (-0.95, 0.24))  # fmt: skip


def _lightning() -> np.ndarray:
    return _points((0.2, -0.97), (-0.6, 0.18), (-0.06, 0.18), (-0.28, 0.96),
                   (0.62, -0.26), (0.06, -0.26), (0.52, -0.85))  # fmt: skip


def _hourglass() -> np.ndarray:
    return _points((-0.7, -0.7), (0.7, -0.7), (0.12, 0), (0.7, 0.7), (-0.7, 0.7), (-0.12, 0))


def _chevron() -> np.ndarray:
    return _points((0, -0.62), (0.85, 0.18), (0.85, 0.72), (0, -0.08), (-0.85, 0.72),
                   (-0.85, 0.18))  # fmt: skip


SHAPES: dict[str, Callable[[], list[np.ndarray]]] = {
    "circle": lambda: [_disc(0.88)],
    "square": lambda: [_spokes([0.98] * 4) @ np.array([[1, 1], [-1, 1]]) / math.sqrt(2)],
    "triangle": lambda: [_spokes([1.0] * 3)],
    "diamond": lambda: [_points((0, -1), (0.55, 0), (0, 1), (-0.55, 0))],
    "star": lambda: [_spokes([1.0, 0.42] * 5)],
    "cross": lambda: [_cross()],
    "heart": lambda: [_heart()],
    "crescent": lambda: [_disc(0.95), _disc(0.78, x=0.42)],
    "ring": lambda: [_disc(0.95), _disc(0.55)],
    "arrow": lambda: [_arrow()],
    "drop": lambda: [_drop()],
    "flower": lambda: [_flower()],
    "lightning": lambda: [_lightning()],
    "half_disc": lambda: [_disc(0.98, start=0.0, stop=1.0) - np.array([0.0, 0.42])],
    "hourglass": lambda: [_hourglass()],
    "chevron": lambda: [_chevron()],
}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # attribute of a Concept -> its values
        "shape": tuple(SHAPES),
        "colour": tuple(COLOURS),
        "background": tuple(COLOURS),
        "pattern": PATTERNS,
    }
)
SHAPE_WORDS = {"half_disc": "half disc", "lightning": "lightning bolt"}  # others: own name


# --- words --------------------------------------------------------------------------------------


def concept_name(scene: Concept) -> str:
    """THINGS-like label without blanks, e.g. "red_star_on_blue_stripes"."""
    return f"{scene.colour}_{scene.shape}_on_{scene.background}_{scene.pattern}"


def scene_caption(scene: Concept) -> str:
    """Plain English, e.g. "a red star on blue stripes"; places are not mentioned."""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    thing = f"{article} {scene.colour} {SHAPE_WORDS.get(scene.shape, scene.shape)}"
    if scene.pattern == "plain":
        return f"{thing} on a plain {scene.background} background"
    return f"{thing} on {scene.background} {scene.pattern}"


# --- drawing ------------------------------------------------------------------------------------


def second_tone(colour: str) -> np.ndarray:
    """The other tone [3] float32 of a pattern: dark colours get lighter, light ones darker."""
    rgb = np.array(COLOURS[colour], dtype=np.float32)
    is_dark = rgb @ (0.299, 0.587, 0.114) < 110
    return rgb + 0.32 * (255 - rgb) if is_dark else 0.68 * rgb


def _pattern_samples(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Boolean [n, n]: where the second tone goes, from picture coordinates u, v in 0..1."""
    if pattern == "plain":
        return np.zeros(u.shape, dtype=bool)
    if pattern == "stripes":
        return ((u + v) * 6) % 1 < 0.5
    if pattern == "checks":
        return (np.floor(u * 6) + np.floor(v * 6)) % 2 == 1
    if pattern == "dots":
        row = np.floor(v * 7)
        return np.hypot((u * 7 + 0.5 * (row % 2)) % 1 - 0.5, (v * 7) % 1 - 0.5) < 0.3
    if pattern == "rings":
        return (np.hypot(u - 0.5, v - 0.5) * 10) % 1 < 0.5
    if pattern == "waves":
        return (v * 6 + 0.35 * np.sin(2 * math.pi * 2.5 * u)) % 1 < 0.5
    raise ValueError(f"unknown pattern {pattern!r}, choose from {PATTERNS}")


@functools.lru_cache(maxsize=32)
def _pattern_coverage(pattern: str, size_px: int) -> np.ndarray:
    """Share of the second tone per pixel, [size_px, size_px, 1] float32 in 0..1, read-only."""
    n = size_px * SUPERSAMPLING
    v, u = np.mgrid[0:n, 0:n].astype(np.float32) / n + 0.5 / n
    samples = _pattern_samples(pattern, u, v).astype(np.float32)
    blocks = samples.reshape(size_px, SUPERSAMPLING, size_px, SUPERSAMPLING)
    coverage = blocks.mean(axis=(1, 3))[:, :, None]
    coverage.setflags(write=False)  # shared by every caller through the cache
    return coverage


def object_coverage(scene: Scene, size_px: int = 256) -> np.ndarray:
    """Share of the object per pixel, [size_px, size_px] float32 in 0..1 (its soft mask)."""
    n = size_px * SUPERSAMPLING
    cos, sin = math.cos(scene.rotation), math.sin(scene.rotation)
    turn = np.array([[cos, sin], [-sin, cos]]) * (scene.size / 2 * n)
    centre = np.array([scene.x, scene.y]) * n
    canvas = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(canvas)
    for index, polygon in enumerate(SHAPES[scene.shape]()):
        draw.polygon([tuple(p) for p in polygon @ turn + centre], fill=0 if index else 255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def render(scene: Scene, size_px: int = 256) -> np.ndarray:
    """Draws a scene as uint8 [size_px, size_px, 3] sRGB; the same scene gives the same bytes."""
    first = np.array(COLOURS[scene.background], dtype=np.float32)
    step = second_tone(scene.background) - first
    picture = first + step * _pattern_coverage(scene.pattern, size_px)
    mask = object_coverage(scene, size_px)[:, :, None]
    picture += mask * (np.array(COLOURS[scene.colour], dtype=np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


# --- sampling -----------------------------------------------------------------------------------


class _Deck:
    """Deals the values of one attribute in shuffled rounds, so that all are equally frequent."""

    def __init__(self, values: list[str], rng: np.random.Generator) -> None:
        self.values, self.rng, self.cards = values, rng, []

    def deal(self, forbidden: Collection[str] = ()) -> str:
        """The next card that is not `forbidden`; a skipped card stays on top."""
        if all(card in forbidden for card in self.cards):
            self.cards += [self.values[i] for i in self.rng.permutation(len(self.values))]
        position = next(i for i, card in enumerate(self.cards) if card not in forbidden)
        return self.cards.pop(position)


def fold_of(concept: Concept) -> int:
    """A fixed 0 .. FOLDS - 1 of each concept, the same for every seed and world."""
    return zlib.crc32(concept_name(concept).encode()) % FOLDS


def _draw_concepts(n: int, folds: Collection[int], rng: np.random.Generator) -> list[Concept]:
    """n different concepts of these folds, every attribute value equally often."""
    values = (list(SHAPES), list(COLOURS), list(COLOURS), list(PATTERNS))
    shapes, colours, backgrounds, patterns = (_Deck(v, rng) for v in values)
    concepts: dict[Concept, None] = {}  # a dict is an ordered set
    while len(concepts) < n:
        colour = colours.deal()
        background = backgrounds.deal(forbidden=(colour,))
        shape = shapes.deal()
        whole = {pattern: Concept(shape, colour, background, pattern) for pattern in PATTERNS}
        taken = [p for p, c in whole.items() if c in concepts or fold_of(c) not in folds]
        if len(taken) < len(PATTERNS):
            concepts[whole[patterns.deal(forbidden=taken)]] = None
    return list(concepts)


def split_of(concept: Concept) -> str:
    """``training``, ``validation`` (for choosing settings) or ``test``."""
    return next(
        (name for name, fold in HELD_OUT_FOLDS.items() if fold_of(concept) == fold), "training"
    )


def sample_concepts(
    n_training: int, n_test: int, seed: int, split: str = "test"
) -> tuple[list, list]:
    """Draws disjoint lists of concepts; every single attribute value occurs in training.

    The second list comes from the fold of ``split`` and the first from folds that are no split's,
    whatever the seed and the numbers: what was trained on training concepts has never seen any
    world's test concept. Raises ``UserError`` where there are not as many, or too few to show all.
    """
    n_possible = len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1) * len(PATTERNS)
    most = n_possible // FOLDS // 2
    others = [fold for fold in range(FOLDS) if fold not in HELD_OUT_FOLDS.values()]
    bounds = {
        "--training_concepts": (n_training, len(SHAPES), most * len(others)),
        "--test_concepts": (n_test, 0, most),
    }
    for flag, (asked, low, high) in bounds.items():
        if not low <= asked <= high:
            why = "training shows every shape, and test concepts are new"
            raise util.UserError(flag, asked, f"{low} to {high}: {why}", "ask for as many")
    training = _draw_concepts(n_training, others, np.random.default_rng([seed, 0]))
    return training, _draw_concepts(
        n_test, [HELD_OUT_FOLDS[split]], np.random.default_rng([seed, 0, 1])
    )


def sample_scene(concept: Concept, rng: np.random.Generator) -> Scene:
    """Places the concept's shape somewhere entirely inside the picture."""
    size = float(rng.uniform(*SIZE_RANGE))
    x, y = rng.uniform(size / 2, 1 - size / 2, size=2).tolist()
    rotation = float(rng.uniform(-MAX_ROTATION_RAD, MAX_ROTATION_RAD))
    return Scene(
        concept.shape, concept.colour, concept.background, concept.pattern,
        x=x, y=y, size=size, rotation=rotation,
    )  # fmt: skip


# --- files --------------------------------------------------------------------------------------


def plan_scenes(
    n_training_concepts: int,
    images_per_concept: int,
    n_test_concepts: int,
    seed: int,
    split: str = "test",
) -> dict[str, dict[str, Scene]]:
    """{"training" | "test": {path relative to the stimulus root: scene}}, in sorted path order.

    Each picture has its own seed, so asking for more pictures never changes the earlier ones.
    Raises ``UserError`` for numbers that this world cannot have.
    """
    if not 1 <= images_per_concept <= 99:
        raise util.UserError(
            "--images_per_concept", images_per_concept,
            "1 to 99: file names have two digits", "ask for fewer",
        )  # fmt: skip
    training, test = sample_concepts(n_training_concepts, n_test_concepts, seed, split)
    jobs = {"training": (training, images_per_concept), "test": (test, 1)}
    plan: dict[str, dict[str, Scene]] = {}
    for code, (partition, (concepts, n_images)) in enumerate(jobs.items(), 1):
        plan[partition] = {}
        for number, concept in enumerate(concepts, 1):
            name = concept_name(concept)
            for image in range(1, n_images + 1):
                path = f"{partition}_images/{number:05d}_{name}/{name}_{image:02d}.png"
                rng = np.random.default_rng([seed, code, number, image])
                plan[partition][path] = sample_scene(concept, rng)
    return plan


def _check_no_strangers(root: Path, expected: set[str]) -> None:
    """Foreign pictures would shift the sorted listing against the EEG rows: refuse them."""
    for partition in PARTITIONS:
        for path in sorted((root / f"{partition}_images").glob("*/*")):
            if path.relative_to(root).as_posix() not in expected:
                raise util.DataError(
                    path, "a picture of another world", "only this world's", "name an empty folder"
                )


def write_stimuli(
    root: Path, plan: Mapping[str, Mapping[str, Scene]], seed: int
) -> dict[str, list[Scene]]:
    """Writes 256 px PNG files, captions.json and scenes.json of ``plan_scenes(..., seed)``.

    Returns the scenes in sorted order. Raises ``DataError`` beside another world's pictures.
    """
    scenes = {path: scene for part in plan.values() for path, scene in part.items()}
    _check_no_strangers(root, set(scenes))
    for path, scene in scenes.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene)).save(root / path)
    write_json(
        root / "captions.json", {path: scene_caption(scene) for path, scene in scenes.items()}
    )
    note = "SIMULATED: procedural pictures drawn by miniworld.pictures, no photographs"
    truth = {path: asdict(scene) for path, scene in scenes.items()}
    write_json(root / "scenes.json", {"note": note, "seed": seed, "scenes": truth})
    return {partition: list(part.values()) for partition, part in plan.items()}
