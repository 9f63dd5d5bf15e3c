"""Runs of ``--leave_out each``: a folder per subject that its model never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from util import UserError


def runs_of(model_path: Path, subjects: Sequence[str] | None) -> dict[str | None, Path]:
    """{subject: run trained without it} below a ``--leave_out each`` folder, else {None: run}.

    Raises UserError for a subject without a run.
    """
    runs = {
        folder.name.removeprefix(WITHOUT): folder
        for folder in sorted(model_path.glob(f"{WITHOUT}*"))
    }
    lost = [name for name in subjects or [] if name not in runs]
    if runs and lost:
        raise UserError(
            "--subjects",
            f"no {WITHOUT}{lost[0]} in {model_path}",
            f"some of {', '.join(runs)}",
            "choose among them, or train that fold",
        )
    return {name: runs[name] for name in subjects or runs} if runs else {None: model_path}


WITHOUT = "without_"  # folder of a model + the subject that it never saw
