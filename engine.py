"""The one training loop: epochs, EMA, validation, checkpoints, metrics, resume, preemption.

``train.py`` (encoder and priors) and ``ATMS_retrieval.py`` (encoder alone) differ in their
objective only. No random state is stored: every draw is recomputed from (seed, step), so a resumed
run is bit-exact.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import util
from dataset import Batch, TrainingData
from loss import first_non_finite
from masking import Masking, mask_eeg


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; names and units as the flags of ``args.py``."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    grad_clip: float
    ema_decay: float
    seed: int
    epochs_per_call: int | None
    save_every: int
    val_every: int


def schedule_from(values: argparse.Namespace) -> Schedule:
    return Schedule(**{field.name: getattr(values, field.name) for field in fields(Schedule)})


class Objective(Protocol):
    """What is learned: ``losses`` of a batch, with the total under ``loss``.

    ``validate``, on held-out concepts, returns scores and, under ``select``, the one that chooses
    ``best`` (higher is better); nothing at all where no concepts are held out.
    """

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]: ...

    def validate(self) -> dict[str, float]: ...


class Trainable(Protocol):
    """A module that says how to rebuild it."""

    def header(self) -> dict[str, Any]: ...


def describe_parameters(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"


class Average:
    """Exponential moving average of a model's floating state, with the usual short start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights, for validation."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


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
        util.save_tensors(temporary / "model.safetensors", model, header)
        with util.atomic_write(temporary / "state.pt", "wb") as file:
            torch.save(dict(state), file)
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
        model, _ = util.load_tensors(latest / "model.safetensors")
        try:
            return model, torch.load(latest / "state.pt", weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise util.DataError(
                latest / "state.pt",
                f"unreadable ({error})",
                "a whole checkpoint",
                "delete the run directory and train again",
            ) from None


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGUSR1 (SLURM's warnings) instead of dying of them."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Training:
    """State of one run: what the next call needs to go on as if nothing had happened."""

    def __init__(self, run: util.RunDirectory, model: nn.Module, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.checkpoints = Checkpoints(run.path / "checkpoints")
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self.average = Average(model, schedule.ema_decay) if schedule.ema_decay else None
        self.step, self.best = 0, float("-inf")
        self.sums: dict[str, float] = {}  # losses of the epoch so far

    def resume(self) -> None:
        loaded = self.checkpoints.load()
        if loaded is None:
            return
        model, state = loaded
        self.model.load_state_dict(state["raw"] or model)
        if self.average:
            self.average.state = {
                name: value.to(self.average.state[name].device) for name, value in model.items()
            }
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.sums = state["step"], state["best"], state["sums"]
        util.LOG.info("resuming at step %d", self.step)

    def save(self, *, best: bool = False) -> None:
        raw = dict(self.model.state_dict())
        self.checkpoints.save(
            self.step,
            self.average.state if self.average else raw,
            self.model.header() | {"step": self.step},
            {
                "raw": raw if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "best": self.best,
                "sums": self.sums,
            },
            best=best,
        )

    def learning_rate(self) -> float:
        warm = (
            min(1.0, (self.step + 1) / self.schedule.warmup_steps)
            if self.schedule.warmup_steps
            else 1.0
        )
        return self.schedule.learning_rate * warm

    def update(self, batch: Batch, objective: Objective, masking: Masking) -> None:
        """One optimiser step for everything that is trained."""
        seed = self.schedule.seed
        torch.manual_seed(util.seed_for(seed, "step", self.step))  # dropout
        eeg = mask_eeg(batch.eeg, masking, util.generator_for(seed, "mask", self.step))
        losses = objective.losses(
            Batch(eeg, batch.subject, batch.stimulus, batch.targets),
            util.generator_for(seed, "noise", self.step),
        )
        self._check_finite(losses, "loss")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        limit = self.schedule.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._check_finite({"gradient norm": norm}, "gradient")
        self.optimizer.step()
        self.step += 1
        if self.average:
            self.average.update(self.model, self.step)
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def _check_finite(self, parts: Mapping[str, torch.Tensor], what: str) -> None:
        culprit = first_non_finite(parts)
        if culprit:
            raise util.DataError(
                f"step {self.step}",
                f"{what} of {culprit} is not finite",
                "finite numbers",
                "the last checkpoint is kept; lower --learning_rate or set --grad_clip",
            )

    def validate(self, objective: Objective) -> dict[str, float]:
        with self.average.applied_to(self.model) if self.average else contextlib.nullcontext():
            self.model.eval()
            scores = objective.validate()
            self.model.train()
        return scores


def fit(
    run: util.RunDirectory,
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    masking: Masking,
    schedule: Schedule,
    device: torch.device,
) -> None:
    """Train to ``schedule.epochs`` in a started run directory, resuming from ``latest``.

    Raises util.Preempted after saving on a signal or after ``epochs_per_call``, DataError on a
    non-finite loss.
    """
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    if run.finished:
        util.LOG.info("already finished; delete %s to train again", run.path / "DONE")
        return
    training = _Training(run, model.to(device), schedule)
    training.resume()
    _drop_later_records(run.path / "metrics.jsonl", training.step)
    steps = data.steps_per_epoch(schedule.batch_size)
    util.LOG.info(
        "training %s on %s: %d epochs of %d steps",
        describe_parameters(model),
        device,
        schedule.epochs,
        steps,
    )
    first_epoch = training.step // steps
    model.train()
    with (
        SummaryWriter(str(run.path / "tensorboard"), purge_step=training.step) as board,
        stop_requests() as stops,
        tqdm(
            total=schedule.epochs * steps, initial=training.step, desc="training", unit="step"
        ) as bar,
    ):
        for epoch in range(first_epoch, schedule.epochs):
            started, skipped = time.monotonic(), training.step - epoch * steps
            for batch in data.batches(epoch, schedule.batch_size, first=skipped):
                training.update(batch.to(device), objective, masking)
                bar.update()
                if stops and training.step % steps:  # at an epoch's end it is recorded first
                    training.save()
                    raise util.Preempted(
                        f"{stops[0]}: saved at step {training.step}; the same command goes on"
                    )
            _end_epoch(
                run,
                training,
                objective,
                epoch,
                steps,
                time.monotonic() - started,
                board,
                bar,
                bool(stops),
            )
            if stops:
                raise util.Preempted(
                    f"{stops[0]}: saved after epoch {epoch + 1}; the same command goes on"
                )
            if (
                schedule.epochs_per_call
                and epoch + 1 - first_epoch >= schedule.epochs_per_call
                and epoch + 1 < schedule.epochs
            ):
                raise util.Preempted(
                    f"saved after epoch {epoch + 1} of {schedule.epochs}; the same command goes on"
                )
    run.finish({"step": training.step, "best": training.best})


def _end_epoch(
    run: util.RunDirectory,
    training: _Training,
    objective: Objective,
    epoch: int,
    steps: int,
    seconds: float,
    board: Any,
    bar: Any,
    stopping: bool,
) -> None:
    """Record the epoch, validate, and save what is due."""
    schedule, last = training.schedule, epoch + 1 == training.schedule.epochs
    record = {
        "epoch": epoch + 1,
        "step": training.step,
        "lr": training.learning_rate(),
        **{name: value / steps for name, value in training.sums.items()},
    }
    better = False
    if last or (epoch + 1) % schedule.val_every == 0:
        record |= training.validate(objective)
        # without held-out concepts nothing can choose: best is the last one
        chosen_by = record.get("select", training.best)
        better = chosen_by > training.best or "select" not in record
        training.best = max(training.best, chosen_by)
    training.sums = {}
    for name, value in record.items():
        board.add_scalar(name, value, training.step)
    util.append_jsonl(
        run.path / "metrics.jsonl", record | {"seconds": round(seconds, 1), "best_so_far": better}
    )
    called = schedule.epochs_per_call and (epoch + 1) % schedule.epochs_per_call == 0
    if better or last or stopping or called or (epoch + 1) % schedule.save_every == 0:
        training.save(best=better)
    bar.set_postfix(
        {"epoch": epoch + 1, "loss": f"{record['loss']:.3f}"}
        | ({"held-out": f"{record['select']:.3f}"} if "select" in record else {})
    )


def _drop_later_records(path: Path, step: int) -> None:
    """Forget epochs that were recorded but not saved before a kill: they are trained again."""
    records = util.read_jsonl(path)
    kept = [record for record in records if record["step"] <= step]
    if len(kept) < len(records):
        with util.atomic_write(path) as file:
            file.writelines(util.json_line(record) for record in kept)
