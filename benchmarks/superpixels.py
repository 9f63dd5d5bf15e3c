"""Speed of the superpixels beside their first implementation, and on two processes.

    python benchmarks/superpixels.py --pictures FOLDER --json superpixels.json

Without --pictures, renders of the miniature world are segmented. "superpixels_one_process": all
three levels of a picture against scikit-image's SLIC of each level and a loop over one mask per
segment, in seconds of CPU, so that other programs count for little. "superpixels_two_processes":
stage 1's own loader, from file to crops, with two processes against one; by the clock, which needs
two idle cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import args
from datafiles import superpixel
from datafiles.pictures import read_picture
from datafiles.stimuli import Stimulus
from features.views import PictureViews, Views
from miniworld import renders
from modalities import MODALITIES, Slic
from rundirs.environment import environment
from rundirs.files import write_json

CROP_PX = 224
PROCESSES = (2, 1)  # ours, baseline
BATCH = 8  # how far the loader is ahead: two of these
AGREEMENT = 0.999  # of the pixels' labels, at least
LEVELS: Mapping[str, Slic] = {m.name: m.slic for m in MODALITIES if m.slic is not None}


# ---------------------------------------------------------------- one process


def plain_labels(rgb: np.ndarray, level: Slic) -> np.ndarray:
    """scikit-image's own way from uint8 [H, W, 3] to int [H, W]."""
    from skimage.segmentation import slic

    return slic(
        rgb,
        n_segments=level.n_segments,
        compactness=level.compactness,
        sigma=superpixel.SIGMA_PX,
        min_size_factor=superpixel.MIN_SIZE_FACTOR,
        max_size_factor=superpixel.MAX_SIZE_FACTOR,
        start_label=0,
    )


def first_implementation(rgb: np.ndarray) -> dict[str, np.ndarray]:
    """Each level by itself, a mask per segment; the texture by scipy where that took OpenCV."""
    from skimage.color import rgb2lab

    made = {}
    for name, level in LEVELS.items():
        labels = plain_labels(rgb, level)
        grain = superpixel.texture(rgb2lab(rgb))
        filled = np.zeros(rgb.shape)
        for label in np.unique(labels):
            mask = labels == label
            bright = 1 + level.texture_gain * grain[mask]
            filled[mask] = rgb[mask].mean(axis=0) / 255 * bright[:, None]
        made[name] = np.rint(np.clip(filled, 0, 1) * 255).astype(np.uint8)
    return made


def agreement(rgb: np.ndarray) -> float:
    """Share of pixels whose label is scikit-image's, of the level where it is least."""
    from skimage.color import rgb2lab

    lab = superpixel.smooth_lab(rgb, rgb2lab(rgb))
    return min(
        float((superpixel.segment(lab, level) == plain_labels(rgb, level)).mean())
        for level in LEVELS.values()
    )


def levels_apart(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> int:
    """Largest difference of a pixel, of 255."""
    return max(int(np.abs(ours[name].astype(int) - theirs[name]).max()) for name in LEVELS)


def one_process(stimuli: Sequence[Stimulus], size_px: int, repeats: int) -> dict[str, Any]:
    """Seconds of CPU per picture; both sides in turn. SystemExit if they segment differently."""
    from tqdm import tqdm

    loaded = [read_picture(item.path) for item in stimuli]
    shown = [superpixel.at_slic_size(picture, size_px) for picture in loaded]
    agreed = [agreement(rgb) for rgb in tqdm(shown, desc="comparing", leave=False)]
    if min(agreed) < AGREEMENT:
        raise SystemExit(f"labels agree in {min(agreed):.4%} of the pixels, less than {AGREEMENT}")
    sides: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
        "ours": superpixel.superpixels,
        "baseline": first_implementation,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    apart = []
    for rgb in tqdm(shown * repeats, desc="one process", leave=False):
        made = {}
        for name, side in sides.items():
            started = time.process_time()
            made[name] = side(rgb)
            seconds[name].append(time.process_time() - started)
        apart.append(levels_apart(made["ours"], made["baseline"]))
    ours, baseline = (statistics.median(seconds[name]) for name in sides)
    return {
        "ours": ours, "baseline": baseline, "ratio": baseline / ours,
        "unit": "CPU s per picture", "n": len(seconds["ours"]), "pictures": len(stimuli),
        "size_px": size_px, "labels_agree_least": min(agreed),
        "labels_agree_mean": statistics.mean(agreed), "largest_difference_of_255": max(apart),
        "slic_share_of_ours": slic_seconds(shown) / ours,
    }  # fmt: skip


def slic_seconds(shown: Sequence[np.ndarray]) -> float:
    """Of CPU, for scikit-image's SLIC of the three levels alone."""
    found = []
    for rgb in shown:
        lab = superpixel.smooth_lab(rgb)
        started = time.process_time()
        for level in LEVELS.values():
            superpixel.segment(lab, level)
        found.append(time.process_time() - started)
    return statistics.median(found)


# ---------------------------------------------------------------- two processes


def crops_made(stimuli: Sequence[Stimulus], size_px: int, processes: int) -> tuple[float, float]:
    """(seconds by the clock, seconds of CPU of the processes) per picture, from file to crops."""
    from open_clip import image_transform

    loader = PictureViews(stimuli, image_transform(CROP_PX, is_train=False), Views(size_px)).ahead(
        BATCH, processes
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    for item in loader:
        if isinstance(item, str):
            raise SystemExit(item)
    taken = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # they have ended with the loop
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken / len(stimuli), cpu / len(stimuli)


def two_processes(stimuli: Sequence[Stimulus], size_px: int, repeats: int) -> dict[str, Any]:
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in PROCESSES}
    for _ in range(repeats):
        for number in PROCESSES:
            found[number].append(crops_made(stimuli, size_px, number))
    (ours, ours_cpu), (baseline, baseline_cpu) = (
        (statistics.median(column) for column in zip(*found[number], strict=True))
        for number in PROCESSES
    )
    return {
        "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": "s per picture",
        "n": repeats, "pictures": len(stimuli), "ours_cpu": ours_cpu,
        "baseline_cpu": baseline_cpu, "cores": os.cpu_count(),
        "ratio_of_each_repeat": [
            one[0] / two[0]
            for two, one in zip(*(found[number] for number in PROCESSES), strict=True)
        ],
    }  # fmt: skip


# ---------------------------------------------------------------- the table


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what | ours | baseline | times faster | unit | N |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['ours']:.3f} | {row['baseline']:.3f} | {row['ratio']:.2f} "
        f"| {row['unit']}, median | {row['n']} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def notes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    one, two = rows.values()
    each = " ".join(f"{ratio:.2f}" for ratio in two["ratio_of_each_repeat"])
    return f"""Labels as scikit-image's in at least {one["labels_agree_least"]:.3%} of a level's \
pixels, {one["labels_agree_mean"]:.4%} on average;
pictures at most {one["largest_difference_of_255"]} of 255 apart. SLIC itself is \
{one["slic_share_of_ours"]:.0%} of our time.
Two processes, ratio of each repeat: {each}; CPU per picture {two["ours_cpu"]:.3f} s, alone \
{two["baseline_cpu"]:.3f} s; {two["cores"]} cores."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    size = args.STAGES["features"]().actions()["superpixel_size"].default
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--json", type=Path, help="also write the rows here")
    add("--pictures", type=Path, metavar="FOLDER", help="photos; default: rendered ones")
    add("--n", type=int, default=8, metavar="N", help="pictures (default: %(default)s)")
    add("--size", type=int, default=size, metavar="PX", help="(default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of rendered pictures (default: %(default)s)")
    given = parser.parse_args(argv)
    if min(given.n, given.size, given.repeats) < 1:
        parser.error("--n, --size and --repeats from 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    with tempfile.TemporaryDirectory() as made:
        stimuli = renders.picture_files(given.pictures, given.n, given.size, Path(made), given.seed)
        rows = {
            "superpixels_one_process": one_process(stimuli, given.size, given.repeats),
            "superpixels_two_processes": two_processes(stimuli, given.size, given.repeats),
        }
    print(table(rows))
    print(notes(rows))
    if given.json:
        write_json(given.json, {"rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
