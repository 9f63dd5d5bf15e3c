"""Aligners by the number of training pairs, on a simulated bank with CLIP's large common mean.

    python benchmarks/pairs.py --output_path OUT --json pairs.json
    python benchmarks/pairs.py --output_path OUT --json pairs.json --pairs 120 500 --seeds 3

The EEG is SIMULATED: each picture's latent, seen through random time courses and noise. The mean
embedding has a cosine of about 0.6 with each, as CLIP's has. Scores are of 200 pictures of unseen
concepts, ranked as evaluate.py ranks; chance top-1 is 0.5 %. Trainings in OUT are found again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics
import train
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import list_stimuli
from dataset import TestEEG
from decoder.decoder import Decoder
from modalities import NAMES
from preprocessing.channels import POSTERIOR
from rundirs.environment import environment
from rundirs.files import read_json, write_json
from rundirs.tensors import save_tensors
from unet import Sampling

WIDTH, LATENT, SEEN = 256, 64, 32  # of embeddings; of pictures; of these, in the EEG
SAMPLES, RATE_HZ = 50, 250.0
OFFSET, NOISE = 7.0, 4.0  # lengths of the mean embedding and of the EEG's noise, latents being 1
UNSEEN = 200  # pictures, of as many concepts
PICTURES = 10  # of a training concept
STEPS, VALIDATIONS = 600, 12  # of a training, at least, and in it
VARIANTS: Mapping[str, Sequence[str]] = {
    "prior": ("--aligner", "prior", "--aligner_skip", "off"),
    "prior_skip": ("--aligner", "prior"),
    "mlp": ("--aligner", "mlp", "--aligner_skip", "off"),
    "mlp_skip": ("--aligner", "mlp"),
    "none": ("--aligner", "none"),
}
SCORES = ("top1_image", "top1_encoder", "top1_plain", *(f"cosine_{name}" for name in NAMES))
SAMPLING = Sampling(10, 1.0, "dpm", 8)
Scores = dict[str, float]


class World:
    """Pictures' latents, their embeddings and the EEG of somebody who sees them, all seeded."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = torch.Generator().manual_seed(seed)
        self.means = {name: torch.randn(WIDTH, generator=draw) for name in NAMES}
        self.maps = {name: torch.randn(LATENT, WIDTH, generator=draw) for name in NAMES}
        self.courses = torch.randn(SEEN, len(POSTERIOR) * SAMPLES, generator=draw)

    def pictures(self, concepts: int, each: int) -> torch.Tensor:
        """Latents [concepts * each, LATENT] of unit variance; half of it is the concept's."""
        concept = torch.randn(concepts, 1, LATENT, generator=self.draw)
        own = torch.randn(concepts, each, LATENT, generator=self.draw)
        return ((concept + own) / 2**0.5).flatten(0, 1)

    def embeddings(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """{modality: [N, WIDTH]}; modalities share the latent, not the way it is written."""
        found = {}
        for name in NAMES:
            detail = 0.3 * torch.randn(len(latents), WIDTH, generator=self.draw) * LATENT**0.5
            found[name] = OFFSET * self.means[name] + latents @ self.maps[name] + detail
        return found

    def eeg(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, C, T] of about unit variance."""
        signal = latents[:, :SEEN] @ self.courses / SEEN**0.5
        noisy = signal + NOISE * torch.randn(signal.shape, generator=self.draw)
        return noisy.unflatten(1, (len(POSTERIOR), SAMPLES)) / (1 + NOISE**2) ** 0.5


def write_pairs(root: Path, world: World, pairs: int) -> None:
    """DATA and a bank of ``pairs`` pictures and EEG, as train.py reads them."""
    concepts = max(2, pairs // PICTURES)
    for concept in range(1, concepts + 1):
        folder = root / "training_images" / f"{concept:05d}_concept{concept}"
        folder.mkdir(parents=True, exist_ok=True)
        for picture in range(PICTURES):
            (folder / f"{picture}.jpg").touch()
    latents = world.pictures(concepts, PICTURES)
    recording = {
        "preprocessed_eeg_data": world.eeg(latents)[:, None].numpy(),
        "ch_names": list(POSTERIOR),
        "times": np.arange(SAMPLES) / RATE_HZ,
    }
    file = eeg_file(root, "sub-01", "training")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, recording)
    ids = torch.tensor([item.id for item in list_stimuli(root, "training")])
    tensors = world.embeddings(latents) | {"stimulus": ids}
    save_tensors(root / "bank" / "training.safetensors", tensors, {"clip": {"model": "simulated"}})
    write_json(root / "bank" / "DONE", {})


def trained(root: Path, run: Path, pairs: int, flags: Sequence[str], seed: int) -> Decoder:
    """The best model of a training, of about as many steps for every number of pairs."""
    batch = min(128, pairs // 2)
    epochs = max(5, STEPS // max(1, pairs // batch))
    command = [
        "--data_path", root, "--clip_feature_path", root / "bank", "--output_dir", run,
        "--encoder", "EEGProject", "--channels", *POSTERIOR, "--trials", "average", "--seed", seed,
        "--val_fraction", 0.1, "--batch_size", batch, "--device", "cpu", "--epochs", epochs,
        "--val_every", max(1, epochs // VALIDATIONS), "--save_every", 1000,
        "--learning_rate", 1e-3, "--schedule", "cosine", *flags,
    ]  # fmt: skip
    if train.main([str(flag) for flag in command]) != 0:
        raise SystemExit(f"{run}: training failed")
    return Decoder.load(run, "best")


def scores_of(decoder: Decoder, true: Mapping[str, torch.Tensor], eeg: torch.Tensor) -> Scores:
    """Each of SCORES, of pictures with embeddings ``true`` and the EEG [N, C, T] of them."""
    test, rows = TestEEG(eeg, "sub-01", None, "", Path()), range(UNSEEN)
    made, truth = decoder.predict(test, rows, SAMPLING, 0), torch.arange(UNSEEN)
    spaces = [decoder.standardised(of) for of in (made, true)]
    standard = {name: tuple(space[name] for space in spaces) for name in NAMES}
    pairs = {
        "top1_image": standard["image"],
        "top1_encoder": (decoder.condition(test, rows), decoder.gallery(true, 0)),
        "top1_plain": (made["image"], true["image"]),
    }
    found = {name: metrics.retrieval_topk(*pair, truth)["top1"] for name, pair in pairs.items()}
    for name, pair in standard.items():
        found[f"cosine_{name}"] = float(F.cosine_similarity(*pair, dim=1).mean())
    return found


def scores_at(root: Path, pairs: int, seed: int, variants: Sequence[str]) -> dict[str, Scores]:
    """{variant: its scores} of one world, found again or trained."""
    files = {variant: root / variant / "scores.json" for variant in variants}
    if not all(file.exists() for file in files.values()):
        world = World(seed)
        write_pairs(root, world, pairs)
        latents = world.pictures(UNSEEN, 1)
        true, eeg = world.embeddings(latents), world.eeg(latents)
    for variant, file in files.items():
        if not file.exists():
            decoder = trained(root, file.parent, pairs, VARIANTS[variant], seed)
            write_json(file, scores_of(decoder, true, eeg))
    return {variant: read_json(file) for variant, file in files.items()}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per number of pairs and variant: mean over seeds, with the range of top-1."""
    heads = ["pairs", "aligner", "seeds", *SCORES]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [f"{np.mean(row[name]):.3f}" for name in SCORES]
        cells[0] += f" ({min(row['top1_image']):.3f}..{max(row['top1_image']):.3f})"
        named = [f"{row['pairs']}", row["variant"], f"{row['seeds']}"]
        lines.append(f"| {' | '.join([*named, *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score every variant at every number of pairs; write JSON, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[120, 500, 2000, 16540])
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    values = parser.parse_args(argv)
    rows = []
    for pairs in values.pairs:
        roots = [values.output_path / f"{pairs}_{seed}" for seed in range(values.seeds)]
        found = [scores_at(root, pairs, seed, values.variants) for seed, root in enumerate(roots)]
        for variant in values.variants:
            row = {name: [of[variant][name] for of in found] for name in SCORES}
            rows.append({"pairs": pairs, "variant": variant, "seeds": values.seeds, **row})
    write_json(values.json, {"rows": rows, **environment()})
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
