"""Which drawn picture belongs to which stimulus."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import util
from datafiles.stimuli import PICTURES, Stimulus
from modalities import recipes
from rundirs.journal import labels_of, read_run, unfinished
from util import DataError

OF_A_FOLDER = {"recipe": "pictures", "prompt_source": "unknown", "control": None}


@dataclass(frozen=True)
class Group:
    """The pictures of one recipe of one run or folder, with the stimuli they belong to.

    ``owner`` [M]: row in ``stimuli`` of each of the M pictures. ``images``: a name that no other
    run or folder has.
    """

    images: str
    recipe: str
    prompt_source: str
    control: str | None
    stimuli: tuple[Stimulus, ...]
    pictures: tuple[Path, ...]
    owner: tuple[int, ...]
    simulated: bool = False
    block_leak: bool = False
    unfinished: str = ""  # what lacks of the run, in words
    beside: bool = False  # given as --control_images, not as --images
    choice: str = ""  # of several draws, how one was kept: "best of 8 by eeg"

    def shifted(self, seed: int) -> tuple[int, ...]:
        """Another stimulus for every picture: ``owner`` moved by one seeded cyclic shift."""
        n = len(self.stimuli)
        shift = 1 + util.seed_for(seed, "picture control") % max(1, n - 1)
        return tuple((row + shift) % n for row in self.owner)


def stimuli_below(folder: Path) -> list[Stimulus]:
    """Every picture below a folder, by name. Keys begin with the folder's own name.

    Raises DataError if there is none.
    """
    found = [
        Stimulus(f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}", path)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in PICTURES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(
            folder, "no pictures", f"files ending in {', '.join(PICTURES)}", "check the path"
        )
    return found


def _names(key: str) -> list[str]:
    """What a picture may be called after: its path, its file, its folders, nearest first."""
    _, *folders, file = key.rsplit(".", 1)[0].split("/")
    return ["/".join((*folders, file)), file, *reversed(folders)]


def _called(stimuli: Sequence[Stimulus]) -> dict[str, int]:
    """{name: row} of names that belong to one stimulus only."""
    rows: dict[str, set[int]] = {}
    for row, item in enumerate(stimuli):
        for name in _names(item.key):
            rows.setdefault(name, set()).add(row)
    return {name: next(iter(owners)) for name, owners in rows.items() if len(owners) == 1}


def _meant(key: str, called: Mapping[str, int], folders: Collection[str]) -> set[int]:
    """Rows of the stimuli that a picture may be of; of a picture that is well named, one.

    Its whole path says most; then names of stimuli's own folders, in which files may be numbered as
    they like.
    """
    whole, file, *above = _names(key)
    own = {called[name] for name in (file, *above) if name in called and name in folders}
    if whole in called and not own - {called[whole]}:
        return {called[whole]}
    return own or {called[name] for name in (file, *above) if name in called}


def pair_folder(images: Path, stimuli: Sequence[Stimulus]) -> Group:
    """The pictures of any folder, each called after its stimulus; several of one are samples of it.

    A picture may have its stimulus' path, its file name, or lie in a folder named like the
    stimulus' file or folder. Raises DataError for names that fit none, or several.
    """
    called, drawn = _called(stimuli), stimuli_below(images)
    folders = {name for item in stimuli for name in _names(item.key)[2:]}
    meant = [_meant(item.key, called, folders) for item in drawn]
    torn = [(item.key, rows) for item, rows in zip(drawn, meant, strict=True) if len(rows) > 1]
    if torn:
        key, several = torn[0][0], ", ".join(stimuli[row].key for row in sorted(torn[0][1]))
        raise DataError(
            images,
            f"{len(torn)} of {len(drawn)} pictures whose file and folders are named after "
            f"different stimuli, e.g. {key}: {several}",
            "one stimulus for each picture",
            "rename the files, or the folders, after what was seen",
        )
    rows = [next(iter(found), None) for found in meant]
    lost = [item.key for item, row in zip(drawn, rows, strict=True) if row is None]
    if lost:
        raise DataError(
            images,
            f"{len(lost)} of {len(drawn)} pictures named after no stimulus, e.g. {lost[0]}",
            f"names like {', '.join(_names(stimuli[0].key)[:3])}",
            "rename the files or folders after the stimuli, or give --truth their originals",
        )
    return _group(images.name, OF_A_FOLDER, drawn, rows, stimuli)


def _group(
    images: str,
    about: Mapping[str, Any],
    drawn: Sequence[Stimulus],
    rows: Sequence[int],
    stimuli: Sequence[Stimulus],
    lacking: str = "",
) -> Group:
    """``about``: what a journal says of the pictures."""
    shown = sorted(set(rows))
    place = {row: index for index, row in enumerate(shown)}
    return Group(
        images,
        about["recipe"],
        about["prompt_source"],
        about["control"],
        tuple(stimuli[row] for row in shown),
        tuple(item.path for item in drawn),
        tuple(place[row] for row in rows),
        about.get("simulated", False),
        about.get("block_leak", False),
        lacking,
        choice=choice_of(about),
    )


def choice_of(about: Mapping[str, Any]) -> str:
    """How pictures were chosen among several draws, in words; "" where there was one."""
    if about.get("draws", 1) == 1:
        return ""
    return (
        f"best of {about['draws']} by the EEG"
        if about["choose"] == "eeg"
        else (f"one of {about['draws']} at random")
    )


def pair_run(images: Path, stimuli: Sequence[Stimulus], label: str) -> list[Group]:
    """The pictures of a generate.py run, a group per recipe. Raises DataError."""
    records, lacking = read_run(images), unfinished(images)
    row_of = {item.id: row for row, item in enumerate(stimuli)}
    lost = [record["folder"] for record in records if record["stimulus"] not in row_of]
    if lost:
        raise DataError(
            images,
            f"pictures of stimuli that are not at hand, e.g. {lost[0]}",
            "the same test_images",
            "give --data_path the DATA that the pictures were drawn from",
        )
    order = [item.name for item in recipes("all")]  # those of a sweep come after, as drawn
    drawn = dict.fromkeys(record["recipe"] for record in records)
    groups = []
    for recipe in sorted(
        drawn, key=lambda name: order.index(name) if name in order else len(order)
    ):
        chosen = [record for record in records if record["recipe"] == recipe]
        chosen.sort(key=lambda record: row_of[record["stimulus"]])
        groups.append(
            _group(
                label,
                chosen[0],
                [Stimulus(record["file"], images / record["file"]) for record in chosen],
                [row_of[record["stimulus"]] for record in chosen],
                stimuli,
                lacking,
            )
        )
    return groups


def pair(images: Path, beside: Sequence[Path], stimuli: Sequence[Stimulus]) -> list[Group]:
    """Groups of ``--images`` and of all that is scored beside them. Raises DataError."""
    folders, groups = [images, *beside], []
    for folder, label in zip(folders, labels_of(folders), strict=True):
        if any(folder.glob("images*.jsonl")):
            found = pair_run(folder, stimuli, label)
        else:
            found = [replace(pair_folder(folder, stimuli), images=label)]
        groups += [replace(group, beside=folder is not images) for group in found]
    return groups
