"""The journal of pictures that generate.py writes, and that evaluate.py and report.py read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rundirs.files import read_jsonl
from util import DataError


def drawn_already(out: Path, journal: Path) -> set[tuple[int, str]]:
    """(stimulus, recipe) of the pictures that the journal lists and the disk has."""
    return {
        (record["stimulus"], record["recipe"])
        for record in read_jsonl(journal)
        if (out / record["file"]).exists()
    }


def read_journal(images: Path) -> list[dict[str, Any]]:
    """The journal of a generate.py run, of all its shards, a record per picture; [] without one.

    Raises DataError for a picture outside the run: reports and scores would show another file.
    """
    records = [
        record for path in sorted(images.glob("images*.jsonl")) for record in read_jsonl(path)
    ]
    for record in records:
        name = Path(record["file"])
        if name.is_absolute() or ".." in name.parts:
            raise DataError(
                images, f"a journal that names {name}", "pictures inside the run", "draw it again"
            )
    return list({(record["stimulus"], record["recipe"]): record for record in records}.values())


def unfinished(images: Path) -> str:
    """What lacks of a run of generate.py, in words; nothing of one whose every part is done."""
    found = [part.name.removeprefix("DONE") for part in images.glob("DONE*")]
    begun = [part.stem.removeprefix("images") for part in images.glob("images*.jsonl")]
    lacks = []
    if "" not in found:
        counts = {int(part.rsplit("-", 1)[1]) for part in (*found, *begun) if "-of-" in part}
        done = {count: sum(part.endswith(f"-of-{count}") for part in found) for count in counts}
        if not any(done[count] == count for count in counts):
            parts = [f"{done[count]} of {count} parts are done" for count in sorted(counts)]
            lacks.append(f"unfinished ({'; '.join(parts)})" if parts else "unfinished")
    records = read_journal(images)
    gone = [record["file"] for record in records if not (images / record["file"]).is_file()]
    if gone:
        lacks.append(f"{len(gone)} of its {len(records)} pictures are gone, e.g. {gone[0]}")
    return ", ".join(lacks)


def read_run(images: Path) -> list[dict[str, Any]]:
    """As :func:`read_journal`, of pictures that are there. Raises DataError without any."""
    records = [record for record in read_journal(images) if (images / record["file"]).is_file()]
    if not records:
        raise DataError(
            images,
            "no pictures",
            "the output of generate.py",
            "run that stage; it goes on where it stopped",
        )
    return records


def is_main(row: Mapping[str, Any]) -> bool:
    """Whether a row of scores is of --images, not of --control_images.

    Older results say it by the mark.
    """
    return not row.get("beside", bool(row.get("control")))


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart; the same folder twice: numbers.

    They are what tables and files of scores know the pictures by.
    """
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return [
        label if labels.index(label) == place else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]
