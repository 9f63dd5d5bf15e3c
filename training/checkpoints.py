"""Checkpoints of a training run: whole folders and moving pointers, readable after any kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rundirs import checkpoints
from rundirs.checkpoints import BEST, LATEST, MODEL, POINTERS, STATE
from rundirs.files import file_hash
from rundirs.tensors import load_tensors, load_torch, save_tensors, save_torch
from util import LOG, DataError

_Loaded = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]


class Checkpoints:
    """``checkpoints/step-NNNNNNNN/`` with model.safetensors and state.pt.

    ``latest`` and ``best`` point to them. Removes only what it wrote or went on from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.links = True
        self._own: set[str] = set()  # names of folders

    @property
    def written(self) -> bool:
        """Whether there is a checkpoint of this call, or that it went on from."""
        return bool(self._own)

    def prepare(self) -> None:
        """Before the first step: make the pointers whole that a copy of the run has changed.

        By one process. Raises DataError where two checkpoints of one step differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.links = checkpoints.links_work(self.folder)
        if not self.links:
            LOG.warning("%s: links cannot be made here: best and latest are texts", self.folder)
        for name in POINTERS:
            place = self.folder / name
            if place.is_dir() and not place.is_symlink():  # a copy that followed the link
                self._unfollow(place)
        for name in POINTERS:
            target = checkpoints.checkpoint_folder(self.folder.parent, name)
            text = self.folder / name
            fits = text.is_file() and not self.links and checkpoints.pointed(self.folder, name)
            if target.name not in POINTERS and not fits:
                LOG.warning("%s: %s is %s, by what it holds", self.folder, name, target.name)
                checkpoints.point(self.folder, name, target.name, links=self.links)

    def _unfollow(self, copy: Path) -> None:
        """Make a folder that once was a link one again."""
        header = checkpoints.header_of(copy)
        if "step" not in header:
            raise DataError(
                copy,
                "a folder without a readable model",
                "a link to a checkpoint, or a copy of one",
                "remove it: the other checkpoints are kept",
            )
        target = self.folder / checkpoints.step_name(header["step"])
        if not target.exists():
            os.replace(copy, target)
        elif file_hash(target / MODEL) == file_hash(copy / MODEL):
            shutil.rmtree(copy)
        else:
            raise DataError(
                copy,
                f"another model than that of {target.name}, of the same step",
                "a copy of it",
                "remove the one that is not of this run",
            )
        checkpoints.point(self.folder, copy.name, target.name, links=self.links)

    def save(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        header: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Write a whole new folder, then move the pointers; this call's own of the step: its files.

        A kill at any moment leaves a readable ``latest``.
        """
        target = self.folder / checkpoints.step_name(step)
        again = target.name in self._own
        written = target if again else self.folder / f".{target.name}.tmp"
        if not again:
            shutil.rmtree(written, ignore_errors=True)
        save_tensors(written / MODEL, model, {**header, "step": step, "best": best})
        save_torch(written / STATE, state)
        if not again:
            shutil.rmtree(target, ignore_errors=True)  # left by a kill before its pointer moved
            os.replace(written, target)
        self._own.add(target.name)
        for name in (BEST, LATEST) if best else (LATEST,):
            checkpoints.point(self.folder, name, target.name, links=self.links)
        self._prune()

    def _prune(self) -> None:
        places = (checkpoints.pointed(self.folder, name) for name in POINTERS)
        kept = {place.resolve().name for place in places if place}
        for name in sorted(self._own - kept):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._own &= kept

    def load(self) -> _Loaded | None:
        """Model, its header and the training state of the newest whole checkpoint.

        None before the first. Raises DataError where there are some, none of them whole.
        """
        trouble = None
        for place in checkpoints.step_folders(self.folder):
            try:
                model, header = load_tensors(place / MODEL)
                cure = "copy it again, or delete the run directory and train again"
                state = load_torch(place / STATE, "a whole checkpoint", cure)
            except DataError as error:
                LOG.warning("%s is not whole: an older one is looked for", place.name)
                trouble = trouble or error
            else:
                self._own.add(place.name)
                return model, header, state
        if trouble:
            raise trouble
        return None
