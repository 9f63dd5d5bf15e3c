"""Recordings of any format that MNE reads, opened; whatever a reader raises or warns of is told."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing import brainvision, edf, fif
from preprocessing.channels import check_unique, rename_channels
from preprocessing.hints import check_header, check_there, explained
from util import DataError, UserError

if TYPE_CHECKING:
    import mne


# as MNE has it read, in at most 2 GB more than four times the file
SET_TRIAL = [
    sys.executable,
    "-c",
    "import os, resource, sys, scipy.io; most = 2**31 + 4 * os.path.getsize(sys.argv[1]) "
    "+ 4096 * int(open('/proc/self/statm').read().split()[0]) if sys.platform == 'linux' else -1; "
    "resource.setrlimit(resource.RLIMIT_AS, (most, most)); "
    "scipy.io.loadmat(sys.argv[1], squeeze_me=True, mat_dtype=False)",
]
TRIAL_S, TRIAL_BYTES_A_S = 8.0, 20e6
_NO_VOLTAGES = ("C", "\u00b0C", "\u00b5S", "uS", "S", "ARU", "%", "N", "Pa", "lx", "m/s\u00b2")


@dataclass(frozen=True)
class OpenedRaw:
    """A recording whose signal has not been read yet.

    ``units``: {channel: as its header states it}, where it does; ``warnings``: of the reader.
    """

    raw: mne.io.BaseRaw
    units: dict[str, str]
    warnings: list[str]


def read_raw(path: Path, bids: Path | None = None) -> OpenedRaw:
    """Open a recording of any format of MNE, its EEG channels by their 10-05 names.

    Raises UserError for a missing file or package, DataError for an unreadable or odd one.
    """
    check_there(path)
    edf.check_records(path)
    fif.check_tags(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with explained(path):
                raw = _open_any(path, bids)
                units = _stated_units(path)
                _type_as_eeg(raw, units)
        except ImportError as error:
            raise UserError(
                "--raw", f"{path}: {error}", "the package that reads this format", "pip install it"
            ) from error
        except DataError:  # it may be for a reason that can be told better
            _refuse_duplicates(path, told)
            raise
    _refuse_duplicates(path, told)
    check_header(path)
    check_files(raw, path, bids)
    brainvision.check_data_length(path, raw.n_times)
    new = rename_channels(raw, path)
    lines = dict.fromkeys(" ".join(str(one.message).split()) for one in told)
    return OpenedRaw(raw, {new.get(name, name): text for name, text in units.items()}, list(lines))


def _open_any(path: Path, bids: Path | None) -> mne.io.BaseRaw:
    import mne

    if path.suffix.lower() == ".set":
        status = path.stat()
        _try_in_another_process(path, (status.st_size, status.st_mtime_ns))
    extra = {"encoding": edf.annotation_encoding(path)} if edf.is_one(path) else {}
    if bids is None:
        return mne.io.read_raw(path, preload=False, verbose="warning", **extra)
    mne_bids = import_mne_bids()
    where = mne_bids.get_bids_path_from_fname(path)
    return mne_bids.read_raw_bids(where, extra_params=extra, verbose="warning")


@functools.cache
def _try_in_another_process(path: Path, version: tuple[int, int]) -> None:
    """Raise DataError for a damaged ``.set`` at which SciPy ends its process, or has no end.

    ``version``: size and time of change, so that a file is tried once.
    """
    try:
        tried = subprocess.run(
            [*SET_TRIAL, str(path)],
            capture_output=True,
            check=False,
            timeout=TRIAL_S + version[0] / TRIAL_BYTES_A_S,
        )
    except subprocess.TimeoutExpired:
        found = "a file that SciPy does not come to the end of"
    else:
        if (
            tried.returncode == 0 or b"NotImplementedError" in tried.stderr
        ):  # v7.3: another reads it
            return
        said = tried.stderr.decode("utf-8", "replace").strip().splitlines()
        crashed = f"a file at which SciPy crashes (signal {-tried.returncode})"
        found = crashed if tried.returncode < 0 else f"SciPy cannot read it: {said[-1]}"
    raise DataError(
        path, found, "a whole .set file", "it is damaged: copy it again, or export it again"
    )


def _stated_units(path: Path) -> dict[str, str]:
    """{channel: unit} of the formats whose units are free text."""
    if path.suffix.lower() == ".vhdr":
        return brainvision.BrainVisionHeader.read(path).units()
    return edf.stated_units(path)


def _type_as_eeg(raw: mne.io.BaseRaw, units: dict[str, str]) -> None:
    """MNE calls BrainVision's channels of a unit that it does not know miscellaneous.

    Those of a unit that is known to be no voltage stay so.
    """
    misc = [
        name
        for name, kind in zip(raw.ch_names, raw.get_channel_types(), strict=True)
        if kind == "misc" and units.get(name, "C") not in _NO_VOLTAGES
    ]
    raw.set_channel_types(dict.fromkeys(misc, "eeg"), verbose="error")


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


def raw_files(raw: mne.io.BaseRaw) -> list[Path]:
    """The files of its signal; of a recording that is a folder, all files in it."""
    named = [Path(name) for name in raw.filenames if name is not None]
    return [
        file
        for path in named
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]


def check_files(raw: mne.io.BaseRaw, path: Path, bids: Path | None) -> None:
    """Raise DataError if a header sends the reader to a file outside the recording's folder."""
    home = (bids or path.parent).resolve()
    for name in raw_files(raw):
        if not name.parent.resolve().is_relative_to(home):
            raise DataError(path, f"its data in {name}", f"files inside {home}", "put them there")
