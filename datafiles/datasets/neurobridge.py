"""THINGS-EEG2 and THINGS-MEG as NeuroBridge writes them: plain arrays beside an info.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datafiles.datasets.form import AGAIN, Form, Parsed, checked
from datafiles.pickles import damage_told, list_in, refuse_missing_keys
from rundirs.files import atomic_write, read_json, write_json
from util import DataError

NEUROBRIDGE_ARRAY = "an array (concepts, pictures, repetitions, channels, samples)"
INFO = "info.json"


def parse_neurobridge(path: Path) -> Parsed:
    """Raises DataError."""
    with damage_told(path, NEUROBRIDGE_ARRAY, "check --data_path and the subject's name"):
        eeg = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(eeg, np.ndarray) or not eeg.flags.c_contiguous:
        raise DataError(path, "no array in C order", NEUROBRIDGE_ARRAY, AGAIN)
    about, info = _info(path)
    refuse_missing_keys(about, info, ("ch_names", "times"), f"{INFO} of NeuroBridge", AGAIN)
    try:
        channels = [str(name) for name in list_in(info, "ch_names")]
        times = [float(second) for second in list_in(info, "times")]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(about, f"values of another kind ({error})", "lists", AGAIN) from None
    return checked(path, eeg, channels, times)


def _info(path: Path) -> tuple[Path, dict[str, Any]]:
    """The info.json of the subject, or of all, and where it lies. Raises DataError."""
    places = [folder / INFO for folder in (path.parent, path.parent.parent)]
    about = next((place for place in places if place.is_file()), None)
    if about is None:
        raise DataError(
            path,
            f"a plain array, and no {INFO} beside it",
            f"{INFO} with ch_names and times, in the subject's folder or the one above",
            f"copy {INFO}, too; an array alone does not say what its channels are",
        )
    info = read_json(about)
    if not isinstance(info, dict):
        raise DataError(about, f"a {type(info).__name__}", "ch_names and times", AGAIN)
    return about, info


def write_neurobridge(path: Path, given: Parsed, keys: Sequence[str]) -> None:
    """float32, and info.json beside it. Raises DataError unless concepts have as many pictures."""
    of_concept = Counter(key.split("/")[1] for key in keys)
    images = set(of_concept.values())
    if len(images) > 1:
        fewest = min(of_concept, key=lambda name: of_concept[name])
        raise DataError(
            path, f"{min(images)} pictures of {fewest}, {max(images)} of others",
            "as many of each concept: the form is one array", "choose another form",
        )  # fmt: skip
    eeg = np.asarray(given.eeg, np.float32)
    write_json(path.parent / INFO, {"ch_names": list(given.channels), "times": given.times})
    with atomic_write(path, "wb") as file:
        np.save(file, eeg.reshape(len(of_concept), -1, *eeg.shape[1:]))


NEUROBRIDGE = Form(
    name="neurobridge",
    title="THINGS-EEG2 or THINGS-MEG, NeuroBridge's form",
    licence="as the recordings: CC BY 4.0 (EEG), CC0 (MEG)",
    layout="sub-XX/train.npy and test.npy: arrays (concepts, pictures, repetitions, channels, "
    f"samples); {INFO} beside them or above: ch_names, times",
    order="concepts by name, pictures in them by name",
    splits="as THINGS-EEG2, or THINGS-MEG",
    traps=("the arrays name no pictures: only their number can be checked",),
    folders=("Preprocessed_data*", "."),
    files={"training": "train.npy", "test": "test.npy"},
    parse=parse_neurobridge,
    write=write_neurobridge,
)
