"""THINGS-EEG2 and THINGS-MEG as UBP writes them, which other papers took over: ``torch.save``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datafiles.datasets.form import AGAIN, Form, Parsed, as_rows, checked, compact
from datafiles.pickles import array_in, list_in, refuse_missing_keys
from datafiles.stimuli import concept_of_folder
from datafiles.torch_files import read_torch_dict
from rundirs.files import atomic_write
from util import DataError

UBP_CONTENT = "a dict with eeg, img, ch_names and times, written by torch.save"
MEG_SENSORS, MEG_HZ = 271, 200.0  # what the MEG files leave out: names, and times from 0 s on
PICTURE_FOLDERS = {
    "train_images": "training_images", "training_images": "training_images",
    "test_images": "test_images",
}  # fmt: skip


def parse_ubp(path: Path) -> Parsed:
    """Raises DataError. MEG files have neither names nor times: numbers, and those of 200 Hz."""
    content = read_torch_dict(path, UBP_CONTENT)
    refuse_missing_keys(path, content, ("eeg", "img"), UBP_CONTENT, "take a file as UBP writes it")
    try:
        eeg = as_rows(array_in(content, "eeg"))
        channels, times = _names_and_times(path, content, eeg)
        pictures = _pictures(content["img"])
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(path, f"values of another kind ({error})", UBP_CONTENT, AGAIN) from None
    found = checked(path, eeg, channels, times, pictures)
    if len(pictures) != len(found.eeg):
        raise DataError(
            path, f"{len(pictures)} pictures in img, {len(found.eeg)} rows in eeg", "as many", AGAIN
        )
    return found


def _names_and_times(
    path: Path, content: Mapping[str, Any], eeg: np.ndarray
) -> tuple[list[str], list[float]]:
    """Raises DataError for a file without them, unless it is one of THINGS-MEG."""
    if "ch_names" not in content and "times" not in content and eeg.shape[2:3] == (MEG_SENSORS,):
        return (
            [f"MEG{number:03d}" for number in range(1, MEG_SENSORS + 1)],
            [sample / MEG_HZ for sample in range(eeg.shape[-1])],
        )
    keys = ("ch_names", "times")
    refuse_missing_keys(path, content, keys, UBP_CONTENT, "take a file as UBP writes it")
    return (
        [str(name) for name in list_in(content, "ch_names")],
        [float(second) for second in list_in(content, "times")],
    )


def _pictures(named: object) -> list[str]:
    """The key of each row's picture. Raises TypeError, ValueError where a row has several."""
    rows = named.tolist() if isinstance(named, np.ndarray) else named
    if not isinstance(rows, list):
        raise TypeError(f"img is a {type(named).__name__}")
    found = []
    for number, row in enumerate(rows):
        names = row if isinstance(row, list) else [row]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("img holds no names of pictures")
        if len(set(names)) != 1:
            raise ValueError(f"row {number} is of several pictures: {sorted(set(names))[:2]}")
        found.append(_key(names[0]))
    return found


def _key(name: str) -> str:
    """``train_images/00001_aardvark/aardvark_01b.jpg`` as a stimulus' key."""
    parts = PurePosixPath(name.replace("\\", "/")).parts[-3:]
    if len(parts) != 3 or parts[0] not in PICTURE_FOLDERS:
        raise ValueError(f"img holds {name!r:.80}, not train_images/CONCEPT/PICTURE")
    return "/".join((PICTURE_FOLDERS[parts[0]], *parts[1:]))


def write_ubp(path: Path, given: Parsed, keys: Sequence[str]) -> None:
    """float16 where it is enough; sessions are not known and left out."""
    import torch

    eeg = compact(given.eeg)
    back = {own: theirs for theirs, own in PICTURE_FOLDERS.items() if theirs != own}
    named = ["/".join((back.get(folder := key.split("/")[0], folder), *key.split("/")[1:]))
             for key in keys]  # fmt: skip
    concepts = [key.split("/")[1] for key in keys]
    number = {name: place for place, name in enumerate(dict.fromkeys(concepts))}
    columns = {
        "label": np.array([number[name] for name in concepts]),
        "img": np.array(named),
        "text": np.array([concept_of_folder(name) for name in concepts]),
    }
    wide = {name: np.tile(rows[:, None], (1, eeg.shape[1])) for name, rows in columns.items()}
    content = {"eeg": eeg, **wide, "ch_names": list(given.channels), "times": given.times}
    with atomic_write(path, "wb") as file:
        torch.save(content, file, pickle_protocol=5)


UBP = Form(
    name="ubp",
    title="THINGS-EEG2 or THINGS-MEG, UBP's form",
    licence="as the recordings: CC BY 4.0 (EEG), CC0 (MEG)",
    layout="Preprocessed_data_250Hz_whiten/sub-XX/train.pt and test.pt: torch.save of a dict of "
    "eeg float16 (pictures, repetitions, channels, samples), img, ch_names, times",
    order="any: img names the picture of each row",
    splits="as THINGS-EEG2, or THINGS-MEG",
    traps=(
        "whitened by training trials only: other units than THINGS-EEG2's own files",
        "its pictures' folder is train_images; here it is training_images",
        "its MEG files name neither sensors nor times: numbered, 200 Hz from 0 s",
    ),
    folders=("Preprocessed_data*", "."),
    files={"training": "train.pt", "test": "test.pt"},
    parse=parse_ubp,
    write=write_ubp,
    names_pictures=True,
)
