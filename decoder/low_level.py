"""A coarse picture from EEG, for denoising to start from: layout and colours, no detail.

A linear head per subject, ridge regression, predicts the picture as GRID x GRID regular superpixels
from the encoder's embedding and from the EEG's means in short windows. The field's SSIM comes from
such low-level starts. Its shrinkage is chosen on held-out training concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import util
from datafiles.eeg_files import mean_trial
from datafiles.pictures import read_pixels
from datafiles.stimuli import Stimulus
from dataset import TestEEG, TrainingData
from decoder.decoder import Decoder
from rundirs.tensors import load_tensors, save_tensors
from util import DataError, UserError

GRID = 16  # regular superpixels per side
MEANS_WINDOW_S = 0.05  # of the EEG's means
RIDGES = tuple(10.0**power for power in range(0, 7))
FILE = "low_level.safetensors"
_BATCH = 256


def coarse_picture(path: Path) -> torch.Tensor:
    """A picture file as its superpixels' mean colours: float32 [3, GRID, GRID] in 0..1.

    Raises DataError.
    """
    tensor = torch.tensor(read_pixels(path)).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(tensor, (GRID, GRID), mode="area")[0]


def coarse_pictures(stimuli: Sequence[Stimulus]) -> torch.Tensor:
    """float32 [N, 3, GRID, GRID]; the slow part of reading is the pictures' own size."""
    from rundirs.progress import Progress

    bar = Progress(stimuli, desc="coarse pictures", unit="picture")
    return torch.stack([coarse_picture(item.path) for item in bar])


def enlarged(coarse: torch.Tensor, size_px: int) -> torch.Tensor:
    """[N, 3, GRID, GRID] -> smooth pictures [N, 3, size_px, size_px] in 0..1."""
    large = F.interpolate(coarse, (size_px, size_px), mode="bicubic", align_corners=False)
    return large.clamp(0, 1)


def window_means(eeg: torch.Tensor, times_s: Sequence[float]) -> torch.Tensor:
    """Means of EEG [N, C, T] in windows of WINDOW_S: [N, C * windows]."""
    width = max(1, round(MEANS_WINDOW_S / (times_s[1] - times_s[0])))
    return F.avg_pool1d(eeg, width, ceil_mode=True).flatten(1)


@dataclass(frozen=True)
class LowLevelHead:
    """``weight`` [S, F, 3 * GRID^2], ``mean``, ``std`` [S, F] of the features, ``offset`` [S, P].

    ``skill`` [S]: share of the held-out pictures' variance that is predicted, with the ``ridge``.
    """

    weight: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    offset: torch.Tensor
    skill: torch.Tensor
    ridge: torch.Tensor
    subjects: tuple[str, ...]

    def predict(self, features: torch.Tensor, subject: str) -> torch.Tensor:
        """Coarse pictures [N, 3, GRID, GRID] in 0..1 of features [N, F]. Raises UserError."""
        if subject not in self.subjects:
            raise UserError(
                "--init superpixel",
                f"no low-level head for {subject}",
                f"one of {', '.join(self.subjects)}",
                "train on this subject, or use --init none",
            )
        row = self.subjects.index(subject)
        standard = (features.double() - self.mean[row]) / self.std[row]
        flat = standard @ self.weight[row] + self.offset[row]
        return flat.float().unflatten(1, (3, GRID, GRID)).clamp(0, 1)

    def mean_picture(self) -> torch.Tensor:
        """The mean training picture [3, GRID, GRID]: what is predicted without any EEG."""
        return self.offset[0].float().unflatten(0, (3, GRID, GRID)).clamp(0, 1)

    def save(self, run: Path, clip: Mapping[str, object]) -> None:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        save_tensors(run / FILE, tensors, {"subjects": self.subjects, "clip": clip})


_TENSORS = ("weight", "mean", "std", "offset", "skill", "ridge")


def load_head(run: Path) -> LowLevelHead:
    """The head of a train.py run. Raises UserError without one, DataError for a damaged one."""
    if not (run / FILE).exists():
        raise UserError(
            "--init superpixel",
            f"{run}: a model without a low-level head",
            FILE,
            "run the same train.py command again with --low_level: only the head is fitted",
        )
    tensors, header = load_tensors(run / FILE)
    if sorted(tensors) != sorted(_TENSORS) or "subjects" not in header:
        found = f"tensors {sorted(tensors)}"
        raise DataError(run / FILE, found, "a low-level head", "delete it and fit it again")
    return LowLevelHead(**tensors, subjects=tuple(header["subjects"]))


# ---------------------------------------------------------------- features of EEG


def head_inputs(decoder: Decoder, eeg: torch.Tensor, subject: int) -> torch.Tensor:
    """[N, F] of EEG [N, C, T] of one subject: the encoder's embedding, then the windows' means."""
    ids = torch.full((len(eeg),), subject)
    embedding = decoder.embed(eeg, ids)
    return torch.cat([embedding, window_means(eeg, decoder.signal["times"])], dim=1)


def test_features(decoder: Decoder, test: TestEEG, rows: Sequence[int]) -> torch.Tensor:
    """:func:`features_of` some rows of a test recording."""
    return head_inputs(decoder, test.eeg[list(rows)], decoder.subject_index(test.subject))


def training_features(decoder: Decoder, data: TrainingData, number: int) -> torch.Tensor:
    """[N, F] of all training stimuli of a recording, averaged over trials, read in batches."""
    recording, cut = data.recordings[number], data.cuts[number]
    subject = data.first_subject + number
    found = []
    for start in range(0, len(recording.eeg), _BATCH):
        rows = range(start, min(start + _BATCH, len(recording.eeg)))
        eeg = np.stack([mean_trial(recording, cut, row) for row in rows])
        found.append(head_inputs(decoder, torch.from_numpy(eeg), subject))
    return torch.cat(found)


# ---------------------------------------------------------------- ridge regression


def fit_ridge(
    features: torch.Tensor, targets: torch.Tensor, train: torch.Tensor, val: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Ridge of targets [N, P] on features [N, F], fitted on rows ``train``, chosen on ``val``.

    Without held-out rows the largest ridge is taken. Returns weight, mean, std, offset, skill and
    ridge of one subject, float64.
    """
    x, y = features.double(), targets.double()
    mean, std = x[train].mean(0), x[train].std(0).clamp(min=1e-6)
    offset = y[train].mean(0)
    standard = (x - mean) / std
    values, vectors = torch.linalg.eigh(standard[train].T @ standard[train])
    projected = vectors.T @ (standard[train].T @ (y[train] - offset))
    best: dict[str, torch.Tensor] = {}
    for ridge in RIDGES:
        weight = vectors @ (projected / (values.clamp(min=0) + ridge)[:, None])
        error = (y[val] - offset - standard[val] @ weight).square().sum()
        spread = (y[val] - offset).square().sum()
        skill = 1 - error / spread if len(val) else torch.tensor(float("nan")).double()
        if not best or not len(val) or skill > best["skill"]:
            best = {"weight": weight, "skill": skill, "ridge": torch.tensor(ridge).double()}
    return best | {"mean": mean, "std": std, "offset": offset}


def fit_head(decoder: Decoder, data: TrainingData, stimuli: Sequence[Stimulus]) -> LowLevelHead:
    """A head for every subject whose EEG is here. ``stimuli``: the training pictures.

    The people whom an adapted model knew before have theirs in the run that it was adapted from.
    """
    targets = coarse_pictures(stimuli).flatten(1)
    names = tuple(data.signal["subjects"][data.first_subject :])
    found = []
    for number, name in enumerate(names):
        features = training_features(decoder, data, number)
        found.append(fit_ridge(features, targets, data.train_rows, data.val_rows))
        util.LOG.info(
            "low-level head of %s: %.3f of held-out pictures' variance at %d x %d, ridge %g",
            name, found[-1]["skill"], GRID, GRID, found[-1]["ridge"],
        )  # fmt: skip
    stacked = {key: torch.stack([item[key] for item in found]) for key in _TENSORS}
    return LowLevelHead(**stacked, subjects=names)
