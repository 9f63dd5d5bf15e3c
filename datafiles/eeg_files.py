"""Preprocessed EEG: subjects, their float32 copies on disk, channels and samples by name."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datafiles.datasets import registry
from datafiles.datasets.form import DealtTrials, Parsed, joined
from datafiles.electrodes import LEAST_V, is_meg
from datafiles.pickles import DAMAGED
from datafiles.stimuli import IMAGE_FOLDER, Stimulus, keys_hashes
from modalities import AUTO
from rundirs.files import (
    file_hash,
    in_work,
    json_hash,
    read_json,
    recorded_options,
    remove_leftovers,
    write_json,
)
from util import DataError, UserError

RAW_FOLDER = "Raw_data"
SIMULATED_NOTE = "simulated.json"  # lies in a subject's folder if its EEG is simulated
_CACHE_VERSION = 3


@dataclass(frozen=True)
class Recording:
    """One subject, one partition.

    ``eeg``: memory-mapped float32 [N, R, C, T]; ``times``: s after onset; ``pictures``: keys of
    the stimuli in row order, where the file names them; ``counts``: of rows that have fewer than R
    trials, which come first; None: all have R.
    """

    eeg: Any
    channels: list[str]
    times: list[float]
    hash: str
    path: Path
    pictures: Sequence[str] | None = None
    counts: Sequence[int] | None = None

    def trials(self, row: int) -> np.ndarray:
        """The trials of a row [its own number of them, C, T]."""
        return self.eeg[row] if self.counts is None else self.eeg[row][: self.counts[row]]

    @property
    def trial_counts(self) -> np.ndarray:
        """int [N]: trials of each row."""
        rows, repetitions = self.eeg.shape[:2]
        return np.full(rows, repetitions) if self.counts is None else np.asarray(self.counts)


def open_recording(
    path: Path, cache_dir: Path, stimuli: Sequence[Stimulus] | None = None
) -> Recording:
    """Open a published file through its float32 copy, made on first use; later opens parse nothing.

    Rows are in the order of the ``stimuli``, where the file says of which picture each is. Raises
    DataError / UserError.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(
            source,
            "no such file",
            "a published EEG file",
            "check --data_path and the subject's name",
        )
    sortable = stimuli if stimuli and registry.names_pictures(source) else None
    copy = copy_of(source, cache_dir, sortable)
    about = copy.with_suffix(".json")
    if not about.exists():  # written last: a copy without it is unfinished
        _convert(source, copy, about, sortable)
    record = read_json(about)
    try:
        eeg = np.lib.format.open_memmap(copy, mode="r")
        if [*eeg.shape] != record["shape"] or eeg.dtype != np.float32:
            raise ValueError(f"{eeg.dtype} {eeg.shape}")
        names = {name: record[name] for name in ("channels", "times", "hash", "pictures", "counts")}
        return Recording(eeg, path=source, **names)
    except (OSError, *DAMAGED) as error:
        raise DataError(
            copy, f"unreadable ({error})", "the float32 copy of a recording", f"delete {about}"
        ) from None


def parsed_recording(path: Path, stimuli: Sequence[Stimulus] | None = None) -> Recording:
    """A file as it is, its type its own, without a copy and without its hash. Raises DataError."""
    eeg, channels, times, pictures = _in_order(path, stimuli)
    return Recording(eeg, channels, times, "", path, pictures, _counts(eeg))


def _in_order(path: Path, stimuli: Sequence[Stimulus] | None) -> Parsed:
    given = registry.parse(path)
    return joined(path, given, stimuli) if stimuli else given


def _counts(eeg: np.ndarray | DealtTrials) -> list[int] | None:
    return eeg.counts if isinstance(eeg, DealtTrials) else None


def copy_of(source: Path, cache_dir: Path, stimuli: Sequence[Stimulus] | None = None) -> Path:
    """Where the float32 copy of a recording lies, as long as the recording is the same.

    ``stimuli``: whose order the copy has, where that is not the file's own.
    """
    stat = source.stat()
    known = [_CACHE_VERSION, file_hash(source), stat.st_size, stat.st_mtime_ns]
    known += [item.key for item in stimuli or ()]
    return Path(cache_dir) / f"{source.parent.name}_{source.stem}_{json_hash(known)[:16]}.npy"


def _convert(source: Path, copy: Path, about: Path, stimuli: Sequence[Stimulus] | None) -> None:
    """Write the float32 copy, and last what there is to know about it."""
    eeg, channels, times, pictures = _in_order(source, stimuli)
    # jobs on several nodes may convert the same file, with the same process number
    temporary = copy.with_name(f".{copy.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(copy)
        _write_float32(temporary, eeg, channels, source)
        os.replace(temporary, copy)
    except OSError as error:
        raise UserError(
            "--cache_dir",
            f"{copy.parent}: {error.strerror}",
            f"a folder that can be written, with room for {4 * eeg.size / 1e9:.2g} GB",
            "name one with --cache_dir",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    write_json(
        about,
        {
            "source": str(source),
            "channels": channels,
            "times": times,
            "shape": list(eeg.shape),
            "hash": file_hash(source),
            "pictures": pictures,
            "counts": _counts(eeg),
        },
    )


def _write_float32(
    path: Path, eeg: np.ndarray | DealtTrials, channels: Sequence[str], source: Path
) -> None:
    """An .npy of finite values, row by row. Raises DataError, and OSError for a full disk.

    Written, not mapped: a page that no longer fits on the disk would kill the process.
    """
    from rundirs.progress import Progress

    name = f"converting {source.parent.name}/{source.name}"
    with open(path, "wb") as file:
        in_work(file)
        header = {"descr": "<f4", "fortran_order": False, "shape": eeg.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in Progress(range(len(eeg)), desc=name, leave=False):
            with np.errstate(over="ignore"):
                trials = np.ascontiguousarray(eeg[row], "<f4")
            if not np.isfinite(trials).all():
                bad = np.argwhere(~np.isfinite(trials))[0]
                raise DataError(
                    source,
                    f"NaN or infinity at condition {row}, repetition {bad[0]}, channel "
                    f"{channels[bad[1]]}, sample {bad[2]}",
                    "finite values",
                    "preprocess the recording again",
                )
            file.write(trials.data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Signal:
    """Which channels (by index) and which run of samples are read of a recording.

    ``scale``: what values are multiplied by, 1 for EEG in units of about its own deviation;
    ``spatial``: [C, C], what a sample of all channels is multiplied by then (datafiles.alignment).
    """

    channels: list[str]
    times: list[float]
    channel_rows: list[int]
    start: int
    scale: float = 1.0
    spatial: np.ndarray | None = None

    def cut(self, eeg: np.ndarray) -> np.ndarray:
        """[..., all channels, all samples] -> [..., C, T]; a view if all channels are in order."""
        eeg = eeg[..., self.start : self.start + len(self.times)]
        if self.channel_rows != list(range(eeg.shape[-2])):
            eeg = eeg[..., self.channel_rows, :]
        eeg = eeg if self.scale == 1 else eeg * self.scale
        if self.spatial is None:
            return eeg
        if isinstance(eeg, torch.Tensor):
            return torch.from_numpy(self.spatial).to(eeg) @ eeg
        return self.spatial @ eeg


def select_signal(
    recording: Recording, channels: Sequence[str] | None, window_s: Sequence[float] | None = None
) -> Signal:
    """Channels by name (default: all) and samples with start <= time < end. Raises UserError."""
    names = list(channels) if channels else list(recording.channels)
    lost = [name for name in names if name not in recording.channels]
    if lost:
        raise UserError(
            f"{recording.path}: channels",
            f"no {', '.join(lost)}; it has {' '.join(recording.channels)}",
            "channels of this recording",
            "choose among them with --channels",
        )
    start, stop = 0, len(recording.times)
    if window_s:
        inside = [
            i for i, t in enumerate(recording.times) if window_s[0] - 1e-9 <= t < window_s[1] - 1e-9
        ]
        if not inside:
            raise UserError(
                "--time_window",
                f"{window_s[0]} to {window_s[1]} s: no samples",
                f"a part of {recording.times[0]} to {recording.times[-1]} s",
                "choose another window",
            )
        start, stop = inside[0], inside[-1] + 1
    return Signal(
        names,
        recording.times[start:stop],
        [recording.channels.index(name) for name in names],
        start,
    )


def match_signal(recording: Recording, channels: Sequence[str], times: Sequence[float]) -> Signal:
    """The channels and samples a model was trained on, found here by name and by second."""
    signal = select_signal(recording, channels)
    available = np.asarray(recording.times)
    start = int(np.abs(available - times[0]).argmin())
    found = available[start : start + len(times)]
    if len(found) != len(times) or np.abs(found - np.asarray(times)).max() > 1e-3:
        raise DataError(
            recording.path,
            f"{len(available)} samples, {available[0]:.3f} to {available[-1]:.3f} s",
            f"the {len(times)} samples from {times[0]:.3f} to {times[-1]:.3f} s that the model was "
            "trained on",
            "resample the recording, or train with a --time_window that it has",
        )
    return Signal(signal.channels, list(times), signal.channel_rows, start)


SEEN_ROWS = 32  # of a recording, for its amplitude
AS_IT_IS = 1e-2  # the least deviation that networks read without a scale
MOST_APART = 1e3  # times the deviation that a model was trained on


def amplitude(recording: Recording, signal: Signal) -> float:
    """Median over the channels of the standard deviation over trials and time, times the scale."""
    rows = np.linspace(0, len(recording.eeg) - 1, min(SEEN_ROWS, len(recording.eeg))).astype(int)
    trials = [signal.cut(recording.eeg[row, 0]).astype(np.float64) for row in rows]
    _let_go(recording.eeg)
    return float(np.median(np.stack(trials).std(axis=(0, 2))))


def _let_go(eeg: Any) -> None:
    """Pages that were read of a mapped file leave this process' memory: of ten people's, 90 MB."""
    mapping = getattr(eeg, "_mmap", None)
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def common_scale(recordings: Sequence[Recording], signals: Sequence[Signal]) -> float:
    """The power of ten that brings small values near a deviation of 1; else 1.

    Volts (1e-5) and tesla (1e-13) are lost in the first normalisation of any network. Raises
    DataError for recordings of units that differ.
    """
    found = [amplitude(*pair) for pair in zip(recordings, signals, strict=True)]
    known = [size for size in found if size > 0]
    if known and max(known) > MOST_APART * min(known):
        least, most = (recordings[found.index(size)].path for size in (min(known), max(known)))
        raise DataError(
            most,
            f"a standard deviation of {max(known):.3g}, but {min(known):.3g} in {least}",
            "recordings of one unit",
            "leave some out with --subjects, or export them anew",
        )
    middle = float(np.exp(np.mean(np.log(known)))) if known else 1.0
    return 1.0 if middle >= AS_IT_IS else 10.0 ** -round(np.log10(middle))


def check_scale(recording: Recording, signal: Signal) -> None:
    """Raise DataError for a recording in another unit than the one that a model was trained on."""
    found = amplitude(recording, signal)
    most = MOST_APART if signal.scale != 1 else np.inf
    if found and not 1 / MOST_APART <= found <= most:
        raise DataError(
            recording.path,
            f"a standard deviation of {found / signal.scale:.3g}",
            f"about {1 / signal.scale:.0e}, as what the model was trained on",
            "export the recording in the unit of the training recordings",
        )


def eeg_file(data_path: Path, subject: str, partition: str) -> Path:
    return registry.layout_in(data_path).file(subject, partition)


def list_subjects(data_path: Path, wanted: Sequence[str] | None, dataset: str = AUTO) -> list[str]:
    """The wanted subjects, or all that have a folder. Raises DataError / UserError."""
    layout = registry.layout_in(data_path, dataset)
    found = layout.subjects()
    if not found:
        raise DataError(
            layout.folder, "no subjects", "folders sub-01, sub-02, ...", "check --data_path"
        )
    lost = [name for name in wanted or [] if name not in found]
    if lost:
        raise UserError(
            "--subjects", ", ".join(lost), f"some of {', '.join(found)}", "check the names"
        )
    return list(wanted) if wanted else found


def cache_home(file: Path) -> Path:
    """Where the copy of an EEG file that lies in no DATA goes: its folder, but never behind a link.

    A subject's folder, or the one of all subjects, may be a link into a store: git-annex, clusters.
    """
    subject, everyone = Path(file).parents[:2]
    if everyone.is_symlink():
        return everyone.parent
    return everyone if subject.is_symlink() else subject


def cache_folder(data_path: Path, cache_dir: Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(data_path) / "eeg_cache"


def check_rows(recording: Recording, stimuli: Sequence[Stimulus]) -> None:
    """Raise DataError unless there is one EEG row per picture, and as far as is known its own."""
    if len(recording.eeg) != len(stimuli):
        raise DataError(
            recording.path,
            f"{len(recording.eeg)} conditions, but {len(stimuli)} pictures in "
            f"{stimuli[0].key.split('/')[0]}",
            "one condition per picture, both sorted by name",
            "complete the pictures or use the EEG that belongs to them",
        )

    if recording.pictures is not None:
        _check_pictures(recording.path, recording.pictures, stimuli)
    _check_names(recording.path.parent / "inputs.json", stimuli)


def _check_pictures(path: Path, named: Sequence[str], stimuli: Sequence[Stimulus]) -> None:
    """Compare the pictures with those that the recording's file names, row by row."""
    for row, (name, stimulus) in enumerate(zip(named, stimuli, strict=True)):
        if name != stimulus.key:
            raise DataError(
                path,
                f"row {row} is of {name}, but the picture there is {stimulus.key}",
                "the pictures that the file names, in its order",
                "take the pictures that belong to it, under their own names",
            )


def _check_names(noted: Path, stimuli: Sequence[Stimulus]) -> None:
    """Compare the pictures with those that ``preprocess.py`` noted beside the EEG that it wrote."""
    inputs = read_json(noted) if noted.is_file() else None
    shown = inputs if isinstance(inputs, dict) else {}
    for folder, names in keys_hashes({stimuli[0].partition: stimuli}).items():
        if shown.get(folder, names) != names:
            raise DataError(
                noted.parent,
                f"EEG of other pictures than those of {folder}: names were changed, or pictures "
                "added or removed, since",
                "the pictures that preprocess.py saw",
                "bring back their names, or preprocess the recordings again",
            )


def mean_trial(recording: Recording, signal: Signal, row: int) -> np.ndarray:
    """Mean over a row's trials: float32 [C, T]; zeros of a row without any."""
    trials = recording.trials(row)
    return signal.cut(trials if len(trials) else recording.eeg[row]).mean(axis=0, dtype=np.float32)


def average_trials(recording: Recording, signal: Signal) -> torch.Tensor:
    """Mean over all repetitions: float32 [N, C, T], read row by row."""
    rows = [mean_trial(recording, signal, row) for row in range(len(recording.eeg))]
    return torch.from_numpy(np.stack(rows))


def stored_unit(path: Path) -> str:
    """Of a subject's file or folder: ``whitened`` or ``V``, as preprocess.py noted; else empty.

    Simulated EEG is made in units of whitened recordings.
    """
    folder = path if path.is_dir() else path.parent
    whiten = recorded_options(folder).get("whiten")
    if whiten is None:  # downloaded, or simulated
        return "whitened" if (folder / SIMULATED_NOTE).is_file() else ""
    return "whitened" if whiten else "V"


def unit_of(recording: Recording) -> str:
    """As :func:`stored_unit`, or ``T`` for MEG whose values can be nothing else."""
    noted = stored_unit(recording.path)
    if noted or not is_meg(recording.channels):
        return noted
    return "T" if amplitude(recording, select_signal(recording, None)) < LEAST_V else ""


def is_simulated(data_path: Path | None) -> bool:
    """Whether a subject below DATA carries the simulator's own note: nobody was recorded."""
    layouts = registry.layouts_in(data_path) if data_path is not None else ()
    return any(
        (layout.folder / subject / SIMULATED_NOTE).exists()
        for layout in layouts
        for subject in layout.subjects()
    )


def locate_test_eeg(
    eeg_data: Path, subject: str | None, data_path: Path | None
) -> tuple[Path, str, Path | None]:
    """(file, subject, DATA or None) from a file, a ``sub-XX`` folder or DATA. Raises UserError.

    Subject and DATA are those of the path as given: files, and folders on the way, may be links.
    """
    eeg_data = Path(eeg_data)
    if not eeg_data.exists():
        raise UserError(
            "--eeg_data", f"{eeg_data}: no such file or folder", "a test recording, its folder, or "
            "DATA", "check the path",
        )  # fmt: skip
    file = eeg_data if eeg_data.is_file() else _test_file(eeg_data, subject)
    file = Path(os.path.abspath(file))
    subject = subject or file.parent.name
    if data_path is None:
        homes = (home for home in file.parents[1:4] if (home / IMAGE_FOLDER["test"]).is_dir())
        data_path = next(homes, None)
    return file, subject, data_path


def _test_file(folder: Path, subject: str | None) -> Path:
    """The test recording in a subject's folder, or of the one subject or ``subject`` in DATA."""
    own = registry.tested_in(folder)
    if len(own) > 1:
        raise UserError(
            "--eeg_data", f"several test recordings: {', '.join(file.name for file in own)}",
            "one", "give the file",
        )  # fmt: skip
    if own:
        return own[0]
    layout = registry.layout_in(folder)
    names = [name for name in layout.subjects() if layout.file(name, "test").exists()]
    if subject not in names and not (subject is None and len(names) == 1):
        raise UserError(
            "--subject",
            subject,
            f"one of {', '.join(names) or '(none found)'} in {layout.folder}",
            "name one of them",
        )
    return layout.file(subject or names[0], "test")
