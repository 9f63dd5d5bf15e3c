"""Raw EEG: the published THINGS-EEG2 files, and anything that MNE reads, as sessions of trials."""

from __future__ import annotations

import configparser
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from datafiles.eeg_files import RAW_FOLDER, SIMULATED_NOTE
from datafiles.published import array_in, list_in, read_pickled_dict, refuse_missing_keys
from datafiles.stimuli import PARTITIONS
from preprocessing.channels import ALL, check_unique, rename_channels
from preprocessing.events import EventTable, Pictures, onset_of, pictures_by_partition, read_table
from rundirs.files import file_hash
from util import DataError, UserError

if TYPE_CHECKING:
    import mne

TARGET = 99999  # THINGS-EEG2: the picture that subjects had to detect; no trial
REPETITIONS = {"training": 2, "test": 20}  # of a picture in one session of THINGS-EEG2
_UNREADABLE = (  # what MNE's readers raise for damaged files
    ValueError,
    OSError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    TypeError,
    EOFError,
    AttributeError,
    AssertionError,
    MemoryError,
    UnboundLocalError,
    configparser.Error,
    re.error,
    struct.error,
)


@dataclass(frozen=True)
class Trials:
    """Onset sample, from the recording's beginning, and 0-based picture row of each trial."""

    onsets: np.ndarray
    conditions: np.ndarray


@dataclass(frozen=True)
class Recorded:
    """An opened recording, its trials by partition, and how many events are none, by reason."""

    raw: mne.io.BaseRaw
    path: Path
    trials: Mapping[str, Trials]
    dropped: Mapping[str, int]


class Take(Protocol):
    """One recording that has not been opened yet."""

    path: Path

    def open(self) -> Recorded: ...

    def files(self) -> list[Path]: ...


@dataclass(frozen=True)
class Session:
    name: str
    takes: Sequence[Take]


@dataclass(frozen=True)
class Subject:
    """A person.

    ``repetitions``: how many trials of a picture each session has, where that is fixed; ``rows``:
    pictures by partition and ``pictures``: hash of their names, where they are known.
    """

    name: str
    sessions: Sequence[Session]
    default_channels: str
    repetitions: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    pictures: str = ""
    simulated: Path | None = None

    def inputs(self) -> dict[str, str]:
        """Hashes of everything that is read."""
        files = {
            f"{session.name}/{path.name}": file_hash(path)
            for session in self.sessions
            for take in session.takes
            for path in take.files()
        }
        return files | ({"pictures": self.pictures} if self.pictures else {})


# ---------------------------------------------------------------- THINGS-EEG2


@dataclass(frozen=True)
class PublishedTake:
    """``Raw_data/sub-XX/ses-0Y/raw_eeg_{partition}.npy``."""

    path: Path
    partition: str

    def files(self) -> list[Path]:
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
        check_onsets(self.path, trials)
        return Recorded(raw, self.path, {self.partition: trials}, {"target": int(is_target.sum())})


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


def published_subjects(
    data_path: Path, wanted: Sequence[str] | None, sessions: int
) -> list[Subject]:
    """The subjects below ``DATA/Raw_data``, with all their sessions. Raises DataError."""
    root = Path(data_path) / RAW_FOLDER
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
    return [_published_subject(root / name, sessions) for name in wanted or found]


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


# ---------------------------------------------------------------- own recordings


@dataclass(frozen=True)
class OwnTake:
    """A file that MNE reads, its table of events, and the pictures that it names.

    ``bids``: the folder, if it lies in one.
    """

    path: Path
    table: Path
    pictures: Pictures
    bids: Path | None = None

    def files(self) -> list[Path]:
        markers = self.path.with_suffix(".vmrk")  # BrainVision has three files, MNE names one
        read = [self.path, *map(Path, raw_files(self._read())), self.table]
        return list(dict.fromkeys([*read, markers] if markers.exists() else read))

    def _read(self) -> mne.io.BaseRaw:
        return read_raw(self.path, self.bids)

    def open(self) -> Recorded:
        """Its header and events; the signal is read when asked for. Raises DataError."""
        raw = self._read()
        events = read_table(self.table)
        shown, others = _shown_pictures(raw, events, self.path)
        dropped = {"without picture": events.skipped, "other marker": others}
        rows = [(*self.pictures.find(event, events), onset) for event, onset in shown]
        trials = {}
        for name in self.pictures.rows:
            own = [(onset, row) for partition, row, onset in rows if partition == name]
            if own:
                onsets, conditions = np.array(sorted(own), np.int64).T
                trials[name] = Trials(onsets, conditions)
                check_onsets(self.table, trials[name])
        return Recorded(raw, self.path, trials, dropped)


def _shown_pictures(
    raw: mne.io.BaseRaw, table: EventTable, path: Path
) -> tuple[list[tuple[Any, int]], int]:
    """[(line of the table, onset sample)] and the number of markers that mean no picture."""
    if table.kind == "marker":
        return _by_marker(raw, table, path)
    scale = raw.info["sfreq"] if table.kind == "onset" else 1
    shown = [(event, round(onset_of(event, table) * scale)) for event in table.shown]
    latest, onset = max(shown, key=lambda pair: pair[1])
    if onset >= raw.n_times:
        raise DataError(
            f"{table.path}, line {latest.line}",
            f"{table.kind} {latest.when}, after the end of {path.name}",
            f"less than {raw.n_times / raw.info['sfreq']:.1f} s ({raw.n_times} samples)",
            "give onset in seconds, or name the column sample; is it this recording's table?",
        )
    return shown, 0


def _by_marker(
    raw: mne.io.BaseRaw, table: EventTable, path: Path
) -> tuple[list[tuple[Any, int]], int]:
    of = {event.when: event for event in table.shown}
    if len(of) != len(table.shown):
        raise DataError(
            table.path, "a marker twice", "one picture per marker", "use onset or sample instead"
        )
    marks = _markers(raw)
    shown = [(of[text], onset) for text, onset in marks if text in of]
    if not shown:
        there = sorted({text for text, _ in marks})
        raise DataError(
            table.path,
            f"none of its markers in {path.name}, which has {', '.join(there[:8]) or 'none'}",
            "markers as the recording has them",
            "mend the column marker, or use onset or sample instead",
        )
    return shown, len(marks) - len(shown)


def _markers(raw: mne.io.BaseRaw) -> list[tuple[str, int]]:
    """(text, onset sample) of the annotations and of a stimulus channel."""
    import mne

    events, ids = mne.events_from_annotations(raw, event_id=None, verbose="error")
    text = {number: str(name) for name, number in ids.items()}
    marks = [(text[code], int(onset - raw.first_samp)) for onset, _, code in events]
    if len(mne.pick_types(raw.info, stim=True)):
        found = mne.find_events(raw, shortest_event=1, verbose="error")
        marks += [(str(code), int(onset - raw.first_samp)) for onset, _, code in found]
    return marks


def read_raw(path: Path, bids: Path | None = None) -> mne.io.BaseRaw:
    """Open a recording of any format of MNE, its EEG channels by their 10-05 names.

    Raises UserError for a missing file or package, DataError for an unreadable or odd one.
    """
    if not path.exists():
        raise UserError("--raw", f"{path}: no such file", "a recording", "check the path")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            raw = _open_any(path, bids)
        except ImportError as error:
            raise UserError(
                "--raw", f"{path}: {error}", "the package that reads this format", "pip install it"
            ) from None
        except _UNREADABLE as error:
            _refuse_duplicates(path, told)
            raise DataError(
                path,
                f"MNE cannot read it: {str(error).splitlines()[0] if str(error) else type(error)}",
                "a whole recording: .vhdr, .edf, .bdf, .set, .fif or another format of MNE",
                "copy it again with all files that belong to it, or convert it",
            ) from None
    _refuse_duplicates(path, told)
    check_files(raw, path, bids)
    rename_channels(raw, path)
    return raw


def _open_any(path: Path, bids: Path | None) -> mne.io.BaseRaw:
    import mne

    if bids is None:
        return mne.io.read_raw(path, preload=False, verbose="warning")
    mne_bids = import_mne_bids()
    return mne_bids.read_raw_bids(mne_bids.get_bids_path_from_fname(path), verbose="warning")


def _refuse_duplicates(path: Path, told: Sequence[warnings.WarningMessage]) -> None:
    """Raise DataError if MNE has said that it numbers channels of one name."""
    for warning in told:
        found = re.search(r"not unique, found duplicates for: \{(.*?)\}", str(warning.message))
        if found:
            check_unique(path, re.findall(r"'(.*?)'", found[1]) * 2)


def import_mne_bids() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import mne_bids
    except ImportError:
        raise UserError(
            "--raw", "a BIDS folder, and no mne-bids", "mne-bids", "pip install mne-bids"
        ) from None
    return mne_bids


def raw_files(raw: mne.io.BaseRaw) -> list[str]:
    return [str(name) for name in raw.filenames if name is not None]


def check_files(raw: mne.io.BaseRaw, path: Path, bids: Path | None) -> None:
    """Raise DataError if a header sends the reader to a file outside the recording's folder."""
    home = (bids or path.parent).resolve()
    for name in raw_files(raw):
        if not Path(name).parent.resolve().is_relative_to(home):
            raise DataError(path, f"its data in {name}", f"files inside {home}", "put them there")


def check_onsets(path: Path, trials: Trials) -> None:
    if len(np.unique(trials.onsets)) != len(trials.onsets):
        onset = trials.onsets[np.flatnonzero(np.diff(np.sort(trials.onsets)) == 0)[0]]
        raise DataError(
            path, f"two events at sample {onset}", "one picture at a time", "delete one of them"
        )


def own_subjects(
    data_path: Path,
    files: Sequence[Path],
    tables: Sequence[Path] | None,
    wanted: Sequence[str] | None,
) -> list[Subject]:
    """One subject with a session per file, or the subjects of a BIDS folder.

    Raises UserError / DataError.
    """
    pictures = pictures_by_partition(data_path)
    if len(files) == 1 and (files[0] / "dataset_description.json").is_file():
        return _bids_subjects(files[0], pictures, wanted)
    if len(wanted or []) != 1 or not re.fullmatch(r"sub-[A-Za-z0-9]+", wanted[0]):
        raise UserError(
            "--subjects",
            " ".join(wanted or ["(none)"]),
            "one name, as sub-01: --raw names one subject's recordings",
            "give --subjects sub-01",
        )
    tables = tables or [beside(path) for path in files]
    sessions = [
        Session(f"ses-{number:02d}", [OwnTake(path, table, pictures)])
        for number, (path, table) in enumerate(zip(files, tables, strict=True), start=1)
    ]
    notes = [path.parent / SIMULATED_NOTE for path in files]
    simulated = next((note for note in notes if note.exists()), None)
    return [_own_subject(wanted[0], sessions, pictures, simulated)]


def beside(path: Path) -> Path:
    """``x_eeg.vhdr`` or ``x.vhdr`` -> ``x_events.tsv``. Raises UserError where there is none."""
    table = path.with_name(re.sub(r"_eeg$", "", path.stem) + "_events.tsv")
    if not table.is_file():
        raise UserError(
            "--events",
            f"not given, and no {table}",
            "a table of events for each recording",
            "name them with --events; see docs/own_recordings.md",
        )
    return table


def _bids_subjects(root: Path, pictures: Pictures, wanted: Sequence[str] | None) -> list[Subject]:
    mne_bids = import_mne_bids()
    found = mne_bids.find_matching_paths(
        root,
        datatypes="eeg",
        suffixes="eeg",
        extensions=[".vhdr", ".edf", ".bdf", ".set", ".fif"],
        ignore_nosub=True,
    )
    by_subject: dict[str, list[OwnTake]] = {}
    for path in sorted(item.fpath for item in found):
        name = path.name.split("_")[0]
        by_subject.setdefault(name, []).append(OwnTake(path, beside(path), pictures, root))
    lost = [name for name in wanted or [] if name not in by_subject]
    if lost or not by_subject:
        raise UserError(
            "--subjects",
            ", ".join(lost) or f"no EEG in {root}",
            f"some of {', '.join(by_subject) or 'sub-01, sub-02, ...'}",
            "check the folder and the names",
        )
    note = root / SIMULATED_NOTE
    subjects = []
    for name in wanted or by_subject:
        takes = enumerate(by_subject[name], start=1)
        sessions = [Session(f"ses-{number:02d}", [take]) for number, take in takes]
        subjects.append(_own_subject(name, sessions, pictures, note if note.exists() else None))
    return subjects


def _own_subject(
    name: str, sessions: Sequence[Session], pictures: Pictures, simulated: Path | None
) -> Subject:
    return Subject(
        name, sessions, ALL, rows=pictures.counts, pictures=pictures.hash, simulated=simulated
    )
