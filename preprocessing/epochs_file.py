"""Trials that are cut already, joined with DATA by name: MNE's ``*-epo.fif``, Alljoined's parquet.

So THINGS-MEG and Alljoined1 publish their trials, and so others keep their own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datafiles.datasets.things_eeg2 import EEG_FILE, EEG_FOLDER
from datafiles.stimuli import STIMULUS_COLUMNS
from preprocessing.cut_trials import CutTrials
from preprocessing.epochs_parquet import open_parquet
from preprocessing.events import Pictures, Shown, file_in, pictures_by_partition
from preprocessing.fif import check_tags
from preprocessing.hints import explained
from preprocessing.merging import places, write_streamed
from util import DataError, UserError

if TYPE_CHECKING:
    import mne

NAMING_COLUMNS = (*STIMULUS_COLUMNS, "image_path", "stim")  # of an epochs file's metadata


@dataclass(frozen=True)
class EpochsChoice:
    """Whose trials are taken from where; names as the flags of ``args.py``."""

    data_path: Path
    epochs_file: Sequence[Path]
    subjects: Sequence[str] | None
    output_path: Path | None
    seed: int
    dry_run: bool


def convert_epochs(asked: EpochsChoice) -> list[str]:
    """Write a subject's two files; what they hold, in words. Raises UserError / DataError."""
    subjects = asked.subjects or []
    if len(subjects) != 1:
        raise UserError(
            "--subjects", " ".join(subjects) or "(none)", "one name, as sub-01",
            "--epochs_file names one subject's trials",
        )  # fmt: skip
    folder = Path(asked.output_path or asked.data_path) / EEG_FOLDER / subjects[0]
    if folder.exists():
        raise UserError(
            "--subjects", f"{folder} is there already", "a new subject, or another --output_path",
            "nothing is overwritten: move it away",
        )  # fmt: skip
    pictures = pictures_by_partition(asked.data_path)
    files = [_open(path, subjects[0], pictures) for path in asked.epochs_file]
    _check_same_signal(files)
    lines, planned = [], {}
    for partition in pictures.rows:
        where, number = f"{subjects[0]}: {partition} trials", len(pictures.rows[partition])
        rows = [one.of(partition)[1] for one in files]
        planned[partition] = places(rows, number, False, asked.seed, where)
        lines.append(
            f"{where}: {number:,} pictures x {len(planned[partition][0])} repetitions x "
            f"{len(files[0].channels)} sensors x {len(files[0].times)} samples"
        )
    lost = sum(shown is None for one in files for shown in one.shown)
    lines.append(f"{subjects[0]}: {lost:,} trials show no picture of DATA, and are left out")
    if not asked.dry_run:
        half = folder.with_name(f".{folder.name}.tmp")  # a killed call leaves no subject behind
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for partition, at in planned.items():
            _write(half / EEG_FILE[partition], files, partition, at)
        half.rename(folder)
    return lines


def _open(path: Path, subject: str, pictures: Pictures) -> CutTrials:
    if not path.is_file():
        raise DataError(
            path, "no such file", "an epochs file of MNE, *-epo.fif, or a parquet table of trials",
            "check the path",
        )  # fmt: skip
    if path.suffix.lower() == ".parquet":
        return open_parquet(path, subject, pictures)
    return open_epochs(path, pictures)


def open_epochs(path: Path, pictures: Pictures) -> CutTrials:
    """Raises DataError for a file that is damaged, or does not say what was shown."""
    import mne

    check_tags(path)
    with explained(path):
        epochs = mne.read_epochs(path, preload=False, verbose="error")
        names = _named(path, epochs)
        meg = mne.pick_types(epochs.info, meg=True, ref_meg=False)
        sensors = meg if len(meg) else mne.pick_types(epochs.info, eeg=True)
    if not len(sensors) or not len(names):
        raise DataError(
            path, f"{len(names)} trials of {len(sensors)} sensors", "trials of MEG or EEG",
            "name the file of one person's trials",
        )  # fmt: skip
    channels = [epochs.ch_names[number] for number in sensors]

    def read(number: int) -> np.ndarray:
        with explained(path):
            return epochs[[number]].get_data(picks=sensors.tolist(), verbose="error")[0]

    times = epochs.times.tolist()
    return CutTrials(path, channels, times, _found(path, names, pictures), read)


def _named(path: Path, epochs: mne.BaseEpochs) -> list[str]:
    """What each trial shows, by the metadata or else by the names of the events."""
    if epochs.metadata is None:
        name_of = {code: name for name, code in epochs.event_id.items()}
        return [name_of[code] for code in epochs.events[:, 2].tolist()]
    records = epochs.metadata  # of pandas where that is installed
    rows: Sequence[Mapping[str, object]] = (
        records if isinstance(records, list) else records.to_dict("records")
    )
    column = next((name for name in NAMING_COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise DataError(
            path, f"metadata of {', '.join(map(str, rows[0])) if rows else 'no trial'}",
            f"one of the columns {', '.join(NAMING_COLUMNS)}", "add it, and save the file again",
        )  # fmt: skip
    return [str(row[column]) for row in rows]


def _found(path: Path, names: Sequence[str], pictures: Pictures) -> list[tuple[str, int] | None]:
    known: dict[str, tuple[str, int] | None] = {}
    for number, name in enumerate(names):
        if name not in known:
            event = Shown(number + 1, "", file_in(name))
            known[name] = pictures.find(event, path) if pictures.knows(event) else None
    if not any(known.values()):
        raise DataError(
            path, f"trials of {Counter(names).most_common(1)[0][0]!r}, ...",
            f"pictures of {pictures.data_path}, by their file names", "put the pictures there",
        )  # fmt: skip
    return [known[name] for name in names]


def _check_same_signal(files: Sequence[CutTrials]) -> None:
    first = files[0]
    for one in files[1:]:
        same = one.channels == first.channels and len(one.times) == len(first.times)
        if not same or not np.allclose(one.times, first.times):
            raise DataError(
                one.path, f"{len(one.channels)} sensors x {len(one.times)} samples, or other ones",
                f"those of {first.path}: {len(first.channels)} x {len(first.times)}",
                "cut all of a person's recordings alike",
            )  # fmt: skip


def _write(
    path: Path, files: Sequence[CutTrials], partition: str, at: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """A partition's file, float32, one picture after the other."""
    from rundirs.progress import Progress

    shape = (len(at), len(at[0]), len(files[0].channels), len(files[0].times))
    bar = Progress(at, desc=path.stem, unit="picture", leave=False)
    about = {"ch_names": files[0].channels, "times": files[0].times}
    write_streamed(path, shape, "float32", _content(files, partition, bar), about)


def _content(
    files: Sequence[CutTrials], partition: str, at: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[bytes]:
    numbers = [one.of(partition)[0] for one in files]
    for repetitions in at:
        for file, place in repetitions:
            yield files[file].trial(int(numbers[file][place])).tobytes()
