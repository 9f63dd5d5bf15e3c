"""Real EEG: what people nobody trained on saw, by every encoder of this project and by ridge.

    python benchmarks/real_eeg.py --data things_eeg1_category_erp.npz --json real_eeg.json

30 people of THINGS-EEG1 (Grootswagers et al. 2022), averaged ERPs of five object categories. An
encoder is trained by the project's own files, loss and loop to bring an ERP near its category's
prototype; people left out enter as the unknown subject (-1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import args
import dataset
import metrics
import util
from ATMS_retrieval import ContrastiveObjective
from datafiles.eeg_files import eeg_file
from datafiles.feature_bank import open_bank
from datafiles.stimuli import IMAGE_FOLDER, list_stimuli
from decoder.decoder import Decoder, check_encoder, new_encoder
from decoder.foundation import EncoderChoice
from loss import Contrast
from modalities import ENCODERS, NAMES
from rundirs.environment import environment
from rundirs.files import write_json
from rundirs.tensors import save_tensors
from training import loop
from training.processes import Processes

WINDOW_S = (0.0, 1.0)  # end exclusive
FOLDS, INNER_SHARE = 5, 0.2  # of the people; of a fold's training people, to choose by
# set once, for all encoders; scaling, penalty and epoch are chosen, by the inner people
WIDTH = 64  # of the embedding: five prototypes need no more
TRAINING = {  # flags of ATMS_retrieval.py; people are unknown in training as later
    "learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 16, "subject_dropout": 1.0,
    "text_contrast": 0.0, "trials": "average", "val_fraction": 0.0, "device": "cpu",
}  # fmt: skip
EPOCHS = 20
RIDGE = "ridge"  # the baseline's name among the methods
SCALINGS = ("centred", "standardised")
PENALTIES = (1e2, 1e3, 1e4, 1e5, 1e6)


@dataclasses.dataclass(frozen=True)
class ERPs:
    """``eeg`` float32 [people, categories, C, T], each ERP divided by its own deviation."""

    eeg: np.ndarray
    categories: list[str]
    channels: list[str]
    times: list[float]


def read_erps(path: Path) -> ERPs:
    """The file, cut to the window. People's amplitudes differ tenfold, hence the division."""
    try:
        with np.load(path) as file:
            content = {name: file[name] for name in ("eeg", "category", "ch_names", "times")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise util.DataError(
            path, str(error), "eeg, category, ch_names and times in an .npz", "give --data FILE"
        ) from None
    times = content["times"]
    inside = (times > WINDOW_S[0] - 1e-6) & (times < WINDOW_S[1] - 1e-6)
    eeg = content["eeg"][..., inside]
    return ERPs(
        (eeg / eeg.std(axis=(2, 3), keepdims=True)).astype(np.float32),
        content["category"].tolist(),
        content["ch_names"].tolist(),
        times[inside].tolist(),
    )


def permuted(eeg: np.ndarray, seed: int) -> np.ndarray:
    """The control: every person's ERPs [people, categories, C, T] in another order."""
    draw = np.random.default_rng(seed)
    return np.stack([rows[draw.permutation(len(rows))] for rows in eeg])


def folds(people: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training people, left-out people), every person left out once."""
    order = np.random.default_rng(seed).permutation(people)
    for left_out in np.array_split(order, FOLDS):
        yield np.setdiff1d(order, left_out, assume_unique=True), left_out


def scaled(scaling: str, fit: np.ndarray, eeg: np.ndarray) -> np.ndarray:
    """``eeg`` by the mean of ``fit`` per channel and sample, and the deviation of all or of each.

    Both [people, categories, C, T].
    """
    mean = fit.mean(axis=(0, 1))
    deviation = fit.std(axis=(0, 1)) if scaling == "standardised" else (fit - mean).std()
    return (eeg - mean) / (deviation + 1e-8)


# ---------------------------------------------------------------- ridge


def ridge(fit: np.ndarray, eeg: np.ndarray, scaling: str, penalty: float) -> np.ndarray:
    """Categories [people, categories] of ``eeg`` by ridge regression on one-hot, fitted to ``fit``.

    In its dual form: there are fewer ERPs than features.
    """
    x, new = (scaled(scaling, fit, rows).reshape(-1, fit[0, 0].size) for rows in (fit, eeg))
    categories = fit.shape[1]
    truth = np.tile(np.eye(categories), (len(fit), 1)) - 1 / categories
    weights = np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), truth)
    return (new @ x.T @ weights).argmax(1).reshape(eeg.shape[:2])


def choose_ridge(eeg: np.ndarray, seed: int) -> tuple[str, float]:
    """(scaling, penalty) by leaving people out of the training people ``eeg``."""
    truth = np.arange(eeg.shape[1])

    def accuracy(scaling: str, penalty: float) -> float:
        return float(
            np.mean([
                (ridge(eeg[fit], eeg[held], scaling, penalty) == truth).mean()
                for fit, held in folds(len(eeg), seed)
            ])
        )  # fmt: skip

    candidates = [(scaling, penalty) for scaling in SCALINGS for penalty in PENALTIES]
    return max(candidates, key=lambda candidate: accuracy(*candidate))


# ---------------------------------------------------------------- encoders


def write_world(root: Path, erps: ERPs, eeg: np.ndarray, prototypes: torch.Tensor) -> None:
    """``eeg`` in the files that training reads: a subject per person, a picture per category."""
    for number, category in enumerate(erps.categories, start=1):
        folder = root / IMAGE_FOLDER["training"] / f"{number:05d}_{category}"
        folder.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(folder / f"{category}.png")
    for person, rows in enumerate(eeg, start=1):
        path = eeg_file(root, f"sub-{person:02d}", "training")
        path.parent.mkdir(parents=True)
        content = {
            "preprocessed_eeg_data": rows[:, None],  # one repetition
            "ch_names": erps.channels,
            "times": np.array(erps.times),
        }
        path.write_bytes(pickle.dumps(content))
    ids = [item.id for item in list_stimuli(root, "training")]
    tensors = {name: prototypes.clone() for name in NAMES} | {"stimulus": torch.tensor(ids)}
    clip = {"model": "a random orthogonal prototype per category"}
    save_tensors(root / "bank" / "training.safetensors", tensors, {"clip": clip})
    (root / "bank" / "DONE").write_text("{}")


class PeopleObjective(ContrastiveObjective):
    """The contrastive objective; ``inner`` [people, categories, C, T] chooses the epoch."""

    def __init__(
        self, decoder: Decoder, data: dataset.TrainingData, contrast: Contrast, inner: np.ndarray
    ) -> None:
        super().__init__(decoder, data, contrast)
        self.inner = inner

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        cosines = similarities(self.decoder, self.inner, self.data.targets["image"])
        truth = torch.arange(self.inner.shape[1]).repeat(len(self.inner))[:, None]
        own = cosines.gather(1, truth)
        # finer than the accuracy of so few people, and independent of the learned scale
        others = cosines.scatter(1, truth, -1.0).amax(1, keepdim=True)
        return {"select": float((own - others).mean())}


def similarities(decoder: Decoder, eeg: np.ndarray, prototypes: torch.Tensor) -> torch.Tensor:
    """Cosines [people x categories, prototypes] of ERPs of unknown people with the prototypes."""
    rows = torch.from_numpy(eeg).float().flatten(0, 1)
    embedding = decoder.embed(rows, torch.full((len(rows),), -1))
    return F.normalize(embedding, dim=1) @ F.normalize(prototypes, dim=1).T


def trained(
    name: str, root: Path, erps: ERPs, fit: np.ndarray, inner: np.ndarray, epochs: int, seed: int
) -> Decoder:
    """The encoder ``name`` fitted to ``fit``, as it was in the best epoch for ``inner``."""
    draw = torch.Generator().manual_seed(seed)
    prototypes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))[0]
    write_world(root, erps, fit, prototypes[: len(erps.categories)])
    bank, out = root / "bank", root / "run"
    flags = {"data_path": root, "clip_feature_path": bank, "output_dir": out, "encoder": name}
    flags |= {"epochs": epochs, "save_every": epochs, "seed": seed, **TRAINING}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    options = args.resolve("retrieval", words)  # whatever is not named: its default
    data = dataset.open_training(options.settings(dataset.DataChoice))
    decoder = Decoder(new_encoder(data, seed, EncoderChoice(name)), None, data.signal, data.clip)
    objective = PeopleObjective(decoder, data, options.settings(Contrast), inner)
    run = loop.train(options, decoder, objective, data, Processes.join("cpu"))
    return Decoder.load(run.path, "best")


def by_encoder(
    name: str, erps: ERPs, fit: np.ndarray, eeg: np.ndarray, scaling: str, epochs: int, seed: int
) -> np.ndarray:
    """Categories [people, categories] of ``eeg`` by an encoder trained on the people ``fit``.

    A share of ``fit`` is kept out of training to choose the epoch, and is not trained on later.
    """
    kept = max(1, round(INNER_SHARE * len(fit)))
    fitted, inner, new = (
        scaled(scaling, fit[kept:], rows) for rows in (fit[kept:], fit[:kept], eeg)
    )
    quiet = contextlib.redirect_stderr(io.StringIO())  # a progress bar for every person and fold
    with tempfile.TemporaryDirectory() as folder, quiet:
        decoder = trained(name, Path(folder), erps, fitted, inner, epochs, seed)
        prototypes = open_bank(Path(folder) / "bank", "training").features["image"]
    return similarities(decoder, new, prototypes).argmax(1).reshape(eeg.shape[:2]).numpy()


# ---------------------------------------------------------------- scores


def shares(
    erps: ERPs, methods: Sequence[str], epochs: int, seed: int, *, control: bool
) -> dict[str, np.ndarray]:
    """Share of categories recognised {method: [people]}, each person left out once.

    ``control``: what is learned and chosen from has permuted labels, in every fold other ones.
    """
    truth = np.arange(len(erps.categories))
    right = {method: np.zeros(len(erps.eeg)) for method in methods}
    for fold, (fit, left_out) in enumerate(folds(len(erps.eeg), seed)):
        training, asked = erps.eeg[fit], erps.eeg[left_out]
        if control:
            training = permuted(training, util.seed_for(seed, "permuted labels", fold))
        scaling, penalty = choose_ridge(training, seed)
        for method in methods:
            if method == RIDGE:
                found = ridge(training, asked, scaling, penalty)
            else:
                found = by_encoder(method, erps, training, asked, scaling, epochs, seed)
            right[method][left_out] = (found == truth).mean(axis=1)
            sys.stderr.write(".")
    return right


def summary(
    own: np.ndarray, control: np.ndarray, baseline: np.ndarray, seed: int
) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over people, paired for the difference to ridge."""
    row: dict[str, Any] = {"n": len(own), "seed": seed}
    for prefix, values in (("", own), ("control", control), ("above_ridge", own - baseline)):
        low, high = metrics.bootstrap_interval(values, seed)
        join = f"{prefix}_" if prefix else ""
        row |= {prefix or "value": float(values.mean()), f"{join}low": low, f"{join}high": high}
    return row


def measure(erps: ERPs, encoders: Sequence[str], epochs: int, seed: int) -> dict[str, Any]:
    """A row per method: its accuracy, with permuted labels, and how far it is above ridge."""
    methods = [RIDGE, *encoders]
    own = shares(erps, methods, epochs, seed, control=False)
    control = shares(erps, methods, epochs, seed, control=True)
    return {name: summary(own[name], control[name], own[RIDGE], seed) for name in methods}


def as_markdown(rows: dict[str, Any]) -> str:
    lines = [
        "| method | accuracy % [95 %] | above ridge, points [95 %] | permuted labels % [95 %] "
        "| N people | seed |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        cells = [
            f"{100 * row[value]:.1f} [{100 * row[low]:.1f}, {100 * row[high]:.1f}]"
            for value, low, high in (
                ("value", "low", "high"),
                ("above_ridge", "above_ridge_low", "above_ridge_high"),
                ("control", "control_low", "control_high"),
            )
        ]
        lines.append(f"| {method} | {' | '.join(cells)} | {row['n']} | {row['seed']} |")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="NPZ",
        help="eeg [people, categories, channels, samples], category, ch_names, times",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), metavar="NAME",
        help="as --encoder of train.py (default: all of this project)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N",
        help="at most; inner people choose one of them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser.parse_args(argv)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    for name in given.encoders:
        check_encoder(EncoderChoice(name))
    util.LOG.setLevel("WARNING")  # 30 trainings would fill the screen
    erps = read_erps(given.data)
    people, categories, channels, samples = erps.eeg.shape
    rows = measure(erps, given.encoders, given.epochs, given.seed)
    print(
        f"\n{given.data.name}: {people} people x {categories} categories, {channels} channels "
        f"x {samples} samples; {FOLDS} folds of people, left-out people unknown; chance "
        f"{100 / categories:.0f} %; scaling, ridge penalty and epoch chosen on inner people\n"
    )
    print(as_markdown(rows))
    if given.json:
        write_json(given.json, {"rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
