"""The whole chain on the embedded miniature world, by the public command lines. CPU, no downloads.

The EEG is SIMULATED: the demo shows that every stage works and that stimuli can be told apart from
the simulated EEG, not how well real brains are decoded.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("demo")

import util

HERE = Path(__file__).resolve().parent


def commands(out: Path, seed: int, quick: bool) -> list[tuple[str, list[str]]]:
    """(what it does, command after ``python``) of every stage."""
    data, models, subject = out / "world" / "data", out / "world" / "models", "sub-01"
    subjects, concepts, epochs, drawn = (1, 60, 10, 2) if quick else (2, 90, 25, 8)
    device = ["--device", "cpu"]
    seeded = ["--seed", str(seed)]
    stages = [
        (
            "embedded world: pictures, simulated EEG, miniature models",
            [
                "-m",
                "miniworld",
                "--output_path",
                out / "world",
                "--subjects",
                subjects,
                "--training_concepts",
                concepts,
                "--images_per_concept",
                3,
                *seeded,
            ],
        ),
        (
            "stage 1: five CLIP embeddings of every stimulus",
            [
                "clip_feature_extractor.py",
                "--data_path",
                data,
                "--output_path",
                out / "clip_features",
                "--clip_model",
                models / "miniature-clip.json",
                "--clip_pretrained",
                models / "miniature-clip.safetensors",
                "--captions",
                data / "captions.json",
                "--batch_size",
                32,
                "--num_workers",
                2,
                "--save_superpixels",
                *device,
            ],
        ),
        (
            "stage 2: encoder and five priors, jointly",
            [
                "train.py",
                "--data_path",
                data,
                "--clip_feature_path",
                out / "clip_features",
                "--output_dir",
                out / "model",
                "--epochs",
                epochs,
                "--batch_size",
                64,
                "--learning_rate",
                1e-3,
                "--ema_decay",
                0.99,
                *seeded,
                *device,
            ],
        ),
        (
            "stage 3: pictures from EEG",
            [
                "generate.py",
                "--eeg_data",
                data / "Preprocessed_data_250Hz" / subject,
                "--model_path",
                out / "model",
                "--sd_model_path",
                models / "sdxl",
                "--ip_adapter_path",
                models / "ip_adapter.safetensors",
                "--output_dir",
                out / "images",
                "--mode",
                "all",
                "--size",
                128,
                "--steps",
                8,
                "--max_stimuli",
                drawn,
                "--batch_size",
                11,
                *seeded,
                *device,
            ],
        ),
        (
            "stage 4: scores with controls",
            [
                "evaluate.py",
                "--model_path",
                out / "model",
                "--data_path",
                data,
                "--clip_feature_path",
                out / "clip_features",
                "--images",
                out / "images",
                "--output_dir",
                out / "scores",
                *seeded,
                *device,
            ],
        ),
    ]
    return [(what, [str(word) for word in command]) for what, command in stages]


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage in turn; finished stages answer at once. Stops at the first that fails."""
    values = args.resolve("demo", argv).values
    out = values.output_path or Path("demo_output_quick" if values.quick else "demo_output")
    if Path.cwd() != HERE:  # the stages run there
        out = out.resolve()
    plan = commands(out, values.seed, values.quick)
    if values.dry_run:
        print("\n".join(f"python {shlex.join(command)}" for _, command in plan))
        return 0
    print(
        "EEG here is SIMULATED and the miniature CLIP, SDXL and IP-Adapter have RANDOM weights:\n"
        "this shows that the chain works, the pictures are not meant to look like the stimuli.",
        flush=True,
    )
    for number, (what, command) in enumerate(plan):
        print(f"\n[{number + 1}/{len(plan)}] {what}\n$ python {shlex.join(command)}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *command], cwd=HERE, check=False).returncode
        if code:
            print(f"stopped: this stage ended with exit code {code}", file=sys.stderr)
            return code
        print(f"[{time.monotonic() - started:.0f} s]", flush=True)
    print(
        f"\nLook at\n  {out / 'images' / 'overview.png'}   stimulus and all recipes, side by side\n"
        f"  {out / 'images'}/*/sheet.png   one contact sheet per stimulus\n"
        f"  {out / 'clip_features' / 'superpixels'}   what CLIP was shown\n"
        f"  {out / 'scores' / 'table.md'}   scores with controls\n"
        f"  tensorboard --logdir {out / 'model' / 'tensorboard'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
