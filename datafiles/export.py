"""Recordings of DATA, written in another published form: dataset.py --export."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datafiles.datasets import registry
from datafiles.datasets.form import Form, Parsed
from datafiles.datasets.things_eeg2 import THINGS_EEG2
from datafiles.eeg_files import SIMULATED_NOTE, check_rows, list_subjects, parsed_recording
from datafiles.stimuli import PARTITIONS, list_stimuli
from util import DataError, UserError

NPY = "npy"  # what people call THINGS-EEG2's own form


@dataclass(frozen=True)
class Export:
    """What is written where; names as the flags of ``args.py``."""

    data_path: Path
    subjects: Sequence[str] | None
    dataset: str
    export: str
    output_path: Path


@dataclass(frozen=True)
class _Part:
    """One subject's partition, checked and not written yet."""

    source: Path
    target: Path
    given: Parsed
    keys: Sequence[str]


def form_named(name: str) -> Form:
    return THINGS_EEG2 if name == NPY else registry.FORMS[name]


def write_as_form(asked: Export) -> list[Path]:
    """The files written. Raises UserError / DataError, before the first is, and overwrites none."""
    from rundirs.progress import Progress

    form, parts = form_named(asked.export), _parts(asked)
    assert form.write is not None, f"{form.name} is offered and cannot be written"
    for part in Progress(parts, desc=f"writing {form.name}", unit="file"):
        form.write(part.target, part.given, part.keys)
        note = part.source.parent / SIMULATED_NOTE
        if note.exists():
            shutil.copyfile(note, part.target.parent / SIMULATED_NOTE)
    return [part.target for part in parts]


def _parts(asked: Export) -> list[_Part]:
    layout, form = registry.layout_in(asked.data_path, asked.dataset), form_named(asked.export)
    folder = asked.output_path / form.folders[0].replace("*", "_exported")
    stimuli = {partition: list_stimuli(asked.data_path, partition) for partition in PARTITIONS}
    found = []
    for name in list_subjects(asked.data_path, asked.subjects, asked.dataset):
        for partition, items in stimuli.items():
            source, target = layout.file(name, partition), folder / name / form.files[partition]
            if target.exists():
                raise UserError(
                    "--output_path", f"{target} is there already", "a new folder", "name another"
                )
            item = parsed_recording(source, items)
            check_rows(item, items)
            if item.counts is not None:
                raise DataError(
                    source, f"{min(item.counts)} to {max(item.counts)} trials of a picture",
                    "as many of each: the forms that are written are whole arrays",
                    "export another recording; the stages read this one as it is",
                )  # fmt: skip
            given = Parsed(item.eeg, item.channels, item.times)
            found.append(_Part(source, target, given, [one.key for one in items]))
    return found
