"""All that is scored, found and checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datafiles.datasets.registry import layout_in
from datafiles.eeg_files import list_subjects
from datafiles.feature_bank import FINAL_LAYER, Bank, check_clip, open_bank
from datafiles.stimuli import Stimulus, list_stimuli
from dataset import TestEEG, open_test
from decoder.decoder import Decoder, model_file
from evaluation import picture_scores, tables
from evaluation.pairing import Group, pair, stimuli_below
from modalities import NAMES
from rundirs.files import file_hash, json_hash, recorded_options
from rundirs.folds import runs_of
from util import UserError


@dataclass(frozen=True)
class RetrievalChoice:
    """Whose retrieval is scored, from which gallery; names as the flags of ``args.py``."""

    model_path: Path
    checkpoint: str
    subjects: list[str] | None
    clip_feature_path: Path
    data_path: Path
    dataset: str
    cache_dir: Path | None
    averaging: str
    test_views: int


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures are scored against which; names as the flags of ``args.py``."""

    images: Path
    control_images: list[Path] | None
    truth: Path | None
    data_path: Path | None
    protocol: str
    weights_dir: Path | None


@dataclass
class Opened:
    """All that is scored, found and checked before anything is computed."""

    bank: Bank | None = None
    models: dict[str, Decoder] = field(default_factory=dict)  # of each subject, or one for all
    hashes: dict[str, str] = field(default_factory=dict)  # of the models' files
    trained: list[dict[str, Any]] = field(default_factory=list)  # seed and checkpoint of each
    tests: list[TestEEG] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    training: list[Stimulus] = field(default_factory=list)  # where copies are looked for
    weights: dict[str, Path] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def plan(self) -> list[str]:
        lines = [f"score the retrieval of {test.subject}" for test in self.tests]
        lines += [
            f"score {len(group.pictures)} pictures of {len(group.stimuli)} stimuli: "
            f"{group.images}, {group.recipe}"
            for group in self.groups
        ]
        lines += [f"{images}: {lacks}" for images, lacks in self.unfinished.items()]
        return lines + [line.removeprefix("- ") for line in tables.skipped_lines(self.skipped)]

    @property
    def unfinished(self) -> dict[str, str]:
        """{run of pictures: what lacks of it}."""
        return {group.images: group.unfinished for group in self.groups if group.unfinished}


def open_retrieval(asked: RetrievalChoice, opened: Opened) -> None:
    """Models, gallery and test EEG, checked against each other. Raises UserError / DataError."""
    layout = layout_in(asked.data_path, asked.dataset)
    runs = runs_of(asked.model_path, asked.subjects)
    decoders = {name: Decoder.load(run, asked.checkpoint) for name, run in runs.items()}
    for decoder in decoders.values():
        decoder.test_views = asked.test_views
    layers = {layer for decoder in decoders.values() for layer in decoder.layers}
    alone = all(decoder.bank is None for decoder in decoders.values())
    needed = (FINAL_LAYER,) if alone else NAMES
    opened.bank = open_bank(asked.clip_feature_path, "test", layers, needed)
    for left_out, run in runs.items():
        decoder = decoders[left_out]
        check_clip(opened.bank.clip, opened.bank.path, decoder.clip, run)
        wanted = [left_out] if left_out else asked.subjects or decoder.signal["subjects"]
        key = f"model_{left_out}" if left_out else "model"
        opened.trained.append(_training_of(run, asked.checkpoint))
        opened.hashes[key] = file_hash(model_file(run, asked.checkpoint))
        for name in list_subjects(asked.data_path, wanted, asked.dataset):
            opened.models[name] = decoder
            opened.tests.append(
                open_test(
                    layout.file(name, "test"),
                    name,
                    asked.data_path,
                    asked.cache_dir,
                    decoder.reading(name),
                    asked.averaging,
                )
            )


def _training_of(run: Path, checkpoint: str) -> dict[str, Any]:
    """Which training a model is of."""
    seed = recorded_options(run).get("seed")
    return {"run": run.name, "seed": seed, "checkpoint": checkpoint}


def check_folder(flag: str, folder: Path, expected: str) -> None:
    """Raise UserError unless the folder is there."""
    if not folder.is_dir():
        raise UserError(flag, f"{folder}: no such folder", expected, "check the path")


def open_pictures(asked: PictureChoice, opened: Opened) -> None:
    """Pictures paired with stimuli, and the weights that are at hand. Raises as above."""
    folders = {"--images": [asked.images], "--control_images": asked.control_images or []}
    for flag, named in folders.items():
        for folder in named:
            check_folder(flag, folder, "a run of generate.py or a folder of pictures")
    if asked.weights_dir:
        check_folder("--weights_dir", asked.weights_dir, "a folder of weight files")
    if asked.truth:
        check_folder("--truth", asked.truth, "the pictures that were seen")
        stimuli = stimuli_below(asked.truth)
    else:
        stimuli = list_stimuli(asked.data_path, "test")
    opened.groups = pair(asked.images, asked.control_images or [], stimuli)
    found = picture_scores.available(asked.protocol, asked.weights_dir)
    opened.weights, opened.skipped = found


def identities(opened: Opened) -> dict[str, Any]:
    """Hashes of everything that is scored."""
    inputs: dict[str, Any] = {}
    if opened.models:
        inputs |= {**opened.hashes, "clip_features": opened.bank.hash}
        inputs |= {f"eeg_{test.subject}": test.hash for test in opened.tests}
    shown = {item.key: item.path for group in opened.groups for item in group.stimuli}
    drawn = [path for group in opened.groups for path in group.pictures]
    if opened.groups:
        inputs["stimuli"] = json_hash(
            [[key, file_hash(path)] for key, path in sorted(shown.items())]
        )
        inputs["pictures"] = json_hash(
            [[group.images, group.recipe, list(group.owner)] for group in opened.groups]
            + [file_hash(path) for path in drawn]
        )
        inputs["networks"] = sorted(opened.weights)
    if opened.training:
        known = [[item.key, file_hash(item.path)] for item in opened.training]
        inputs["training_pictures"] = json_hash(known)
    return inputs
