"""All published forms: found in DATA by the names of files, told of a file by its content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datafiles.datasets.alljoined import ALLJOINED
from datafiles.datasets.form import Form, Parsed
from datafiles.datasets.neurobridge import NEUROBRIDGE
from datafiles.datasets.things_eeg2 import EEG_KEYS, THINGS_EEG2
from datafiles.datasets.things_meg import MEG_KEYS, THINGS_MEG
from datafiles.datasets.ubp import UBP
from datafiles.pickles import damage_told, mapped_file, npy_dtype, read_pickled_dict
from modalities import AUTO
from util import UserError

FORMS = {form.name: form for form in (THINGS_EEG2, UBP, NEUROBRIDGE, THINGS_MEG, ALLJOINED)}


@dataclass(frozen=True)
class Layout:
    """A form in a DATA, ``folder`` holding a folder per subject."""

    form: Form
    folder: Path
    among_others: bool = False  # DATA itself: not each of its folders is a subject's

    def file(self, subject: str, partition: str) -> Path:
        return self.folder / subject / self.form.files[partition]

    def subjects(self) -> list[str]:
        """Names of their folders, sorted; none where there is no folder."""
        if not self.folder.is_dir():
            return []
        folders = (path for path in self.folder.iterdir() if path.is_dir())
        return sorted(
            path.name for path in folders if not self.among_others or _has_files(self.form, path)
        )


def layout_in(data_path: Path, dataset: str = AUTO) -> Layout:
    """The form of DATA's recordings, or the one that is asked for; THINGS-EEG2 where none is there.

    Raises UserError where there are several and none is named, or in several folders.
    """
    found = [one for one in layouts_in(data_path) if dataset in (AUTO, one.form.name)]
    if len(found) > 1:
        places = [f"{one.form.name} in {one.folder.relative_to(data_path)}" for one in found]
        raise UserError(
            "--dataset" if dataset == AUTO else "--data_path",
            f"{len(found)} forms of recordings in {data_path}: {', '.join(places)}",
            "one",
            "name it with --dataset, or give the folder of one subject; of a form, keep one folder",
        )
    form = FORMS[THINGS_EEG2.name if dataset == AUTO else dataset]
    return found[0] if found else Layout(form, Path(data_path) / form.folders[0])


def layouts_in(data_path: Path) -> Iterator[Layout]:
    """Every form of which a subject's file is there."""
    data = Path(data_path)
    for form, pattern in ((of, pattern) for of in FORMS.values() for pattern in of.folders):
        for folder in [data] if pattern == "." else sorted(data.glob(pattern)):
            layout = Layout(form, folder, pattern == ".")
            if any(_has_files(form, folder / name) for name in layout.subjects()):
                yield layout


def tested_in(folder: Path) -> list[Path]:
    """The test recordings in a subject's folder."""
    files = (folder / form.files["test"] for form in FORMS.values())
    return [file for file in files if os.path.lexists(file)]


def _has_files(form: Form, folder: Path) -> bool:
    """A link to nothing is one: opening it says what is the matter."""
    return any(os.path.lexists(folder / file) for file in form.files.values())


def names_pictures(path: Path) -> bool:
    """Whether it is, by its name, of a form that says which picture each row is of.

    The rows of such a file under another name are compared, not sorted.
    """
    return any(path.name in form.files.values() for form in FORMS.values() if form.names_pictures)


def parse(path: Path) -> Parsed:
    """Read a file of whichever form it is. Raises DataError."""
    return form_of(path).parse(path)


def form_of(path: Path) -> Form:
    """The form that a file's content has. Raises DataError for one that cannot be opened."""
    with damage_told(path, "a published recording", "check --data_path and the subject's name"):
        mapped = mapped_file(path)
        if mapped[:4] == b"PK\x03\x04":
            return UBP
        dtype = npy_dtype(mapped)
    if dtype is not None and not dtype.hasobject:
        return NEUROBRIDGE
    content = read_pickled_dict(path)
    if MEG_KEYS[0] in content:
        return THINGS_MEG
    eeg = content.get(EEG_KEYS[0])  # of nested lists NumPy would build what they claim
    # trials one by one; a folded array has an axis more
    return ALLJOINED if isinstance(eeg, np.ndarray) and eeg.ndim == 3 else THINGS_EEG2
