"""The whole chain on the embedded miniature world, by the public command lines. CPU, no downloads.

The EEG is SIMULATED: the demo shows that every stage works and that stimuli can be told apart from
the simulated EEG, not how well real brains are decoded.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("demo")

import util
from miniworld import judge, models, quality
from rundirs.closing import IN_CHAIN, flags
from rundirs.files import atomic_write
from util import CHECKOUT

SUBJECT = "sub-01"
AVERAGED = (1, 2, 5, 10, 20)  # of the world's 20 test repetitions
PRIOR_STEPS = 10  # half of the default, for time
PRIOR_DRAWS = 32  # four times the default: miniature priors are quick
TIME_WINDOW_S = (0.0, 0.6)  # after it, the simulated brain is silent
# the 17 posterior channels of the published 100 Hz files: a linear classifier reads as much of the
# picture from them as from all 63 simulated ones, and the encoder's work is a quarter
POSTERIOR_CHANNELS = (
    "Pz", "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8",
    "POz", "PO3", "PO4", "PO7", "PO8", "O1", "Oz", "O2",
)  # fmt: skip
DRAWN_CONTROLS = ("shuffled_eeg", "true_embedding")  # drawn, too: chance and a perfect decoder
REPORT = "report.html"
SUPERPIXEL_PX = 128  # half the pictures' own size: a quarter of the time, and CLIP sees 64


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    subjects: int
    training_concepts: int
    images_per_concept: int
    test_concepts: int
    epochs: int
    drawn: int  # stimuli
    seconds: tuple[int, ...]  # of each step, measured on two free cores
    training_repetitions: int = 2  # with as many trials, more pictures teach more
    test_repetitions: int | None = None  # the world's own, as of the signal-to-noise ratio
    snr: float | None = None


FULL = Scale(2, 500, 2, 200, 30, 12, (20, 45, 130, 20, 10, 8, 65, 7))
QUICK = Scale(1, 100, 2, 40, 30, 2, (15, 10, 20, 10, 8, 8, 15, 6))


def seen_from_here(path: Path) -> Path:
    """The path as the stages, which run in CHECKOUT, are to be given it."""
    return path if Path.cwd() == CHECKOUT else path.resolve()


def commands(
    out: Path, seed: int, scale: Scale, split: str = "test"
) -> list[tuple[str, list[str]]]:
    """(what it does, command after ``python``) of the stages up to a trained model."""
    data, weights = out / "world" / "data", models.Models(out / "world" / "models")
    world = flags(
        output_path=out / "world",
        subjects=scale.subjects,
        training_concepts=scale.training_concepts,
        images_per_concept=scale.images_per_concept,
        test_concepts=scale.test_concepts,
        training_repetitions=scale.training_repetitions,
        test_repetitions=scale.test_repetitions,
        snr=scale.snr,
        test_split=split,
        seed=seed,
    )
    features = flags(
        data_path=data,
        output_path=out / "clip_features",
        clip_model=weights.clip_config,
        clip_pretrained=weights.clip_checkpoint,
        captions=data / "captions.json",
        superpixel_size=SUPERPIXEL_PX,
        batch_size=32,
        num_workers=2,
        save_superpixels=True,
        device="cpu",
    )
    return [
        ("embedded world: pictures, simulated EEG, miniature models", ["-m", "miniworld", *world]),
        (
            "stage 1: five CLIP embeddings of every stimulus",
            ["clip_feature_extractor.py", *features],
        ),
        training(out, seed, scale),
    ]


def training(
    out: Path, seed: int, scale: Scale, name: str = "model", **more: object
) -> tuple[str, list[str]]:
    """Stage 2 into ``out/name``, with ``more`` of its flags."""
    of_the_prior = {"noise_draws": 2} if more.get("aligner", "prior") == "prior" else {}
    of_the_contrast = {"text_contrast": 0.5} if more.get("contrast_weight") != 0 else {}
    given = {
        "data_path": out / "world" / "data",
        "clip_feature_path": out / "clip_features",
        "output_dir": out / name,
        "channels": POSTERIOR_CHANNELS,
        "time_window": TIME_WINDOW_S,
        "epochs": scale.epochs,
        **of_the_prior,
        "contrast_weight": 0.3,
        **of_the_contrast,
        "val_every": 15,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "seed": seed,
        "device": "cpu",
    }
    what = f"stage 2: encoder and five priors, jointly ({name})"
    return what, ["train.py", *flags(**given | more)]


def drawing(
    out: Path, seed: int, drawn: int, name: str, mode: str, **more: object
) -> tuple[str, list[str]]:
    """Stage 3 into ``out/name``, with ``more`` of its flags."""
    data, weights = out / "world" / "data", models.Models(out / "world" / "models")
    given = {
        "eeg_data": data / "Preprocessed_data_250Hz" / SUBJECT,
        "model_path": out / "model",
        "sd_model_path": weights.sdxl,
        "ip_adapter_path": weights.ip_adapter,
        "clip_feature_path": out / "clip_features",
        "output_dir": out / name,
        "mode": mode,
        "size": models.SIZE_PX,
        "superpixel_size": SUPERPIXEL_PX,
        "max_stimuli": drawn,
        "prior_steps": PRIOR_STEPS,
        "prior_draws": PRIOR_DRAWS,
        "steps": 10,
        "guidance": 4.0,
        "batch_size": 22,
        "seed": seed,
        "device": "cpu",
    }
    return f"stage 3: pictures ({name})", ["generate.py", *flags(**given | more)]


def scoring(out: Path, seed: int, images: str, name: str, **more: object) -> tuple[str, list[str]]:
    """Stage 4 on the pictures in ``out/images``, into ``out/name``, with ``more`` of its flags."""
    given = {
        "model_path": out / "model",
        "data_path": out / "world" / "data",
        "clip_feature_path": out / "clip_features",
        "images": out / images,
        "prior_steps": PRIOR_STEPS,
        "prior_draws": PRIOR_DRAWS,
        "output_dir": out / name,
        "seed": seed,
        "device": "cpu",
    }
    return "stage 4: scores with controls", ["evaluate.py", *flags(**given | more)]


def reporting(out: Path) -> tuple[str, list[str]]:
    """Stage 5: one page of everything, ``out/report.html``."""
    runs = tuple(out / name for name in ("model", "images", *DRAWN_CONTROLS, "scores"))
    given = flags(runs=runs, output=out / REPORT)
    return "stage 5: one page to open from disk", ["report.py", *given]


def plan_of(out: Path, seed: int, scale: Scale) -> list[tuple[str, list[str]]]:
    """All stages, the controls and the report."""
    return [
        *commands(out, seed, scale),
        drawing(out, seed, scale.drawn, "images", "all"),
        *(
            drawing(out, seed, scale.drawn, control, "fused", control=control)
            for control in DRAWN_CONTROLS
        ),
        scoring(
            out,
            seed,
            "images",
            "scores",
            control_images=tuple(out / control for control in DRAWN_CONTROLS),
            occlusion=("channels", "time"),
            average=AVERAGED,
        ),
        reporting(out),
    ]


def run(plan: Sequence[tuple[str, list[str]]], seconds: Sequence[int] = ()) -> int:
    """Every stage in turn; finished ones answer at once. Stops at the first that fails.

    ``seconds``: that each is expected to take; the rest of them is told at the pace so far.
    """
    begun = time.monotonic()
    for number, (what, command) in enumerate(plan):
        left = f"; {time_left(seconds, number, time.monotonic() - begun)}" if seconds else ""
        head = f"[{number + 1}/{len(plan)}] {what}{left}"
        print(f"\n{head}\n$ python {shlex.join(command)}", flush=True)
        started = time.monotonic()
        code = subprocess.run(
            [sys.executable, *command], cwd=CHECKOUT, check=False, env=os.environ | {IN_CHAIN: "1"}
        ).returncode
        if code:
            print(f"stopped: this stage ended with exit code {code}", file=sys.stderr)
            return code
        print(f"[{time.monotonic() - started:.0f} s]", flush=True)
    return 0


def time_left(seconds: Sequence[int], number: int, spent: float) -> str:
    """In words, before the step of a number: the expected rest, slower where it has been slower."""
    pace = max(1.0, spent / sum(seconds[:number])) if number else 1.0
    left = pace * sum(seconds[number:])
    return f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"


def judged(out: Path, seed: int) -> str:
    """What the judge, a classifier for scoring only, sees in the drawn pictures."""
    model = judge.load(models.Models(out / "world" / "models").judge)
    data = out / "world" / "data"
    runs = ("images", *DRAWN_CONTROLS)
    found = {name: quality.judged_run(model, out / name, data) for name in runs}
    rows = found["images"] | {f"fused, {name}": found[name]["fused"] for name in DRAWN_CONTROLS}
    return (
        "Attributes of the stimulus that an independent judge finds in the picture drawn from "
        f"simulated EEG; mean [95 % bootstrap], seed {seed}\n\n" + quality.judge_table(rows, seed)
    )


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage in turn, then say what the pictures show and where to look."""
    values = args.resolve("demo", argv).values
    named = values.output_path or Path("demo_output_quick" if values.quick else "demo_output")
    out = seen_from_here(named)
    scale = QUICK if values.quick else FULL
    plan = plan_of(out, values.seed, scale)
    if values.dry_run:
        print("\n".join(f"python {shlex.join(command)}" for _, command in plan))
        return 0
    print("The EEG here is SIMULATED; nothing below was measured on a person.")
    minutes = sum(scale.seconds) / 60
    print(f"{len(plan)} steps, about {minutes:.0f} minutes on two free cores; a second call does")
    print("only what is not finished.", flush=True)
    if code := run(plan, scale.seconds):
        return code
    table = judged(out, values.seed)
    with atomic_write(out / "scores" / "judge.md") as file:
        file.write(table)
    elsewhere = drawing(out, values.seed, 12, "uniform", "all", injection="uniform")
    print(
        f"\n{table}\nOpen in a browser\n"
        f"  {out / REPORT}   pictures, scores, controls, what the encoder reads\n"
        "Look at\n"
        f"  {out / 'images' / 'overview.png'}   stimulus and all recipes, side by side\n"
        f"  {out / 'images'}/*/sheet.png   one contact sheet per stimulus\n"
        f"  {out / 'scores' / 'table.md'}   scores with controls\n"
        f"  tensorboard --logdir {out / 'model' / 'tensorboard'}\n"
        "Next, for example: does it matter where the modalities enter?\n"
        f"  python {shlex.join(elsewhere[1])}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
