"""The stimuli: which pictures there are, in which order, and their captions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import util
from rundirs.files import json_hash
from util import DataError

PARTITIONS = ("training", "test")
IMAGE_FOLDER = {partition: f"{partition}_images" for partition in PARTITIONS}
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe")
BLOCK_LEAK = "block_leak.json"  # lies in a DATA whose test pictures are of the blocks of training
LEAKS = (
    "BLOCK LEAKAGE: test pictures were shown in the blocks of training pictures, so that EEG's "
    "drift alone tells their classes: no score of this DATA is of decoding"
)
DIGITS = "0123456789"
STIMULUS_COLUMNS = ("stimulus", "stim_file", "image", "picture")  # of users' tables


@dataclass(frozen=True)
class Stimulus:
    """One picture. ``key``: its path below DATA; ``id`` derives from it alone, joins everything."""

    key: str
    path: Path

    @property
    def partition(self) -> str:
        return self.key.split("/")[0].removesuffix("_images")

    @property
    def folder(self) -> str:
        return self.key.split("/")[1]

    @property
    def concept(self) -> str:
        return concept_of_folder(self.folder)

    @cached_property
    def id(self) -> int:
        return stimulus_id(self.key)

    @property
    def data_path(self) -> Path:
        return self.path.parents[2]

    @property
    def names(self) -> tuple[str, ...]:
        """What others may call it, the surest first."""
        _, folder, file = self.key.split("/")
        return self.key, f"{folder}/{file}", file


def places_within(stimuli: Sequence[Stimulus]) -> list[tuple[str, ...]]:
    """What each may be called by number, all from 0: ``8/bat1/3``, ``bat1/3``; ``8/bat/3``."""
    within: Counter[str] = Counter()
    found: list[tuple[str, ...]] = []
    for item in stimuli:
        number, concept = item.folder.split("_")[0], item.concept
        names = [f"{spelt}/{within[item.folder]}" for spelt in (concept, concept.rstrip(DIGITS))]
        numbered = [f"{int(number) - 1}/{name}" for name in names] if number.isdecimal() else []
        found.append((*numbered, names[0]))
        within[item.folder] += 1
    return found


def rows_called(names: Sequence[str], wanted: Iterable[Sequence[str]]) -> list[int]:
    """The row of each that is wanted by any of its names, the surest first; -1 where there is none.

    ``names`` of the rows are paths, or what these end with; an ending of several rows is none's.
    """
    place: dict[str, int | None] = {}
    for row, name in enumerate(names):
        parts = PurePosixPath(name.strip().replace("\\", "/")).parts
        for length in range(1, min(len(parts), 3) + 1):
            ending = "/".join(parts[-length:])
            place[ending] = row if place.get(ending, row) == row else None
    known = {name: row for name, row in place.items() if row is not None}
    return [next((known[name] for name in called if name in known), -1) for called in wanted]


def concept_of_folder(folder: str) -> str:
    """``00001_aircraft_carrier`` -> ``aircraft_carrier``; ``fire_truck`` has none and stays."""
    return re.sub(r"^\d+_(?=.)", "", folder)


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
    try:
        found, empty = _listed(root)
        deeper = next(filter(None, map(_picture_below, empty)), None)
    except OSError as error:
        raise DataError(root, str(error), "folders that can be read", "check its rights") from None
    if deeper:
        raise DataError(
            root,
            f"pictures a folder deeper than expected, e.g. {deeper}",
            f"{root.name}/NNNNN_concept/*.jpg or *.png",
            "move the folders of concepts up, so that they lie in it; empty folders may stay",
        )
    if not found:
        raise DataError(
            root,
            f"no pictures{_other_files(root)}",
            "NNNNN_concept/*.jpg or *.png",
            "unpack the stimuli there; convert pictures of other kinds to PNG",
        )
    return found


def _listed(root: Path) -> tuple[list[Stimulus], list[os.DirEntry[str]]]:
    """The pictures, and the folders without any. Raises DataError for one that cannot be used."""
    found, empty = [], []
    for folder in _entries(root):
        if not folder.is_dir():
            continue
        files = [file for file in _entries(folder) if Path(file).suffix.lower() in PICTURES]
        empty += [] if files else [folder]
        for link in (folder, *files):
            if link.is_symlink():
                _refuse_leaving(Path(link), root)
        for file in files:
            key = f"{root.name}/{folder.name}/{file.name}"
            _refuse_undecodable(key)
            if not file.is_file():
                raise DataError(
                    file.path, "a folder, or a link to nothing", "a picture", "remove it"
                )
            found.append(Stimulus(key, Path(file)))
    return found, empty


def _picture_below(folder: os.DirEntry[str]) -> str | None:
    """A picture in a folder of this folder."""
    below = (entry for entry in _entries(folder) if entry.is_dir())
    return next(
        (file.path for inner in below for file in _entries(inner)
         if Path(file).suffix.lower() in PICTURES),
        None,
    )  # fmt: skip


def _other_files(root: Path) -> str:
    """For a message: what the folders hold instead of pictures."""
    kinds = {path.suffix.lower() for path in root.glob("*/*") if path.is_file()}
    return f"; there are {', '.join(sorted(kinds)[:5])}" if kinds else ""


def _refuse_undecodable(key: str) -> None:
    """Raise DataError for a name that is no UTF-8: no JSON, table or report can hold it."""
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{key.split('/')[0]}: {os.fsencode(key)!r}",
            "a name that is not in UTF-8",
            "names in UTF-8",
            "rename it; convmv -f latin1 -t utf8 does it for many",
        ) from None


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


def keys_hashes(stimuli: Mapping[str, Sequence[Stimulus]]) -> dict[str, str]:
    """{picture folder: hash of its pictures' names in row order}: EEG rows are of them."""
    return {
        IMAGE_FOLDER[partition]: json_hash([item.key for item in items])
        for partition, items in stimuli.items()
    }


def leaks_blocks(data_path: Path | None) -> bool:
    """Whether DATA says that its split leaks: dataset.py --allow_block_leak."""
    return data_path is not None and (Path(data_path) / BLOCK_LEAK).is_file()


def check_disjoint(training: Sequence[Stimulus], test: Sequence[Stimulus]) -> None:
    """Raise DataError if a test concept is one of training, too; told where DATA says so."""
    if training and leaks_blocks(training[0].data_path):
        util.LOG.warning("%s", LEAKS)
        return
    shared = sorted({item.concept for item in training} & {item.concept for item in test})
    if shared:
        raise DataError(
            IMAGE_FOLDER["training"],
            f"test concepts among the training concepts: {', '.join(shared[:5])}",
            "disjoint concepts",
            "move those folders out of one of the two",
        )
