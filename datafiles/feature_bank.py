"""Feature banks, the output of stage 1: embeddings joined to stimuli by id."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datafiles.stimuli import Stimulus
from modalities import FINAL, NAMES
from rundirs.files import file_hash, write_json
from rundirs.tensors import load_tensors, save_tensors
from util import DataError

BESIDE = "image_"  # how names begin of what a bank has of pictures beside the modalities
BLURRED = f"{BESIDE}blur_"  # of these: the picture blurred before the encoder
JOINED = "joined"  # in a header: the encoders of features that were joined from other banks
RETRIEVAL_NAMES = ("image", "text")  # the modalities that an encoder alone is trained on
FINAL_LAYER = "image"  # CLIP's last layer, projected: the image modality itself


def layer_name(layer: int | str) -> str:
    """What a bank calls the features of CLIP's image layer 1, 2, ..., ``final``, or others'."""
    if layer == FINAL:
        return FINAL_LAYER
    return f"{BESIDE}layer_{layer}" if isinstance(layer, int) else f"{BESIDE}{layer}"


def layer_names(layers: Sequence[int | str] | None) -> tuple[str, ...]:
    """:func:`layer_name` of each."""
    return tuple(layer_name(layer) for layer in layers or ())


@dataclass(frozen=True)
class Bank:
    """Embeddings {modality: float32 [N, D]} of a partition, with the stimulus id of each row.

    ``features`` also holds the other layers [N, W] that it was opened with.
    """

    features: dict[str, torch.Tensor]
    ids: list[int]
    clip: dict[str, Any]
    hash: str
    path: Path

    def rows_for(self, stimuli: Sequence[Stimulus]) -> dict[str, torch.Tensor]:
        """Features in the order of ``stimuli``, joined by id. DataError for stimuli it lacks."""
        if [item.id for item in stimuli] == self.ids:
            return self.features  # the usual case: no copy of what may be half of all memory
        place = {stimulus: row for row, stimulus in enumerate(self.ids)}
        lost = [item.key for item in stimuli if item.id not in place]
        if lost:
            raise DataError(
                self.path,
                f"no features of {len(lost)} of {len(stimuli)} pictures, e.g. {lost[0]}",
                "features of every picture",
                "run clip_feature_extractor.py on this DATA again",
            )
        rows = torch.tensor([place[item.id] for item in stimuli])
        return {name: features[rows] for name, features in self.features.items()}


def open_bank(
    folder: Path,
    partition: str,
    layers: Collection[str] = (),
    needed: Sequence[str] = NAMES,
    also: str | None = None,
) -> Bank:
    """A partition of the output of stage 1. DataError for an unfinished, damaged or NaN bank.

    ``layers``: names of further features that are wanted beside the modalities, if any;
    ``needed``: the modalities, of which an imported bank may have but :data:`RETRIEVAL_NAMES`;
    ``also``: how names begin of further features that are wanted where the bank has them.
    """
    folder = Path(folder)
    path = folder / f"{partition}.safetensors"
    if not (folder / "DONE").exists():
        raise DataError(
            folder,
            "no finished feature bank" if folder.exists() else "no such folder",
            "the output of clip_feature_extractor.py",
            "run that stage; it goes on where it stopped",
        )
    stored, header = load_tensors(path)
    stimulus = stored.pop("stimulus", torch.empty(0, 0))
    ids = stimulus.flatten().tolist()
    whole = stimulus.ndim == 1 and stimulus.dtype == torch.int64 and len(set(ids)) == len(ids)
    identity = header.get("clip")
    modalities = {name for name in stored if not name.startswith(BESIDE)}
    _check_modalities(path, modalities, "imported" in header, needed)
    if not whole or not isinstance(identity, dict):
        raise DataError(path, "no stimulus ids, or no CLIP", "both", "run the stage again")
    found = {name for name in stored if also is not None and name.startswith(also)}
    beside = {*layers, *found} - {*NAMES}
    _check_beside(path, stored, beside)
    wanted = [*(name for name in NAMES if name in modalities), *sorted(beside)]
    features = {name: stored[name] for name in wanted}
    _check_finite(path, features, len(ids))
    if joined := {name: of for name, of in header.get(JOINED, {}).items() if name in features}:
        identity = identity | {JOINED: joined}
    return Bank(features, ids, identity, file_hash(path), path)


def _check_modalities(
    path: Path, found: Collection[str], imported: bool, needed: Sequence[str]
) -> None:
    """Raise DataError unless they are the five, or of an imported bank at least the needed ones."""
    if not imported and set(found) != set(NAMES):
        raise DataError(
            path, f"tensors {sorted(found)}", f"{', '.join(NAMES)} and stimulus ids",
            "run clip_feature_extractor.py again",
        )  # fmt: skip
    if lost := [name for name in needed if name not in found]:
        raise DataError(
            path,
            f"imported features of {', '.join(sorted(found))}",
            f"also {', '.join(lost)}",
            "train with ATMS_retrieval.py, which needs image and text, or with --text_contrast 0 "
            "image alone; for pictures from five embeddings run clip_feature_extractor.py",
        )


def _check_beside(path: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    """Raise DataError unless the bank has these features beside the modalities."""
    if lost := sorted(name for name in wanted if name not in stored):
        raise DataError(
            path,
            f"features of {', '.join(sorted(stored))}",
            f"also {', '.join(lost)}",
            "layers come from clip_feature_extractor.py --image_layers, into another folder; blurs "
            "from --target_blur; other encoders' from dataset.py --join_features",
        )


def write_partition(
    path: Path,
    stimuli: Sequence[Stimulus],
    texts: Sequence[str],
    features: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    """``path`` + .safetensors: features with row ids; + .json: manifest. DataError for NaN."""
    for name, rows in features.items():
        if not torch.isfinite(rows).all():
            raise DataError(
                path,
                f"NaN in the {name} features",
                "finite features",
                "check --clip_pretrained; where --precision float16 overflows, bfloat16 does not",
            )
    ids = torch.tensor([item.id for item in stimuli])
    save_tensors(path.with_suffix(".safetensors"), {**features, "stimulus": ids}, header)
    described = {
        name: {
            "shape": list(rows.shape),
            "dtype": str(rows.dtype),
            "mean_norm": float(rows.norm(dim=1).mean()),
        }
        for name, rows in features.items()
    }
    listed = [
        {"stimulus": item.id, "picture": item.key, "concept": item.concept, "text": text}
        for item, text in zip(stimuli, texts, strict=True)
    ]
    write_json(path.with_suffix(".json"), {**header, "features": described, "rows": listed})


def _check_finite(path: Path, features: dict[str, torch.Tensor], number: int) -> None:
    for name, rows in features.items():
        fits = rows.ndim == 2 and len(rows) == number and rows.dtype == torch.float32
        # piece by piece: at once it would take as much memory as the rows
        if not fits or not all(torch.isfinite(piece).all() for piece in rows.split(1024)):
            raise DataError(
                path,
                f"{name}: shape {tuple(rows.shape)}, or NaN",
                f"finite [{number}, D]",
                "run clip_feature_extractor.py again",
            )


def check_clip(
    found_clip: Mapping[str, Any], bank: Path, clip: Mapping[str, Any], model: Path | str
) -> None:
    """Raise DataError if the bank is of another CLIP (``found_clip``) than the model's targets.

    Features that were joined from elsewhere count where both were opened with them.
    """
    both = JOINED in found_clip and JOINED in clip
    compared = {key for key in {**clip, **found_clip} if both or key != JOINED}
    differing = [key for key in sorted(compared) if found_clip.get(key) != clip.get(key)]
    if differing:
        found, needed = (
            ", ".join(f"{key} {identity.get(key)}" for key in differing)
            for identity in (found_clip, clip)
        )
        raise DataError(
            bank,
            found,
            f"{needed}, as {model} was trained on",
            "use the features that the model was trained on, or train it on these",
        )
