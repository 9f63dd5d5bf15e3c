"""Alljoined1 (``05_125``): trials of pictures of NSD in parquet files, a row each.

``EEG`` is 64 lists of 334 numbers in volts, BioSemi's cap at 512 Hz from 50 ms before the onset;
``73k_id`` is NSD's number of the picture, from 0, ``coco_id`` COCO's.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from datafiles import electrodes
from preprocessing.amplitude import check_amplitude
from preprocessing.cut_trials import CutTrials
from preprocessing.events import Pictures
from util import LOG, DataError

CHANNELS, RATE_HZ, FIRST_S = 64, 512.0, -0.05
NUMBERS = ("coco_id", "73k_id")  # by which the pictures of DATA may be called
TRIAL_COLUMNS = ("EEG", "subject_id", *NUMBERS)
GROUP = 64  # rows that are read at once
_AGAIN = "download it again from Alljoined/05_125"


def open_parquet(path: Path, subject: str, pictures: Pictures) -> CutTrials:
    """A person's trials, whole in memory (86 kB each). Raises DataError."""
    person, table, eeg = _rows(path, subject)
    if not len(eeg):
        raise DataError(
            path, f"no trial of subject_id {person}", f"trials of {subject}", "mend --subjects"
        )
    check_amplitude(path, float(np.median(eeg[:GROUP].std(axis=2))), {})
    column, rows = _found(path, table, pictures)
    LOG.info(
        "%s: pictures by %s; no channel is named: taken for BioSemi's 64, in the cap's order. "
        "Pictures were shown in blocks, those of both partitions mixed: docs/own_recordings.md",
        path.name, column,
    )  # fmt: skip
    times = FIRST_S + np.arange(eeg.shape[2]) / RATE_HZ
    shown = [rows.get(int(number)) for number in table[column]]
    names = electrodes.cap_names(CHANNELS)
    return CutTrials(path, names, times.tolist(), shown, lambda number: eeg[number])


def _rows(path: Path, subject: str) -> tuple[int, dict[str, np.ndarray], np.ndarray]:
    """(number of the person, {column: [n]}, EEG float32 [n, C, T])."""
    import pyarrow.parquet

    digits = re.fullmatch(r"sub-0*(\d{1,9})", subject)
    if digits is None:
        raise DataError("--subjects", subject, "sub- and the number of subject_id", "as sub-03")
    person, found, trials = int(digits[1]), {name: [] for name in NUMBERS}, []
    try:
        file = pyarrow.parquet.ParquetFile(path)
        lost = [name for name in TRIAL_COLUMNS if name not in file.schema_arrow.names]
        if lost:
            raise DataError(
                path, f"columns {', '.join(file.schema_arrow.names)}", f"also {', '.join(lost)}",
                _AGAIN,
            )  # fmt: skip
        for batch in file.iter_batches(GROUP, columns=list(TRIAL_COLUMNS)):
            own = np.flatnonzero(batch.column("subject_id").to_numpy() == person)
            for name, numbers in found.items():
                numbers.extend(batch.column(name).to_numpy()[own].tolist())
            trials += [np.array(batch.column("EEG")[row].as_py(), np.float32)
                       for row in own.tolist()]  # fmt: skip
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
        raise DataError(
            path, f"unreadable ({error or type(error).__name__})", "a parquet table", _AGAIN
        ) from None
    shapes = {trial.shape for trial in trials}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != CHANNELS for shape in shapes):
        raise DataError(
            path, f"EEG of shape {', '.join(map(str, sorted(shapes)[:3]))}",
            f"{CHANNELS} channels x 334 samples in each row", _AGAIN,
        )  # fmt: skip
    if not all(np.isfinite(trial).all() for trial in trials):
        raise DataError(path, "NaN or infinity", "finite values", _AGAIN)
    numbers = {name: np.array(of, np.int64) for name, of in found.items()}
    return person, numbers, np.array(trials, np.float32)


def _found(
    path: Path, table: dict[str, np.ndarray], pictures: Pictures
) -> tuple[str, dict[int, tuple[str, int]]]:
    """(the column by which most trials are of a picture of DATA, {number: partition, row})."""
    called: dict[int, list[tuple[str, int]]] = {}
    for partition, items in pictures.rows.items():
        for row, item in enumerate(items):
            digits = re.search(r"(\d{1,15})\D*$", Path(item.key).stem)
            if digits:
                called.setdefault(int(digits[1]), []).append((partition, row))
    known = {number: places[0] for number, places in called.items() if len(places) == 1}
    hits = {name: sum(number in known for number in of.tolist()) for name, of in table.items()}
    column = max(hits, key=hits.__getitem__)
    if not hits[column]:
        raise DataError(
            path, f"coco_id {table['coco_id'][0]}, 73k_id {table['73k_id'][0]}, ...",
            f"pictures of {pictures.data_path} whose names end in that number",
            "name them so: 000000123456.jpg by coco_id, or nsd00012.png by 73k_id",
        )  # fmt: skip
    return column, known
