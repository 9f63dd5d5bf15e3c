"""Which drawn picture belongs to which stimulus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import util
from datafiles.stimuli import PICTURES, Stimulus
from modalities import recipes
from rundirs.journal import read_run
from util import DataError


@dataclass(frozen=True)
class Group:
    """The pictures of one recipe of one run or folder, with the stimuli they belong to.

    ``owner`` [M]: row in ``stimuli`` of each of the M pictures.
    """

    images: str
    recipe: str
    prompt_source: str
    control: str | None
    stimuli: tuple[Stimulus, ...]
    pictures: tuple[Path, ...]
    owner: tuple[int, ...]
    simulated: bool = False

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


def pair_folder(images: Path, stimuli: Sequence[Stimulus]) -> Group:
    """The pictures of any folder, each called after its stimulus; several of one are samples of it.

    A picture may have its stimulus' path, its file name, or lie in a folder named like the
    stimulus' file or folder. Raises DataError for names that fit none.
    """
    called, drawn = _called(stimuli), stimuli_below(images)
    rows = [
        next((called[name] for name in _names(item.key) if name in called), None) for item in drawn
    ]
    lost = [item.key for item, row in zip(drawn, rows, strict=True) if row is None]
    if lost:
        raise DataError(
            images,
            f"{len(lost)} of {len(drawn)} pictures named after no stimulus, e.g. {lost[0]}",
            f"names like {', '.join(_names(stimuli[0].key)[:3])}",
            "rename the files or folders after the stimuli, or give --truth their originals",
        )
    return _group(images.name, "pictures", "unknown", None, drawn, rows, stimuli)


def _group(
    images: str,
    recipe: str,
    prompt_source: str,
    control: str | None,
    drawn: Sequence[Stimulus],
    rows: Sequence[int],
    stimuli: Sequence[Stimulus],
    simulated: bool = False,
) -> Group:
    shown = sorted(set(rows))
    place = {row: index for index, row in enumerate(shown)}
    return Group(
        images,
        recipe,
        prompt_source,
        control,
        tuple(stimuli[row] for row in shown),
        tuple(item.path for item in drawn),
        tuple(place[row] for row in rows),
        simulated,
    )


def pair_run(images: Path, stimuli: Sequence[Stimulus], label: str) -> list[Group]:
    """The pictures of a generate.py run, a group per recipe. Raises DataError."""
    records = read_run(images)
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
        first = chosen[0]
        groups.append(
            _group(
                label,
                recipe,
                first["prompt_source"],
                first["control"],
                [Stimulus(record["file"], images / record["file"]) for record in chosen],
                [row_of[record["stimulus"]] for record in chosen],
                stimuli,
                first.get("simulated", False),
            )
        )
    return groups


def pair(folders: Sequence[Path], stimuli: Sequence[Stimulus]) -> list[Group]:
    """Groups of all runs and folders. Raises DataError."""
    names = [folder.resolve().name for folder in folders]
    groups: list[Group] = []
    for folder, name in zip(folders, names, strict=True):
        label = name if names.count(name) == 1 else "/".join(folder.resolve().parts[-2:])
        if any(folder.glob("images*.jsonl")):
            groups += pair_run(folder, stimuli, label)
        else:
            groups.append(pair_folder(folder, stimuli))
    return groups
