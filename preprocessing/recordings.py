"""Raw EEG as sessions of trials; the published files of THINGS-EEG2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from datafiles.eeg_files import RAW_FOLDER, SIMULATED_NOTE
from datafiles.pickles import array_in, list_in, read_pickled_dict, refuse_missing_keys
from datafiles.stimuli import PARTITIONS
from preprocessing.amplitude import EEG, Quantity, check_amplitude
from preprocessing.channels import check_unique
from preprocessing.signals import Sorted, glance
from rundirs.files import file_hash
from util import DataError, UserError

if TYPE_CHECKING:
    import mne

TARGET = 99999  # THINGS-EEG2: the picture that subjects had to detect; no trial
REPETITIONS = {"training": 2, "test": 20}  # of a picture in one session of THINGS-EEG2


@dataclass(frozen=True)
class Trials:
    """Onset sample, from the recording's beginning, and 0-based picture row of each trial.

    ``lines``: of the table that names them, where there is one.
    """

    onsets: np.ndarray
    conditions: np.ndarray
    lines: Sequence[int] = ()

    def chosen(self, which: np.ndarray) -> Trials:
        """Those of these indices, or where a mask [n] is true."""
        rows = np.arange(len(self.onsets))[which]
        lines = [self.lines[row] for row in rows] if self.lines else ()
        return Trials(self.onsets[rows], self.conditions[rows], lines)

    @property
    def told(self) -> list[str]:
        """For a message: the line of each."""
        return [f" (line {line})" for line in self.lines] or [""] * len(self.onsets)


@dataclass(frozen=True)
class RecordingSource:
    """Which recordings the flags of these names mean; without ``raw``, those of THINGS-EEG2.

    ``channels``: as asked; ``unit``: of the numbers in the files, where these are wrong or silent.
    """

    data_path: Path
    raw: list[Path] | None
    events: list[Path] | None
    subjects: list[str] | None
    sessions: int
    channels: list[str] | None
    unit: str | None


@dataclass(frozen=True)
class Recorded:
    """An opened recording, its trials by partition, and how many events are none, by reason.

    ``channels``: EEG and what is none; ``suspects``: {EEG channel: why it can be none};
    ``amplitude``, of ``quantity``; ``table``: what names the events; ``markers``: texts that mean
    pictures; ``warnings``: of the reader.
    """

    raw: mne.io.BaseRaw
    path: Path
    trials: Mapping[str, Trials]
    dropped: Mapping[str, int]
    channels: Sorted
    amplitude: float
    suspects: Mapping[str, str] = field(default_factory=dict)
    table: Path | None = None
    markers: Sequence[str] = ()
    warnings: Sequence[str] = ()
    quantity: Quantity = EEG


class Take(Protocol):
    """One recording that has not been opened yet."""

    path: Path

    def open(self) -> Recorded: ...

    def files(self) -> list[Path]: ...

    def signal_files(self) -> list[Path]: ...


@dataclass(frozen=True)
class Session:
    name: str
    takes: Sequence[Take]


@dataclass(frozen=True)
class Subject:
    """A person.

    ``repetitions``: how many trials of a picture each session has, where that is fixed; ``rows``:
    pictures by partition and ``pictures``: hashes of their names, where they are known.
    """

    name: str
    sessions: Sequence[Session]
    default_channels: str
    repetitions: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    simulated: Path | None = None

    def inputs(self) -> dict[str, str]:
        """Hashes of everything that is read."""
        files = {
            f"{session.name}/{path.name}": file_hash(path)
            for session in self.sessions
            for take in session.takes
            for path in take.files()
        }
        return {**files, **self.pictures}


# ---------------------------------------------------------------- THINGS-EEG2


@dataclass(frozen=True)
class PublishedTake:
    """``Raw_data/sub-XX/ses-0Y/raw_eeg_{partition}.npy``."""

    path: Path
    partition: str

    def files(self) -> list[Path]:
        return [self.path]

    def signal_files(self) -> list[Path]:
        return [self.path]

    def open(self) -> Recorded:
        """Read a pickled dict without running it, and its events. Raises DataError."""
        import mne

        data, names, kinds, rate_hz = _published_content(self.path)
        info = mne.create_info(names, rate_hz, kinds, verbose="error")
        raw = mne.io.RawArray(data, info, verbose="error")
        stim = next((name for name in names if name.lower() == "stim"), None)
        if stim is None:
            raise DataError(
                self.path,
                f"no channel stim among {len(names)}",
                "a stimulus channel with the picture's number at each onset",
                "download the file again",
            )
        events = mne.find_events(raw, stim_channel=stim, shortest_event=1, verbose="error")
        is_target = events[:, 2] == TARGET
        kept = events[~is_target]
        trials = Trials(kept[:, 0].astype(np.int64), kept[:, 2].astype(np.int64) - 1)
        of = {self.partition: trials}
        kinds = zip(names, kinds, strict=True)
        channels = Sorted([name for name, kind in kinds if kind == "eeg"], {})
        amplitude = glance(raw, channels.eeg, of).amplitude
        check_amplitude(self.path, amplitude, {})
        dropped = {"target": int(is_target.sum())}
        return Recorded(raw, self.path, of, dropped, channels, amplitude)


def _published_content(path: Path) -> tuple[np.ndarray, list[str], list[str], float]:
    """EEG [C, S], channel names and kinds [C], rate in Hz."""
    expected = "a pickled dict with raw_eeg_data, ch_names, ch_types and sfreq"
    cure = "download the raw file again"
    content = read_pickled_dict(path, expected, "check --data_path, --subjects and --sessions")
    keys = ("raw_eeg_data", "ch_names", "ch_types", "sfreq")
    refuse_missing_keys(path, content, keys, expected, cure)
    try:
        data = array_in(content, "raw_eeg_data")
        names = [str(name) for name in list_in(content, "ch_names")]
        kinds = [str(kind) for kind in list_in(content, "ch_types")]
        rate_hz = float(content["sfreq"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(path, f"values of another kind ({error})", expected, cure) from None
    if data.ndim != 2 or data.dtype.kind not in "fiu" or not 0 < len(names) == len(data):
        raise DataError(
            path,
            f"raw_eeg_data {data.dtype} {data.shape} for {len(names)} names",
            "numbers (channels, samples), a name for each channel",
            cure,
        )
    check_unique(path, names)
    if not 1 <= rate_hz <= 1e6:
        raise DataError(path, f"sfreq {rate_hz:g}", "a sampling rate in Hz", cure)
    if len(kinds) != len(names):
        raise DataError(path, f"{len(kinds)} ch_types", f"one for each of {len(names)}", cure)
    return data, names, kinds, rate_hz


def published_subjects(source: RecordingSource) -> list[Subject]:
    """The subjects below ``DATA/Raw_data``, with all their sessions. Raises DataError."""
    root, wanted = Path(source.data_path) / RAW_FOLDER, source.subjects
    found = sorted(path.name for path in root.glob("sub-*") if path.is_dir())
    if not found:
        raise DataError(
            root,
            "no subjects",
            "sub-XX/ses-0Y/raw_eeg_training.npy and raw_eeg_test.npy",
            "unpack THINGS-EEG2's raw data there, or name your own recordings with --raw",
        )
    lost = [name for name in wanted or [] if name not in found]
    if lost:
        raise UserError("--subjects", ", ".join(lost), f"some of {', '.join(found)}", "mend them")
    return [_published_subject(root / name, source.sessions) for name in wanted or found]


def _published_subject(folder: Path, sessions: int) -> Subject:
    takes = {}
    for number in range(1, sessions + 1):
        name = f"ses-{number:02d}"
        paths = {part: folder / name / f"raw_eeg_{part}.npy" for part in PARTITIONS}
        lost = [path for path in paths.values() if not path.is_file()]
        if lost:
            there = sorted(path.name for path in folder.glob("ses-*"))
            raise DataError(
                lost[0],
                f"no such file; there are {', '.join(there) or 'no sessions'}",
                f"{sessions} sessions with a training and a test file each",
                "download the missing session, or give --sessions N for the first N",
            )
        takes[name] = [PublishedTake(path, part) for part, path in paths.items()]
    note = folder / SIMULATED_NOTE
    return Subject(
        folder.name,
        [Session(name, items) for name, items in takes.items()],
        "things",
        repetitions=REPETITIONS,
        simulated=note if note.exists() else None,
    )
