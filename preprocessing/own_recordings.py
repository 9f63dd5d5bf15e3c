"""Users' own recordings: files and tables of events, or a BIDS folder, as sessions of trials."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datafiles import electrodes
from datafiles.eeg_files import SIMULATED_NOTE
from preprocessing.alljoined_raw import block_files, block_table, subject_folders
from preprocessing.amplitude import EEG, MEG, check_amplitude, in_volts
from preprocessing.brainvision import BrainVisionHeader
from preprocessing.channels import ALL, by_name
from preprocessing.events import EventTable, Pictures, onset_of, pictures_by_partition, read_table
from preprocessing.hints import explained
from preprocessing.reading import import_mne_bids, raw_files, read_raw
from preprocessing.recordings import Recorded, RecordingSource, Session, Subject, Trials
from preprocessing.signals import Sorted, glance, meg_type, sort_by_name
from preprocessing.things_meg import attributes_beside, run_table
from preprocessing.timeline import annotated, trigger_codes
from util import DataError, UserError

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True)
class OwnTake:
    """A file that MNE reads, its table of events, and the pictures that it names.

    ``table``: the file itself where it names its pictures, as Alljoined's.

    ``bids``: the folder, if it lies in one; ``named``: channels that were asked for by name;
    ``unit``: of --unit.
    """

    path: Path
    table: Path
    pictures: Pictures
    bids: Path | None = None
    named: Sequence[str] = ()
    unit: str | None = None

    def files(self) -> list[Path]:
        """Signal, markers and table: whatever changes the trials."""
        read = [self.path, *self.signal_files(), *self._markers(), self.table]
        read += filter(None, [attributes_beside(self.table)])
        read += block_files(self.path) if self.table == self.path else []
        return list(dict.fromkeys(file for file in read if file.is_file()))

    def signal_files(self) -> list[Path]:
        return raw_files(read_raw(self.path, self.bids).raw)

    def _markers(self) -> list[Path]:
        """BrainVision has three files, MNE names one of them."""
        if self.path.suffix.lower() != ".vhdr":
            return []
        named = BrainVisionHeader.read(self.path).marker_file
        return [named] if named is not None else []

    def open(self) -> Recorded:
        """Its header and events, and a glance at the signal. Raises DataError."""
        with explained(self.path):  # what is odd about a file may show in whatever is asked of it
            return self._open()

    def _events(self, raw: mne.io.BaseRaw) -> EventTable:
        if self.table == self.path:
            return block_table(self.path, raw, self.pictures)
        return run_table(self.table) or read_table(self.table)

    def _open(self) -> Recorded:
        opened = read_raw(self.path, self.bids)
        raw, events = opened.raw, self._events(opened.raw)
        shown, others = _shown_pictures(raw, events, self.path)
        dropped = {**events.dropped, "other marker": others}
        if events.published:  # it shows more pictures than one study takes
            everything, shown = shown, [pair for pair in shown if self.pictures.knows(pair[0])]
            dropped["of a picture that is not in DATA"] = len(everything) - len(shown)
        rows = [(*self.pictures.find(event, self.table), onset, event.line)
                for event, onset in shown]  # fmt: skip
        trials = {}
        for name in self.pictures.rows:
            own = [(onset, row, line) for part, row, onset, line in rows if part == name]
            if own:
                onsets, conditions, lines = np.array(sorted(own), np.int64).T
                trials[name] = Trials(onsets, conditions, lines.tolist())
        channels = sort_by_name(raw, self.named)
        quantity = MEG if meg_type(raw, self.named) else EEG
        if quantity is EEG:
            channels = in_volts(raw, self.path, opened.units, channels, self.unit)
        elif self.unit:
            raise UserError(
                "--unit",
                f"{self.unit}, and MEG in {self.path.name}",
                "EEG: MEG is in tesla",
                "leave it out",
            )
        seen = glance(raw, channels.eeg, trials)
        check_amplitude(self.path, seen.amplitude, opened.units, quantity)
        channels, suspects = self._judge(channels, seen.suspects())
        markers = [event.when for event in events.shown] if events.kind == "marker" else []
        return Recorded(
            raw, self.path, trials, dropped, channels, seen.amplitude, suspects, self.table,
            markers, opened.warnings, quantity,
        )  # fmt: skip

    def _judge(self, channels: Sorted, found: dict[str, str]) -> tuple[Sorted, dict[str, str]]:
        """What holds no EEG is left out; electrodes that do so are suspects; what was named stays.

        ``found``: {channel: why what is in it can be no EEG}.
        """
        named = {name.upper() for name in self.named}
        places = electrodes.positions(channels.eeg)
        doubted = {name: why for name, why in found.items() if name.upper() not in named}
        suspects = {name: why for name, why in doubted.items() if name in places}
        left = {name: why for name, why in doubted.items() if name not in places}
        return channels.without(left), suspects


def _shown_pictures(
    raw: mne.io.BaseRaw, table: EventTable, path: Path
) -> tuple[list[tuple[Any, int]], int]:
    """[(line of the table, onset sample)] and the number of markers that mean no picture."""
    if table.kind == "marker":
        return _by_marker(raw, table, path)
    scale = raw.info["sfreq"] * table.unit_s if table.kind == "onset" else 1
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
        there = sorted({repr(text) for text, _ in marks})
        raise DataError(
            table.path,
            f"none of its markers in {path.name}, which has {', '.join(there[:8]) or 'none'}",
            "markers as the recording has them",
            "mend the column marker, or use onset or sample instead",
        )
    return shown, len(marks) - len(shown)


def _markers(raw: mne.io.BaseRaw) -> list[tuple[str, int]]:
    """(text, onset sample) of the annotations and of a stimulus channel."""
    return [(text, onset) for text, onset, _ in annotated(raw)] + trigger_codes(raw)


def own_subjects(source: RecordingSource) -> list[Subject]:
    """One subject with a session per file, or the subjects of a BIDS folder.

    Raises UserError / DataError.
    """
    files, wanted = source.raw or [], source.subjects or []
    pictures = pictures_by_partition(source.data_path)
    if len(files) == 1 and (files[0] / "dataset_description.json").is_file():
        return _bids_subjects(source, pictures)
    blocks = subject_folders(files[0]) if len(files) == 1 else {}
    if blocks:
        takes = {name: [_take(source, path, path, pictures) for path in paths]
                 for name, paths in blocks.items()}  # fmt: skip
        return _people(source, takes, files[0], pictures)
    if len(wanted) != 1 or not re.fullmatch(r"sub-[A-Za-z0-9]+", wanted[0]):
        raise UserError(
            "--subjects",
            " ".join(wanted or ["(none)"]),
            "one name, as sub-01: --raw names one subject's recordings",
            "give --subjects sub-01",
        )
    tables = source.events or [beside(path) for path in files]
    sessions = [
        Session(f"ses-{number:02d}", [_take(source, path, table, pictures)])
        for number, (path, table) in enumerate(zip(files, tables, strict=True), start=1)
    ]
    notes = [path.parent / SIMULATED_NOTE for path in files]
    simulated = next((note for note in notes if note.exists()), None)
    return [_own_subject(wanted[0], sessions, pictures, simulated)]


def _take(
    source: RecordingSource, path: Path, table: Path, pictures: Pictures, bids: Path | None = None
) -> OwnTake:
    return OwnTake(path, table, pictures, bids, by_name(source.channels), source.unit)


def beside(path: Path) -> Path:
    """``x_eeg.vhdr``, ``x_meg.ds``, ``x.vhdr`` -> ``x_events.tsv``. UserError without one."""
    table = path.with_name(re.sub(r"_[em]eg$", "", path.stem) + "_events.tsv")
    if not table.is_file():
        raise UserError(
            "--events",
            f"not given, and no {table}",
            "a table of events for each recording",
            "name them with --events; see docs/own_recordings.md",
        )
    return table


def _bids_subjects(source: RecordingSource, pictures: Pictures) -> list[Subject]:
    root = source.raw[0]
    mne_bids = import_mne_bids()
    found = mne_bids.find_matching_paths(
        root,
        datatypes=["eeg", "meg"],
        suffixes=["eeg", "meg"],
        extensions=[".vhdr", ".edf", ".bdf", ".set", ".fif", ".ds"],
        ignore_nosub=True,
    )
    by_subject: dict[str, list[OwnTake]] = {}
    for path in sorted(item.fpath for item in found):
        name = path.name.split("_")[0]
        take = _take(source, path, beside(path), pictures, root)
        by_subject.setdefault(name, []).append(take)
    return _people(source, by_subject, root, pictures)


def _people(
    source: RecordingSource, by_subject: dict[str, list[OwnTake]], root: Path, pictures: Pictures
) -> list[Subject]:
    """Those that are wanted, with a session for each recording. Raises UserError."""
    wanted = source.subjects
    lost = [name for name in wanted or [] if name not in by_subject]
    if lost or not by_subject:
        raise UserError(
            "--subjects",
            ", ".join(lost) or f"no EEG or MEG in {root}",
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
        name, sessions, ALL, rows=pictures.counts, pictures=pictures.hashes, simulated=simulated
    )
