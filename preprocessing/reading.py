"""Recordings of any format that MNE reads, opened; whatever a reader raises is told."""

from __future__ import annotations

import configparser
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.channels import check_unique, rename_channels
from preprocessing.edf import check_records
from util import DataError, UserError

if TYPE_CHECKING:
    import mne

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
    check_records(path)
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
