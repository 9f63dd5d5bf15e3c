"""Throughput of stage 1 beside the bare forward pass of its CLIP, side by side in one run.

    python benchmarks/features.py --pictures FOLDER --json features.json

"features_vs_forward": pictures per second of stage 1, from files to features on disk, against the
same model on the same crops, made before, in the same batches. The weights are random, which costs
the same. Counted from the first batch that CLIP gets: how long that takes is told beside it, once
per run and not per picture. The forward pass and the processes that make superpixels need cores of
their own: on a CPU set OMP_NUM_THREADS to the cores less --num_workers. Where other programs run,
the CPU time of stage 1's own process tells what it costs beside the forward pass.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import args
import clip_feature_extractor as stage
import util
from datafiles.stimuli import Stimulus
from features.clip import Clip, adjusted, model_name
from features.pieces import Piece, encode, next_crops
from features.views import VISUAL, PictureViews, Views
from miniworld import renders
from rundirs.environment import environment
from rundirs.files import write_json
from rundirs.tensors import load_tensors


@dataclass(frozen=True)
class Work:
    """What both sides encode."""

    clip: Clip
    stimuli: Sequence[Stimulus]
    views: Views
    batch_size: int
    num_workers: int


def random_clip(name: str, precision: str, device: torch.device) -> Clip:
    """An open_clip model without weights to load."""
    import open_clip

    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that the weights are random
    name = model_name(name)
    model, _, transform = open_clip.create_model_and_transforms(name, device=device)
    clip = Clip(
        model.eval(), transform, open_clip.get_tokenizer(name), {"model": name, "weights": "random"}
    )
    return adjusted(clip, blur_px=0.0, precision=precision)


def prepared(work: Work) -> tuple[torch.Tensor, float]:
    """(crops [N, visual, 3, S, S], median seconds of CPU per picture), made in this process."""
    made, seconds = [], []
    pictures = PictureViews(work.stimuli, work.clip.transform, work.views)
    for row in range(len(pictures)):
        started = time.process_time()
        made.append(pictures[row])
        seconds.append(time.process_time() - started)
    return torch.stack(next_crops(iter(made), len(made))), statistics.median(seconds)


def wait(device: torch.device) -> float:
    """The time when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Timed:
    """Seconds of encoding all pictures, and the features float32 [N, visual, D]."""

    clock: float
    cpu: float  # of this process
    features: torch.Tensor
    until_first: float = 0.0  # by the clock, before it


@torch.no_grad()
def bare(work: Work, crops: torch.Tensor) -> Timed:
    """The model alone."""
    device = work.clip.device
    batches = [part.flatten(0, 1).to(device) for part in crops.split(work.batch_size)]
    started, cpu = wait(device), time.process_time()
    with work.clip.products():
        encoded = [work.clip.model.encode_image(batch, normalize=False) for batch in batches]
    clock, cpu = wait(device) - started, time.process_time() - cpu
    return Timed(clock, cpu, torch.cat(encoded).float().unflatten(0, crops.shape[:2]).cpu())


def whole(work: Work, folder: Path) -> Timed:
    """Stage 1, from files to a file of features, from CLIP's first batch on."""
    started, first = time.perf_counter(), []
    hook = work.clip.model.visual.register_forward_pre_hook(
        lambda *_: first.append((time.perf_counter(), time.process_time()))
    )
    piece = Piece(folder / "pictures.safetensors", stimuli=work.stimuli)
    encode(work.clip, [piece], work.views, work.batch_size, work.num_workers)
    ended, cpu = time.perf_counter(), time.process_time()
    hook.remove()
    features = load_tensors(piece.path)[0]
    visual = torch.stack([features[name] for name in VISUAL], dim=1)
    clock, cpu_before = first[0]
    return Timed(ended - clock, cpu - cpu_before, visual, clock - started)


def features_vs_forward(work: Work, folder: Path, repeats: int) -> dict[str, Any]:
    """Pictures per second, both sides in turn. SystemExit if the features differ."""
    crops, preparing = prepared(work)
    bare(work, crops[: work.batch_size])  # first calls
    pairs = []
    for _ in range(repeats):
        alone, ours = bare(work, crops), whole(work, folder)
        pairs.append((alone, ours))
        if not torch.equal(ours.features, alone.features):
            apart = float((ours.features - alone.features).abs().max())
            raise SystemExit(f"stage 1 and its model alone differ by {apart}")
    n = len(work.stimuli)
    forward, stage_1 = (
        statistics.median(one.clock for one in side) for side in zip(*pairs, strict=True)
    )
    cpu, stage_1_cpu = (
        statistics.median(one.cpu for one in side) for side in zip(*pairs, strict=True)
    )
    return {
        "ours": n / stage_1, "baseline": n / forward,
        "ratio": forward / stage_1, "unit": "pictures/s", "n": repeats,
        "pictures": n, "crops_per_picture": crops.shape[1], "batch_size": work.batch_size,
        "model": work.clip.identity["model"], "precision": str(work.clip.dtype or torch.float32),
        "device": str(work.clip.device), "num_workers": work.num_workers,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "prepare_s_per_picture": preparing, "forward_s_per_picture": forward / n,
        "processes_per_forward": math.ceil(preparing * n / forward),
        "until_first_batch_s": statistics.median(ours.until_first for _, ours in pairs),
        "ratio_of_each_repeat": [alone.clock / ours.clock for alone, ours in pairs],
        "ratio_of_cpu": cpu / stage_1_cpu,
    }  # fmt: skip


def told(row: Mapping[str, Any]) -> str:
    each = " ".join(f"{ratio:.2f}" for ratio in row["ratio_of_each_repeat"])
    return f"""| what | ours | bare forward | ratio | unit | N |
|---|---|---|---|---|---|
| features_vs_forward | {row["ours"]:.3f} | {row["baseline"]:.3f} | {row["ratio"]:.3f} \
| {row["unit"]}, median | {row["n"]} |

{row["model"]}, {row["precision"]}, {row["device"]}: {row["pictures"]} pictures of \
{row["crops_per_picture"]} crops, {row["batch_size"]} at once, same features. Each repeat: {each}.
Making a picture's crops takes {row["prepare_s_per_picture"]:.3f} s of a core, encoding them \
{row["forward_s_per_picture"]:.3f} s:
{row["processes_per_forward"]} process(es) keep up with the model; here {row["num_workers"]}, and \
{row["threads"]} thread(s) for the model, on {row["cores"]} cores.
Until the first batch, once per run: {row["until_first_batch_s"]:.1f} s. \
CPU time of the model alone / of stage 1's own process: {row["ratio_of_cpu"]:.3f}."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = args.STAGES["features"]().actions()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--json", type=Path, help="also write the row here")
    add("--pictures", type=Path, metavar="FOLDER", help="photos; default: rendered ones")
    add("--n", type=int, default=24, metavar="N", help="pictures (default: %(default)s)")
    add("--size", type=int, default=flags["superpixel_size"].default, metavar="PX",
        help="of superpixels (default: %(default)s)")  # fmt: skip
    add("--clip_model", default="ViT-B-16", metavar="NAME|JSON", help="(default: %(default)s)")
    add("--precision", choices=flags["precision"].choices, default=flags["precision"].default,
        help="(default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help="(default: %(default)s)")
    add("--batch_size", type=int, default=4, metavar="N", help="(default: %(default)s)")
    add("--num_workers", type=int, default=stage.default_workers(), metavar="N",
        help="processes (default: %(default)s)")  # fmt: skip
    add("--repeats", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of rendered pictures (default: %(default)s)")
    given = parser.parse_args(argv)
    if min(given.n, given.size, given.batch_size, given.repeats) < 1 or given.num_workers < 0:
        parser.error("all numbers from 1, --num_workers from 0")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    clip = random_clip(given.clip_model, given.precision, util.pick_device(given.device))
    with tempfile.TemporaryDirectory() as folder:
        stimuli = renders.picture_files(
            given.pictures, given.n, given.size, Path(folder), given.seed
        )
        work = Work(clip, stimuli, Views(given.size), given.batch_size, given.num_workers)
        row = features_vs_forward(work, Path(folder), given.repeats)
    print(told(row))
    if given.json:
        write_json(given.json, {"rows": {"features_vs_forward": row}, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
