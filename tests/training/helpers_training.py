"""A training run that takes milliseconds per step: a linear encoder on a folder of builders.py.

As a program it takes steps with the real model, in as many processes as a launcher starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataset
import train
import util
from datafiles import feature_bank
from decoder.aligners import Alignment
from loss import Contrast
from masking import Masking
from rundirs.directory import RunDirectory
from rundirs.tensors import save_tensors
from training import loop
from training.optimisation import Schedule
from training.processes import Processes
from training.settings import Computing, Procedure
from training.starting import new_decoder

SCHEDULE = {
    "epochs": 4, "batch_size": 4, "learning_rate": 1e-2, "lr_eeg": None, "schedule": "constant",
    "weight_decay": 0.01, "warmup_steps": 0, "grad_clip": 1.0, "ema_decay": 0.9, "seed": 0,
    "epochs_per_call": None, "save_every": 1, "val_every": 1, "patience": 10,
}  # fmt: skip
COMPUTING = {
    "precision": "float32", "accumulate": 1, "compile": False, "data_on_device": "auto",
    "report_to": "none",
}  # fmt: skip
MASKING = Masking(channel=0.2, time=0.1, subject=0.3, span=4)


def training_data(root: Path, **options: Any) -> dataset.TrainingData:
    """Of a folder of ``builders.write_world``."""
    given = {"trials": "random", "val_fraction": 0.2, "seed": 0} | options
    return dataset.open_training(dataset.DataChoice(root, root / "bank", **given))


class Linear(nn.Module):
    """The smallest model that engine.fit takes."""

    adapted = "all"

    def __init__(self, data: dataset.TrainingData) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = len(data.signal["channels"]) * len(data.signal["times"])
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.LayerNorm(size), nn.Dropout(0.3), nn.Linear(size, 8)
        )
        self.head = nn.Linear(8, data.targets["image"].shape[1])

    def header(self) -> dict[str, Any]:
        return {"kind": "linear"}

    def recall(self, header: Mapping[str, Any]) -> None:
        assert header["kind"] == "linear"

    def networks(self) -> list[nn.Module]:
        return [self.encoder]


class Regression:
    """Image targets from EEG; ``select`` is the negative loss of held-out concepts."""

    def __init__(self, model: Linear, data: dataset.TrainingData) -> None:
        self.model, self.data = model, data

    def losses(self, batch, generator, part=util.WHOLE) -> dict[str, torch.Tensor]:
        error = self.model.head(self.model.encoder(batch.eeg)) - batch.targets["image"]
        return {"loss": error.square().mean()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        eeg, _ = self.data.validation()
        rows = self.data.val_rows.repeat(len(self.data.recordings))
        error = self.model.head(self.model.encoder(eeg)) - self.data.targets["image"][rows]
        return {"select": -float(error.square().mean())}


def fit_linear(root: Path, out: Path, **changes: Any) -> Linear:
    """Train, or go on training; ``changes`` of SCHEDULE and COMPUTING."""
    torch.set_num_threads(1)
    data = training_data(root)
    model = Linear(data)
    schedule = Schedule(**SCHEDULE | {k: v for k, v in changes.items() if k in SCHEDULE})
    computing = Computing(**COMPUTING | {k: v for k, v in changes.items() if k in COMPUTING})
    run = RunDirectory(out, "train")
    out.mkdir(parents=True, exist_ok=True)
    processes = Processes(0, 1, torch.device("cpu"))
    loop.fit(
        run,
        model,
        Regression(model, data),
        data,
        Procedure(schedule, computing, MASKING),
        processes,
    )
    return model


def fit_in_child(root: str, out: str, epochs: int) -> None:
    """For multiprocessing: ends with the exit code of the stages."""
    try:
        fit_linear(Path(root), Path(out), epochs=epochs)
    except util.Preempted:
        raise SystemExit(util.PREEMPTED) from None


def steps_of_the_real_model(root: Path, out: Path, steps: int, accumulate: int) -> None:
    """Joint training without dropout and batch statistics; the first process saves losses and the
    last step's gradients."""
    torch.set_num_threads(1)
    processes = Processes.join("cpu")
    data = training_data(root)
    alignment = Alignment("prior", False, 0.3, "velocity", None)
    decoder = new_decoder(data, 0, alignment, None, layers=[feature_bank.FINAL_LAYER])
    contrast = Contrast(0.1, contrast_positives="concept")
    objective = train.JointObjective(decoder, data, contrast, 1.0, noise_draws=2)
    schedule = Schedule(**SCHEDULE | {"batch_size": 8, "ema_decay": 0.0, "learning_rate": 1e-3})
    computing = Computing(**COMPUTING | {"accumulate": accumulate})
    training = loop._Training(
        RunDirectory(out, "train"), decoder, objective, Procedure(schedule, computing, MASKING),
        processes, steps,
    )  # fmt: skip
    decoder.eval()
    batches = [b for epoch in range(steps) for b in data.batches(epoch, 8, part=training.part)]
    for batch in batches[:steps]:
        # builders' EEG is in thousands, where attention's softmax saturates: its gradient would be
        # nothing but rounding, which differs from one processor's kernels to another's
        training.update(replace(batch, eeg=batch.eeg / 1000))
    training.ledger.read()
    sums = training.ledger.sums
    means = processes.mean(list(sums.values()))
    if processes.first:
        losses = dict(zip(sums, means, strict=True))
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        about = {"losses": losses, "processes": processes.count}
        save_tensors(out / "gradients.safetensors", gradients, about)
    processes.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    steps_of_the_real_model(given.root, given.out, given.steps, given.accumulate)


def joint_flags(root: Path, out: Path, *more: object) -> list[str]:
    """A short call of train.py on a world of ``builders``; later flags win."""
    return [
        str(flag)
        for flag in (
            "--data_path", root, "--clip_feature_path", root / "bank", "--output_dir", out,
            "--epochs", 2, "--batch_size", 8, "--val_fraction", 0.2, "--device", "cpu", *more,
        )
    ]  # fmt: skip


def write_people(root: Path, concepts: int) -> Path:
    """Three subjects whose EEG says who they are: 1000 x subject + ..."""
    import builders  # not where this file is run as a script

    builders.write_pictures(root, training=concepts)
    for subject in range(3):
        builders.write_subject(root, subject)
    builders.write_bank(root / "bank", root)
    return root
