"""Alljoined-1.6M: trials one by one, and a table that says which picture each was of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from datafiles.datasets.form import AGAIN, DealtTrials, Form, Parsed, checked
from datafiles.datasets.things_eeg2 import EEG_KEYS, published_content
from datafiles.pickles import array_in
from util import DataError

# a table beside each person's recording, as released, or one for all
METADATA = ("experiment_metadata_categories.parquet", "experiment_metadata.parquet")
PARTITION_OF = {"training": "stim_train", "test": "stim_test"}  # what the table calls them
COLUMNS = ("partition", "dropped", "image_path")
OF_CATEGORY = ("category_num", "category_name", "category_img_num")  # from 0, ., from 0
MOST_ROWS = 10_000_000  # of a table; all twenty people have 1.6 million


def parse_alljoined(path: Path) -> Parsed:
    """Rows are pictures by name; their repetitions differ. Raises DataError."""
    content, channels, times = published_content(path, EEG_KEYS, "take a preprocessed Alljoined")
    flat = array_in(content, EEG_KEYS[0])
    if flat.ndim != 3:
        raise DataError(path, f"EEG of shape {flat.shape}", "(trials, channels, samples)", AGAIN)
    shown = _shown(path, len(flat))
    names = sorted(set(shown))
    number = {name: row for row, name in enumerate(names)}
    index = _index(np.array([number[name] for name in shown]), len(names))
    found = checked(path, flat[:, None], channels, times)  # names and times, by one trial each
    return Parsed(DealtTrials(flat, index), found.channels, found.times, names)


def _index(row: np.ndarray, rows: int) -> np.ndarray:
    """int [rows, R]: the trials of each row in their order, from the row [M] of each trial."""
    counts = np.bincount(row, minlength=rows)
    order = np.argsort(row, kind="stable")
    repetition = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((rows, counts.max()), -1)
    index[row[order], repetition] = order
    return index


def _shown(path: Path, trials: int) -> list[str]:
    """The picture of each trial. Raises DataError where table and trials do not fit."""
    partition = "test" if "test" in path.stem else "training"
    about, table = _table(path)
    wanted = PARTITION_OF[partition]
    whose = [name == wanted for name in table["partition"]]
    if "subject" in table:
        whose = [here and _is(name, path.parent.name)
                 for here, name in zip(whose, table["subject"], strict=True)]  # fmt: skip
    kept = [here and not dropped for here, dropped in zip(whose, table["dropped"], strict=True)]
    if sum(kept) != trials:
        raise DataError(
            path,
            f"{trials:,} trials; {about.name} has {sum(kept):,} of {wanted} that were kept, and "
            f"{sum(whose):,} with those that were dropped",
            "a trial for each row of the table that is not dropped",
            "take the table that belongs to the recording",
        )
    shown = [name for name, here in zip(_named(table), kept, strict=True) if here]
    if not all(isinstance(name, str) and name for name in shown):
        raise DataError(about, "rows without image_path", "the picture of each", AGAIN)
    return shown


def _named(table: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """The picture of each row: ``image_path``, or where that is a number its place in DATA."""
    paths = table["image_path"]
    numbers = all(isinstance(path, str) and PurePath(path).stem.isdigit() for path in paths)
    if not numbers or not all(name in table for name in OF_CATEGORY):
        return paths
    return ["/".join(str(part).replace(" ", "_") for part in row)
            for row in zip(*(table[name] for name in OF_CATEGORY), strict=True)]  # fmt: skip


def _is(named: object, folder: str) -> bool:
    """Whether a subject, ``3``, ``03`` or ``sub-03``, is the one of the folder."""
    number, own = (str(name).removeprefix("sub-").lstrip("0") for name in (named, folder))
    return number == own


def metadata_of(path: Path) -> Path | None:
    """The table beside a person's recording, or above it."""
    places = [folder / name for folder in list(path.parents)[:3] for name in METADATA]
    return next((place for place in places if place.is_file()), None)


def picture_names(path: Path) -> list[tuple[str, int, str]]:
    """(partition, number, name) of the pictures that a person's table knows.

    The number is the last digits of ``image_path``. Raises DataError.
    """
    about, table = _table(path)
    found = {}
    for partition, image, name in zip(
        table["partition"], table["image_path"], _named(table), strict=True
    ):
        digits = re.search(r"(\d{1,9})$", PurePath(str(image)).stem)
        if digits is not None:
            found[str(partition), int(digits[1])] = str(name)
    if not found:
        raise DataError(about, "image_path without numbers", "00012.jpg, ... of each", AGAIN)
    return [(*key, name) for key, name in found.items()]


def _table(path: Path) -> tuple[Path, Mapping[str, Sequence[Any]]]:
    """The table of a person's recording, by column. Raises DataError."""
    about = metadata_of(path)
    if about is None:
        raise DataError(
            path, f"trials one by one, and no {METADATA[0]}",
            f"{METADATA[0]} beside the file, or in the two folders above",
            "copy it there: without it nothing says which picture a trial is of",
        )  # fmt: skip
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(about)
        there = file.schema_arrow.names
        rows = file.metadata.num_rows
        lost = [name for name in COLUMNS if name not in there]
        wanted = [name for name in (*COLUMNS, *OF_CATEGORY, "subject") if name in there]
        table = {} if lost or rows > MOST_ROWS else file.read(wanted).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            about, f"unreadable ({error or type(error).__name__})", "a parquet table", AGAIN
        ) from None
    if not table:
        raise DataError(
            about, f"{rows:,} rows of {', '.join(there)}", f"columns {', '.join(COLUMNS)}", AGAIN
        )
    return about, table


ALLJOINED = Form(
    name="alljoined",
    title="Alljoined-1.6M, 250 Hz",
    licence="as its page says",
    layout="preprocessed_eeg/sub-XX/preprocessed_eeg_training_flat.npy and ..._test_flat.npy: a "
    "pickled dict of preprocessed_eeg_data (trials, channels, samples), ch_names, times; "
    f"{METADATA[0]} beside them or above",
    order="any: the table names the picture of each trial, or its place among its concept's",
    splits="as THINGS-EEG2: 1,654 concepts x 10 pictures x up to 4 trials; 200 x 1 x up to 80",
    traps=(
        "trials were dropped: pictures have different numbers of them, some training pictures none",
        "the table's rows fit the trials only after partition and dropped == False",
    ),
    folders=("preprocessed_eeg", "."),
    files={
        "training": "preprocessed_eeg_training_flat.npy",
        "test": "preprocessed_eeg_test_flat.npy",
    },
    parse=parse_alljoined,
    names_pictures=True,
)
