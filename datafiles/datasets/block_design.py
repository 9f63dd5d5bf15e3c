"""Recordings in blocks of one class each, EEGCVPR40 and EEG-ImageNet: DATA with an honest split.

All pictures of a class were shown in a row. EEG drifts: what lies in one block is alike whatever
was shown, so that a split by picture, as often published, is solved by telling the time. Source of
that finding: Li et al., "The Perils and Pitfalls of Block Design for EEG Classification
Experiments", IEEE TPAMI 2021.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

import util
from datafiles.datasets.alljoined import ALLJOINED, METADATA, PARTITION_OF
from datafiles.datasets.things_eeg2 import EEG_KEYS, pickled_whole
from datafiles.stimuli import BLOCK_LEAK, IMAGE_FOLDER, PARTITIONS, PICTURES
from datafiles.torch_files import read_torch_dict
from rundirs.files import file_hash, write_json
from rundirs.tensors import load_torch
from util import DataError, UserError

TEST_SHARE = 5  # of blocks, or of a block's pictures: one in as many is tested
MOST_STEPS_OF_BLOCKS = 40_000_000  # opcodes: EEG-ImageNet has 64,000 trials in two files
RATE_OF_BLOCKS_HZ = 1000.0
USED = {128: (20, 460), 62: (40, 440)}  # samples that are published of, by number of channels
TRIAL_KEYS = {"eeg": ("eeg", "eeg_data"), "image": ("image",), "label": ("label",),
              "subject": ("subject",)}  # fmt: skip
BLOCK_FILE = "a dict of dataset (a list of eeg, image, label, subject), images, labels"


@dataclass(frozen=True)
class Blocks:
    """What is converted, and how it is split; names as the flags of ``args.py``."""

    data_path: Path  # here: of the pictures
    blocks: Sequence[Path]
    output_path: Path
    split: str
    allow_block_leak: bool
    seed: int


@dataclass(frozen=True)
class _Trial:
    """``eeg`` [C, ~T]; ``picture``: its name without ending; ``block``: its class."""

    eeg: np.ndarray
    picture: str
    block: str
    subject: int


def convert_blocks(asked: Blocks) -> list[str]:
    """Write DATA, and what it holds in words. Raises UserError / DataError, before it writes."""
    if asked.split == "random" and not asked.allow_block_leak:
        raise UserError(
            "--split random",
            "pictures of a block in training and in test: what is alike in time is told apart from "
            "the rest without a look at any picture",
            "--split leave-block, where test has classes of its own",
            "--allow_block_leak makes it all the same, and marks everything that comes of it",
        )
    out = Path(asked.output_path)
    if out.exists() and any(out.iterdir()):
        raise UserError("--output_path", f"{out} is not empty", "a new folder", "name another")
    trials = [trial for path in asked.blocks for trial in read_blocks(Path(path))]
    window = _window_of(trials)
    pictures = _pictures_of(Path(asked.data_path), sorted({one.picture for one in trials}))
    block = {one.picture: one.block for one in trials}
    parts = split_blocks(trials, asked.split, asked.seed)
    _check_everybody_has_some(trials, parts)
    files = {Path(path).name: file_hash(Path(path)) for path in asked.blocks}
    if asked.split == "random":  # first: what a kill leaves behind is marked, too
        write_json(out / BLOCK_LEAK, {"split": "random", "files": files})
    for partition, names in parts.items():
        for name in sorted(names):
            source = pictures[name]
            _place(source, out / IMAGE_FOLDER[partition] / block[name] / source.name)
    _write_subjects(out / ALLJOINED.folders[0], trials, window, parts, pictures)
    write_json(out / "blocks.json", {"split": asked.split, "seed": asked.seed, "files": files})
    people = {one.subject for one in trials}
    return [
        f"{partition}: {len(names):,} pictures of {len({block[name] for name in names})} classes"
        for partition, names in parts.items()
    ] + [f"{len(people)} people, {len(trials):,} trials, split: {asked.split}; {out}"]


def split_blocks(trials: Sequence[_Trial], split: str, seed: int) -> dict[str, set[str]]:
    """{partition: pictures}. Test pictures are those that everybody saw."""
    of_block: dict[str, set[str]] = defaultdict(set)
    seen: dict[str, set[int]] = defaultdict(set)
    for one in trials:
        of_block[one.block].add(one.picture)
        seen[one.picture].add(one.subject)
    people = {one.subject for one in trials}
    draw = util.numpy_generator_for(seed, "blocks")
    blocks = sorted(of_block)
    if split == "leave-block":
        chosen = [of_block[block] for block in _drawn(blocks, draw)]
    else:
        chosen = [_drawn(sorted(of_block[block]), draw) for block in blocks]
    tested = set().union(*chosen)
    return {"training": seen.keys() - tested,
            "test": {one for one in tested if seen[one] == people}}  # fmt: skip


def _drawn(names: Sequence[str], draw: np.random.Generator) -> set[str]:
    """One in TEST_SHARE of them, at least one."""
    return set(draw.permutation(names)[: max(1, len(names) // TEST_SHARE)].tolist())


def _check_everybody_has_some(
    trials: Sequence[_Trial], parts: Mapping[str, Collection[str]]
) -> None:
    """Raise DataError unless each person has a trial of each partition."""
    people = {one.subject for one in trials}
    for partition, names in parts.items():
        if lost := people - {one.subject for one in trials if one.picture in names}:
            raise DataError(
                "--blocks", f"no {partition} trial of {len(lost)} of {len(people)} people",
                "pictures that all of them saw", "convert one of the files by itself",
            )  # fmt: skip


# ---------------------------------------------------------------- reading


def read_blocks(path: Path) -> list[_Trial]:
    """The trials of a file. Nothing in it is run. Raises DataError."""
    cure = "take the file as its authors publish it"
    if _is_zip(path):  # stays on the disk
        content = read_torch_dict(path, BLOCK_FILE, MOST_STEPS_OF_BLOCKS)
    else:
        content = load_torch(path, BLOCK_FILE, cure)
    listed = content.get("dataset")
    if not isinstance(listed, list) or not listed:
        raise DataError(path, f"keys {sorted(map(str, content))[:8]}", BLOCK_FILE, cure)
    try:
        return [_trial(one, content) for one in listed]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            path, f"a trial of another kind ({type(error).__name__}: {error})", BLOCK_FILE, cure
        ) from None


def _is_zip(path: Path) -> bool:
    """By its beginning: zipfile's own look at the end raises for damaged ones."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _trial(one: Mapping[str, Any], content: Mapping[str, Any]) -> _Trial:
    """Raises what a damaged one brings about."""
    found = {key: one[name] for key, names in TRIAL_KEYS.items() for name in names if name in one}
    eeg = _as_array(found["eeg"])
    if eeg.ndim != 2 or eeg.dtype.kind != "f":
        raise ValueError(f"EEG of shape {eeg.shape}, {eeg.dtype}")
    picture = _named(found["image"], content, "images")
    block = _named(found["label"], content, "labels")
    stem = PurePosixPath(picture).stem
    if "/" in block or not block or not stem or block.startswith("."):
        raise ValueError(f"class {block!r:.40} of {picture!r:.40}")
    return _Trial(eeg, stem, block, int(found["subject"]))


def _named(value: Any, content: Mapping[str, Any], among: str) -> str:
    """A name, or that of a number in the file's list of them."""
    if isinstance(value, str):
        return value
    number = int(value)
    if number < 0:
        raise ValueError(f"number {number} among {among}")
    name = content[among][number]
    return name if isinstance(name, str) else str(_as_array(name).item())


def _as_array(value: Any) -> np.ndarray:
    """An array or a tensor. TypeError for others: of nested lists NumPy would build all."""
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise TypeError(f"a {type(value).__name__}, not an array")
    return np.asarray(value)


def _pictures_of(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """{picture: its file}, below a folder of folders, as ImageNet is unpacked. Raises DataError."""
    found = {path.stem: path for path in sorted(folder.glob("*/*"))
             if path.suffix.lower() in PICTURES}  # fmt: skip
    lost = [name for name in names if name not in found]
    if lost:
        raise DataError(
            folder, f"{len(lost)} of {len(names)} pictures are not there, e.g. {lost[0]}",
            "CLASS/NAME.JPEG of each picture that was shown",
            "give --data_path the folder of ImageNet's folders of classes",
        )  # fmt: skip
    return {name: found[name] for name in names}


# ---------------------------------------------------------------- writing


def _place(source: Path, target: Path) -> None:
    """A picture at its place: the same file where it can be, or a copy. Links would leave DATA."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def _write_subjects(
    folder: Path,
    trials: Sequence[_Trial],
    window: tuple[int, int],
    parts: Mapping[str, Collection[str]],
    pictures: Mapping[str, Path],
) -> None:
    """Trials one by one, as ``alljoined`` has them: not everybody has one of each picture."""
    import pyarrow
    import pyarrow.parquet

    from rundirs.progress import Progress

    channels = [f"EEG{number:03d}" for number in range(1, len(trials[0].eeg) + 1)]
    first, last = window
    times = [sample / RATE_OF_BLOCKS_HZ for sample in range(first, last)]
    rows = []
    for subject in Progress(sorted({one.subject for one in trials}), desc="people", leave=False):
        for partition in PARTITIONS:
            own = [one for one in trials if one.subject == subject
                   and one.picture in parts[partition]]  # fmt: skip
            eeg = np.stack([one.eeg[:, first:last] for one in own]).astype(np.float32)
            file = folder / f"sub-{subject:02d}" / ALLJOINED.files[partition]
            pickled_whole(file, dict(zip(EEG_KEYS, (eeg, channels, times), strict=True)))
            rows += [
                {"subject": subject, "partition": PARTITION_OF[partition], "dropped": False,
                 "image_path": f"{one.block}/{pictures[one.picture].name}"} for one in own
            ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / METADATA[0])


def _window_of(trials: Sequence[_Trial]) -> tuple[int, int]:
    """The samples that every trial has, of those that are published of. Raises DataError."""
    widths = {len(one.eeg) for one in trials}
    shortest = min(one.eeg.shape[1] for one in trials)
    first, last = USED.get(min(widths), (0, shortest))
    last = min(last, shortest)
    if len(widths) > 1 or first >= last:
        raise DataError(
            "--blocks", f"trials of {sorted(widths)} channels, the shortest of {shortest} samples",
            f"one number of channels, more than {first} samples", "leave one of the files out",
        )  # fmt: skip
    return first, last
