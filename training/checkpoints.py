"""Checkpoints of a training run: whole folders and moving pointers, readable after any kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rundirs.tensors import load_tensors, load_torch, save_tensors, save_torch


class Checkpoints:
    """``checkpoints/step-NNNNNNNN/`` with model.safetensors and state.pt.

    ``latest`` and ``best`` point to them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        header: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Write a whole new folder, then move the pointers.

        A kill at any moment leaves a readable ``latest``.
        """
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        save_tensors(temporary / "model.safetensors", model, header)
        save_torch(temporary / "state.pt", state)
        shutil.rmtree(target, ignore_errors=True)  # left there by a kill before its pointer moved
        os.replace(temporary, target)
        for name in ("best", "latest") if best else ("latest",):
            self._point(name, target.name)
        self._prune()

    def _point(self, name: str, target: str) -> None:
        link = self.folder / f".{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.replace(link, self.folder / name)

    def _prune(self) -> None:
        kept = {
            os.readlink(self.folder / name)
            for name in ("best", "latest")
            if (self.folder / name).is_symlink()
        }
        for folder in self.folder.glob("step-*"):
            if folder.name not in kept:
                shutil.rmtree(folder)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The ``latest`` model and training state, None before the first. Raises DataError."""
        latest = self.folder / "latest"
        if not latest.is_symlink():
            return None
        model, _ = load_tensors(latest / "model.safetensors")
        return model, load_torch(
            latest / "state.pt", "a whole checkpoint", "delete the run directory and train again"
        )
