"""Why a recording cannot be read, found by looking around it: what lies there, and what to do."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from preprocessing.brainvision import BrainVisionHeader
from util import DataError, StageError, UserError

A_RECORDING = "a whole recording: .vhdr, .edf, .bdf, .set, .fif or another format of MNE"
# parts of a recording: {their suffix: the one to name}
_PARTS = {".eeg": ".vhdr", ".vmrk": ".vhdr", ".dat": ".vhdr", ".fdt": ".set"}
_EPOCHS = re.compile(r"read_epochs|number of trials|epochs|-epo\b", re.IGNORECASE)
MOST_NAMED = 6  # files in a message


def check_there(path: Path) -> None:
    """Raise UserError / DataError for what is no recording to begin with: absent, or a stand-in."""
    if not path.exists():
        raise UserError("--raw", _absence(path), "a recording", _cure_of_absence(path))
    if path.is_file():
        pointer = _pointer(path)
        if pointer:
            raise DataError(path, *pointer)
        whole = path.with_suffix(_PARTS.get(path.suffix.lower(), path.suffix))
        if whole != path and whole.is_file():
            raise UserError(
                "--raw",
                f"{path}: a part of the recording whose header is {whole.name}",
                f"the header, {whole.name}, which names its other files",
                f"give --raw {whole}",
            )


def _absence(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: a link to {path.readlink()}, where there is nothing"
    return f"{path}: no such file{_neighbours(path.parent, path.stem)}"


def _cure_of_absence(path: Path) -> str:
    if path.is_symlink() and ".git/annex" in str(path.readlink()):
        return f"its content has not been fetched: datalad get {path} (or git annex get)"
    if path.is_symlink():
        return "mend the link, or fetch what it leads to"
    return "check the path"


def _neighbours(folder: Path, stem: str) -> str:
    """Files whose names begin alike, or any, for a message."""
    if not folder.is_dir():
        return f"; no folder {folder} either"
    files = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    near = [name for name in files if name.startswith(stem[:3])] or files
    return f"; beside it are {', '.join(near[:MOST_NAMED])}" if near else "; its folder is empty"


def _pointer(path: Path) -> tuple[str, str, str] | None:
    """(found, expected, cure) of a text that stands in for a file that was not fetched."""
    with open(path, "rb") as file:
        start = file.read(200)
    if start.startswith(b"version https://git-lfs"):
        return (
            "a pointer of Git LFS, not the file",
            A_RECORDING,
            f"git lfs pull --include {path.name}",
        )
    if b"/annex/objects/" in start and len(start) < 200:
        return "a pointer of git-annex, not the file", A_RECORDING, f"datalad get {path}"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file", A_RECORDING, "download it again; were you logged in?"
    return None


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever a reader raises inside becomes a DataError; the original is its cause.

    MNE's readers raise anything for damaged files; a missing package stays an ImportError.
    """
    try:
        yield
    except (StageError, ImportError):
        raise
    except Exception as error:
        raise why_unreadable(path, error) from error


def why_unreadable(path: Path, error: BaseException) -> DataError:
    """What to say of a recording at which MNE has failed."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if path.suffix.lower() == ".vhdr":
        found = _header_fault(path)
        if found:
            return DataError(path, *found)
    if _EPOCHS.search(text) or re.search(r"[-_]epo\b", path.stem):
        return DataError(
            path,
            f"trials that are cut already (MNE: {text})",
            "a continuous recording: trials are cut here, from the table of events",
            "export it before epoching, or name it with --epochs_file",
        )
    return DataError(
        path,
        f"MNE cannot read it: {text}",
        A_RECORDING,
        "copy it again with all files that belong to it, or convert it",
    )


def check_header(path: Path) -> None:
    """Raise DataError for a BrainVision header that MNE reads, and reads wrong or in part."""
    if path.suffix.lower() == ".vhdr":
        found = _header_fault(path)
        if found:
            raise DataError(path, *found)


def _header_fault(path: Path) -> tuple[str, str, str] | None:
    """(found, expected, cure): a file that is named and absent, or numbers with commas."""
    header = BrainVisionHeader.read(path)
    for what, named in (("DataFile", header.data_file), ("MarkerFile", header.marker_file)):
        if named is not None and not os.path.isfile(named):  # also of a name too long for one
            return (
                f"{what}={named.name}, which is not there{_neighbours(path.parent, path.stem)}",
                "the files that the header names, beside it",
                "copy them, too; if they were renamed, mend that line of the header",
            )
    return _decimal_comma(header)


def _decimal_comma(header: BrainVisionHeader) -> tuple[str, str, str] | None:
    interval = header.sections.get("common infos", {}).get("samplinginterval", "")
    if re.fullmatch(r"\d+,\d+", interval):
        return _comma(f"SamplingInterval={interval}", interval)
    for name, _, resolution, unit in header.channels:  # "Ch1=Fp1,,0,1,µV"
        if resolution.isdecimal() and unit.isdecimal():
            return _comma(f"a resolution of {resolution},{unit} for {name}", f"{resolution},{unit}")
    return None


def _comma(found: str, number: str) -> tuple[str, str, str]:
    mended = number.replace(",", ".")
    return f"{found}: a decimal comma", "numbers with a point", f"write {mended} in the header"
