"""THINGS-EEG2 as its authors publish it, and what preprocess.py writes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datafiles.datasets.form import Form, Parsed, checked
from datafiles.pickles import array_in, list_in, read_pickled_dict, refuse_missing_keys
from datafiles.stimuli import PARTITIONS
from rundirs.files import atomic_write
from util import DataError

EEG_FOLDER = "Preprocessed_data_250Hz"
EEG_FILE = {partition: f"preprocessed_eeg_{partition}.npy" for partition in PARTITIONS}
EEG_KEYS = ("preprocessed_eeg_data", "ch_names", "times")


def parse_published(path: Path) -> Parsed:
    """Raises DataError. The EEG is of the type and byte order that it has in the file."""
    return parse_pickled(path, EEG_KEYS, "take a preprocessed THINGS-EEG2")


def parse_pickled(path: Path, keys: tuple[str, str, str], cure: str) -> Parsed:
    """A pickled dict of data, channel names and times, under these keys. Raises DataError."""
    content, channels, times = published_content(path, keys, cure)
    return checked(path, array_in(content, keys[0]), channels, times)


def published_content(
    path: Path, keys: tuple[str, str, str], cure: str
) -> tuple[dict[str, Any], list[str], list[float]]:
    """A pickled dict whose data are an array, its channels and its times. Raises DataError."""
    content = read_pickled_dict(path)
    data, names, seconds = keys
    refuse_missing_keys(
        path, content, keys, f"{data}, {names} and {seconds}",
        f"{cure} file, or preprocess the recording (preprocess.py)",
    )  # fmt: skip
    try:
        array_in(content, data)
        channels = [str(name) for name in list_in(content, names)]
        times = [float(second) for second in list_in(content, seconds)]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            path,
            f"values of another kind ({error})",
            f"arrays {data} and {seconds}, a list {names}",
            "preprocess the recording again",
        ) from None
    return content, channels, times


def write_published(path: Path, given: Parsed, keys: Sequence[str]) -> None:
    """float32; rows have to be in the order of ``keys`` already."""
    values = (np.asarray(given.eeg, np.float32), list(given.channels), np.asarray(given.times))
    pickled_whole(path, dict(zip(EEG_KEYS, values, strict=True)))


def pickled_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a pickle, whole or not at all."""
    with atomic_write(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


THINGS_EEG2 = Form(
    name="things-eeg2",
    title="THINGS-EEG2, 250 Hz",
    licence="CC BY 4.0",
    layout=f"{EEG_FOLDER}/sub-XX/{EEG_FILE['training']} and ..._test.npy: a pickled dict of "
    "preprocessed_eeg_data (pictures, repetitions, channels, samples), ch_names, times",
    order="folders of concepts by name, files in them by name",
    splits="1,654 concepts x 10 pictures x 4 trials; 200 other concepts x 1 picture x 80 trials",
    traps=(
        "times hold the 50 samples of the baseline that the EEG has lost",
        "the OSF page's own files have 17 channels at 100 Hz: refused",
    ),
    folders=(EEG_FOLDER, "."),
    files=EEG_FILE,
    parse=parse_published,
    write=write_published,
)
