"""A training run's checkpoints, found by what they hold: links are for people.

``checkpoints/step-NNNNNNNN/`` holds ``model.safetensors`` and ``state.pt``; ``best`` and ``latest``
lead to two of them. Copying may lose the links, follow them or make text of them: what is meant is
then read from the headers of the models.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from rundirs.files import atomic_write
from rundirs.tensors import tensors_header
from util import DataError

BEST, LATEST = POINTERS = ("best", "latest")
MODEL, STATE = "model.safetensors", "state.pt"
_STEP = re.compile(r"step-\d{8,}")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """The folders of ``checkpoints/`` that are named after a step, newest first."""
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if _STEP.fullmatch(item.name) and item.is_dir()]
    return sorted(found, key=lambda item: int(item.name.removeprefix("step-")), reverse=True)


def header_of(folder: Path) -> dict[str, Any]:
    """What the model of a checkpoint says of itself; {} where it cannot be read."""
    try:
        return tensors_header(folder / MODEL)
    except DataError:
        return {}


def pointed(folder: Path, name: str) -> Path | None:
    """Where ``best`` or ``latest`` leads to: a link, a text, or a folder that was one of them."""
    place = folder / name
    if place.is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = place.read_text(encoding="utf-8")[:80].strip()
            place = folder / text if _STEP.fullmatch(text) else place
    return place if (place / MODEL).is_file() else None


def point(folder: Path, name: str, target: str, *, links: bool) -> None:
    """Let ``best`` or ``latest`` lead to the folder ``target``; as a text without ``links``."""
    if not links:
        with atomic_write(folder / name) as file:
            file.write(f"{target}\n")
        return
    link = folder / f".{name}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, folder / name)


def links_work(folder: Path) -> bool:
    """Whether links can be made in an existing folder."""
    probe = folder / ".link.tmp"
    try:
        probe.unlink(missing_ok=True)
        probe.symlink_to(".")
        probe.unlink()
    except OSError:
        return False
    return True


def checkpoint_folder(run: Path, name: str) -> Path:
    """The folder of a run's ``best`` or ``latest``; without any, where it would be."""
    folder = run / "checkpoints"
    found = pointed(folder, name)
    if found is None:
        steps = [item for item in step_folders(folder) if (item / MODEL).is_file()]
        wanted = (item for item in steps if name == LATEST or header_of(item).get("best"))
        found = next(wanted, None)
    return found or folder / name
