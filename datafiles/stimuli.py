"""The stimuli: which pictures there are, in which order, and their captions."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import util
from datafiles.user_tables import first_of, read_columns
from util import LOG, DataError

PARTITIONS = ("training", "test")
IMAGE_FOLDER = {partition: f"{partition}_images" for partition in PARTITIONS}
PICTURES = (".png", ".jpg", ".jpeg")
STIMULUS_COLUMNS = ("stimulus", "stim_file", "image", "picture")  # of users' tables
CAPTION_KEYS = (*STIMULUS_COLUMNS, "concept")
_CAPTIONS = f"columns caption and {' or '.join(CAPTION_KEYS)}, or a JSON object of the same"
_CAPTIONS_CURE = "see docs/own_recordings.md, Captions"


@dataclass(frozen=True)
class Stimulus:
    """One picture. ``key``: its path below DATA; ``id`` derives from it alone, joins everything."""

    key: str
    path: Path

    @property
    def folder(self) -> str:
        return self.key.split("/")[1]

    @property
    def concept(self) -> str:
        """Folder name after its number: ``00001_aircraft_carrier`` -> ``aircraft_carrier``."""
        return self.folder.split("_", 1)[-1]

    @cached_property
    def id(self) -> int:
        return stimulus_id(self.key)


def stimulus_id(key: str) -> int:
    """int64 identity of a stimulus: a hash of its key, whatever the order and the other files."""
    return util.seed_for(0, "stimulus", key)


def list_stimuli(data_path: Path, partition: str) -> list[Stimulus]:
    """The pictures of a partition in EEG row order: folders by name, then files by name.

    Raises DataError where there are none, or where a picture or its folder is a link out of DATA:
    reports and shared runs hold what the pictures show. The partition's whole folder may be one.
    """
    root = Path(data_path) / IMAGE_FOLDER[partition]
    if not root.is_dir():
        raise DataError(
            root,
            "no such folder",
            f"pictures as {IMAGE_FOLDER[partition]}/NNNNN_concept/*.jpg",
            "give --data_path the folder that holds training_images/ and test_images/",
        )
    found, links, others = [], [], []
    try:
        for folder in _entries(root):
            if folder.is_dir():
                files = [file for file in _entries(folder) if Path(file).suffix.lower() in PICTURES]
                links += [file for file in (folder, *files) if file.is_symlink()]
                others += [file.path for file in files if not file.is_file()]
                found += [
                    Stimulus(f"{root.name}/{folder.name}/{file.name}", Path(file)) for file in files
                ]
    except OSError as error:
        raise DataError(root, str(error), "folders that can be read", "check its rights") from None
    for link in links:
        _refuse_leaving(Path(link), root)
    for file in others:
        raise DataError(file, "a folder, or a link to nothing", "a picture", "remove it")
    if not found:
        raise DataError(
            root, "no pictures", "NNNNN_concept/*.jpg or *.png", "unpack the stimuli there"
        )
    return found


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder by name, without what is hidden; whether it is a link costs no look."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(".")),
            key=lambda entry: entry.name,
        )


def _refuse_leaving(link: Path, root: Path) -> None:
    """Raise DataError unless it leads to something inside the partition's folder or DATA."""
    target = Path(os.path.realpath(link))
    if not any(target.is_relative_to(os.path.realpath(home)) for home in (root, root.parent)):
        raise DataError(
            link,
            f"a link to {target}",
            f"a picture inside {root.parent}",
            f"copy it there; only {root.name} as a whole may be a link to elsewhere",
        )


# ---------------------------------------------------------------- captions


def composed(text: str) -> str:
    """One spelling of what looks the same: macOS decomposes letters with accents."""
    return unicodedata.normalize("NFC", text)


def read_captions(path: Path | None, stimuli: Sequence[Stimulus] = ()) -> dict[str, str]:
    """Captions by picture key or by concept from a JSON object or a table, {} without a file.

    Raises DataError, also if none of them belongs to any of ``stimuli``.
    """
    if path is None:
        return {}
    read = _json_captions if Path(path).suffix.lower() == ".json" else _table_captions
    captions: dict[str, str] = {}
    for where, key, text in read(Path(path)):
        if not key or not text:
            lacks = "caption" if key else "picture or concept"
            raise DataError(
                where, f"no {lacks}", "a picture or concept, and its caption", "complete it"
            )
        if captions.setdefault(key, text) != text:
            raise DataError(
                where,
                f"another caption of {key}: {text!r}, after {captions[key]!r}",
                "one caption of each",
                "keep one of them",
            )
    if stimuli:
        _check_belonging(path, captions, stimuli)
    return captions


def _key(text: str) -> str:
    return composed(text.strip().replace("\\", "/")).removeprefix("./")


def _table_captions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, key, caption) of each row."""
    rows = read_columns(path, "captions", _CAPTIONS_CURE)
    _, head = next(rows, (1, {}))
    column = first_of(CAPTION_KEYS, head)
    if column is None or "caption" not in head:
        raise DataError(path, f"columns {', '.join(head) or '(none)'}", _CAPTIONS, _CAPTIONS_CURE)
    for line, cells in rows:
        yield f"{path}, line {line}", _key(cells[column]), cells["caption"]


def _json_captions(path: Path) -> Iterator[tuple[str, str, str]]:
    pairs = util.read_json(path, pairs=_Pairs)
    if not isinstance(pairs, _Pairs):
        raise DataError(path, "something else", _CAPTIONS, _CAPTIONS_CURE)
    for key, text in pairs:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{path}, {key!r:.80}", f"a {kind}", "a caption", "write one")
        yield f"{path}, {key!r}", _key(key), text.strip()


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the file: a dict would drop all but the last of equal keys."""


def _check_belonging(path: Path, captions: Mapping[str, str], stimuli: Sequence[Stimulus]) -> None:
    """Warn of captions of nothing. Raises DataError if all are."""
    known = {composed(name) for item in stimuli for name in (item.key, item.concept)}
    strangers = [key for key in captions if key not in known]
    example = f"{stimuli[0].key} or {stimuli[0].concept}"
    if len(strangers) == len(captions):
        raise DataError(
            path,
            f"captions of other stimuli, e.g. {strangers[0]}" if strangers else "no captions",
            f"captions of pictures of DATA, as {example}",
            "name pictures by their path below DATA, or concepts by their folder's name without "
            "its number",
        )
    if strangers:
        LOG.warning(
            "%s: %d of %d captions belong to no picture of DATA, e.g. %s; expected names as %s",
            path, len(strangers), len(captions), strangers[0], example,
        )  # fmt: skip


def caption(stimulus: Stimulus, captions: Mapping[str, str], template: str) -> str:
    """The caption of the picture, else of its concept, else the template."""
    found = captions.get(composed(stimulus.key)) or captions.get(composed(stimulus.concept))
    return found or template.format(concept=stimulus.concept)


def keys_hash(stimuli: Mapping[str, Sequence[Stimulus]]) -> str:
    """Of the pictures' names in row order: rows of the EEG belong to them."""
    return util.json_hash([item.key for items in stimuli.values() for item in items])


def check_disjoint(training: Sequence[Stimulus], test: Sequence[Stimulus]) -> None:
    """Raise DataError if a test concept is also a training concept."""
    shared = sorted({item.concept for item in training} & {item.concept for item in test})
    if shared:
        raise DataError(
            IMAGE_FOLDER["training"],
            f"test concepts among the training concepts: {', '.join(shared[:5])}",
            "disjoint concepts",
            "move those folders out of one of the two",
        )
