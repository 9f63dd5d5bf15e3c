"""The one training loop: epochs, validation, checkpoints, metrics, resume, preemption.

``train.py`` (encoder and priors) and ``ATMS_retrieval.py`` (encoder alone) differ in their
objective only. No random state is stored: every draw is recomputed from (seed, step), so a resumed
run is bit-exact. A batch is cut into equal parts, for processes and for accumulation; what is drawn
for a row does not depend on how.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import util
from cli.config import Options
from dataset import Batch, TrainingData
from masking import mask_eeg, mask_subject
from modalities import AUTO, STRICT
from rundirs.directory import RunDirectory
from rundirs.files import append_jsonl, atomic_write, json_line, read_jsonl
from training import monitor
from training.checkpoints import Checkpoints
from training.optimisation import Average, Schedule, copied, new_optimizer, set_learning_rate
from training.prefetch import on_their_way
from training.processes import Processes, open_together
from training.settings import Computing, Disturbance, Objective, Procedure
from util import Part

HELD_SHARE = 0.5  # of a GPU's free memory that EEG may take with --data_on_device auto


def describe_parameters(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"


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


# ---------------------------------------------------------------- one step


class LossModule(nn.Module):
    """An objective as a module, as DDP wants it: batch in, losses out."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, batch: Batch, generator: torch.Generator, part: Part
    ) -> dict[str, torch.Tensor]:
        return self.objective.losses(batch, generator, part)


def loss_module(model: nn.Module, objective: Objective, processes: Processes) -> nn.Module:
    """With several processes as DDP; on GPUs batch statistics are then those of the whole batch."""
    module = LossModule(model, objective)
    if processes.count == 1:
        return module
    if processes.device.type == "cuda":
        for network in model.networks():
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return nn.parallel.DistributedDataParallel(module)


class _Training:
    """State of one run: what the next call needs to go on as if nothing had happened."""

    def __init__(
        self,
        run: RunDirectory,
        model: nn.Module,
        objective: Objective,
        how: Procedure,
        processes: Processes,
        epoch_steps: int,
    ) -> None:
        self.model, self.objective, self.masking = model, objective, how.masking
        self.schedule, self.computing, self.processes = how.schedule, how.computing, processes
        self.epoch_steps, self.steps = epoch_steps, epoch_steps * how.schedule.most_epochs
        self.checkpoints = Checkpoints(run.path / "checkpoints")
        self.module = loss_module(model, objective, processes)
        if self.computing.compile:
            for network in model.networks():
                network.compile()
        self.optimizer = new_optimizer(model, self.schedule)
        half = self.computing.precision == "float16"
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=half)
        decay = self.schedule.ema_decay
        self.average = Average(model, decay) if decay else None
        self.step, self.best = 0, float("-inf")
        self.best_epoch = 0  # how many epochs had been trained at the best validation
        self.seconds = 0.0  # that the epoch took
        self.ledger = monitor.Ledger(1 if processes.device.type == "cpu" else monitor.READ_EVERY)

    def resume(self) -> None:
        loaded = self.checkpoints.load()
        if loaded is None:
            return
        model, header, state = loaded
        self.model.load_state_dict(model)
        self.model.recall(header)
        if self.average:
            self.average = Average(self.model, self.schedule.ema_decay)
            self.model.load_state_dict(state["raw"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.ledger.sums = state["step"], state["best"], state["sums"]
        self.seconds = state.get("seconds", 0.0)
        self.best_epoch = state.get("best_epoch", 0)
        util.LOG.info("resuming at step %d", self.step)

    @property
    def unrecorded(self) -> bool:
        """Whether an epoch is trained and saved, but not validated and recorded."""
        return bool(self.step and self.step % self.epoch_steps == 0 and self.ledger.sums)

    def save(self, *, best: bool = False) -> None:
        """By the first process, once it has seen that all losses were finite."""
        self.ledger.read()
        if not self.processes.first:
            return
        raw = copied(self.model.state_dict()) if self.average else None
        with self._averaged():
            self.checkpoints.save(
                self.step,
                self.model.state_dict(),
                self.model.header(),
                {
                    "raw": raw,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "step": self.step,
                    "best": self.best,
                    "sums": self.ledger.sums,
                    "seconds": self.seconds,
                    "best_epoch": self.best_epoch,
                },
                best=best,
            )

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.applied_to(self.model) if self.average else contextlib.nullcontext()

    def train_mode(self) -> None:
        """If a part is frozen, as the model will be used: no dropout, no new statistics."""
        self.model.train(all(parameter.requires_grad for parameter in self.model.parameters()))

    def share(self) -> float:
        """Of the peak learning rate, at this step."""
        return self.schedule.share(self.step, self.steps)

    @property
    def part(self) -> Part:
        """This process' part of a batch."""
        return Part(self.processes.index, self.processes.count)

    def update(self, batch: Batch) -> None:
        """One optimiser step for everything that is trained, on this process' part of a batch."""
        set_learning_rate(self.optimizer, self.share())
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(self._disturbed(batch))
        self.scaler.unscale_(self.optimizer)
        limit = self.schedule.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # float16's scaler skips a step whose gradient overflows, and goes on with a smaller scale
        skipped = self.scaler.is_enabled() and not norm.isfinite()
        self.ledger.add(self.step, losses, torch.zeros_like(norm) if skipped else norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average:
            self.average.update(self.model, self.step)

    def _generator(self, what: str) -> torch.Generator:
        return util.generator_for(self.schedule.seed, what, self.step)

    def _disturbed(self, batch: Batch) -> Batch:
        """EEG masked, and some subjects unknown, as drawn for the whole batch."""
        where = (self.part.index, self.part.count)
        eeg = mask_eeg(batch.eeg, self.masking, self._generator("mask"), *where)
        subject = mask_subject(
            batch.subject, self.masking.subject, self._generator("subject"), *where
        )
        return replace(batch, eeg=eeg, subject=subject)

    def _backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the mean loss over the accumulated parts; returns the mean losses."""
        count, means = self.computing.accumulate, {}
        for index in range(count):
            part = self.part.within(index, count)
            # dropout: another draw for another part, the same whoever computes it
            names = ("step", self.step, part.index) if part.index else ("step", self.step)
            torch.manual_seed(util.seed_for(self.schedule.seed, *names))
            more = index + 1 < count and self.processes.count > 1
            with self.module.no_sync() if more else contextlib.nullcontext():
                losses = self.losses(batch.part(Part(index, count)), part)
                self.scaler.scale(losses["loss"] / count).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.detach() / count
        return means

    def losses(self, batch: Batch, part: Part) -> dict[str, torch.Tensor]:
        """Of a part of a batch, in the precision of the run. Noise is drawn where it computes."""
        kind = self.processes.device.type
        dtype = util.PRECISIONS.get(self.computing.precision)  # STRICT has none, as float32
        generator = util.generator_for(
            self.schedule.seed, "noise", self.step, device=self.processes.device
        )
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            return self.module(batch, generator, part)

    def validate(self) -> dict[str, float]:
        with self._averaged():
            self.model.eval()
            scores = self.objective.validate()
        self.train_mode()
        return scores


# ---------------------------------------------------------------- the loop


def train(
    options: Options,
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    processes: Processes,
) -> RunDirectory:
    """:func:`fit` in the run directory of a call, as its flags say."""
    how = Procedure(
        options.settings(Schedule),
        options.settings(Computing),
        options.settings(Disturbance).masking(),
    )
    run = open_together(options, data.hashes, plan(model, data, how, processes), processes)
    for note in data.notes if processes.first else ():
        util.LOG.warning("%s", note)
    fit(run, model, objective, data, how, processes)
    return run


def plan(model: nn.Module, data: TrainingData, how: Procedure, processes: Processes) -> list[str]:
    """What :func:`fit` is going to do, for people.

    Raises UserError unless every batch can be cut into equal parts.
    """
    if how.schedule.epochs == AUTO and not len(data.val_rows):
        raise util.UserError(
            "--epochs auto", "no held-out concepts, by which it would end", "some",
            "give a number of epochs, or more --val_fraction",
        )  # fmt: skip
    rows = min(how.schedule.batch_size, len(data.samples))
    parts = processes.count * how.computing.accumulate
    if rows % parts:
        raise util.UserError(
            "--batch_size",
            f"{rows} samples for {processes.count} processes x --accumulate "
            f"{how.computing.accumulate}",
            f"a multiple of {parts}",
            "the batch is that of all processes together: choose another",
        )
    where = f"{processes.device} for {spoken_epochs(how.schedule)}"
    return [*data.describe(), f"train {describe_parameters(model)} on {where}"]


def spoken_epochs(schedule: Schedule) -> str:
    """How long training takes, for people."""
    if schedule.epochs == AUTO:
        return f"until {schedule.patience} epochs bring no better validation"
    return f"{schedule.epochs} epochs"


def fit(
    run: RunDirectory,
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    how: Procedure,
    processes: Processes,
) -> None:
    """Train to the last epoch in a started run directory, resuming from ``latest``.

    Raises util.Preempted after saving on a signal or after ``epochs_per_call``, DataError on a
    non-finite loss.
    """
    if run.finished:
        util.LOG.info("already finished; delete %s to train again", run.path / "DONE")
        return
    data = on_device(data, how.computing.data_on_device, processes.device)
    steps = data.steps_per_epoch(how.schedule.batch_size)
    model = model.to(processes.device)
    torch.set_float32_matmul_precision(rounding(how.computing.precision, processes.device))
    training = _Training(run, model, objective, how, processes, steps)
    if processes.first:
        training.checkpoints.prepare()
    processes.wait()
    training.resume()
    if processes.first:
        _drop_later_records(
            run.path / "metrics.jsonl", training.step, unrecorded=training.unrecorded
        )
    _announce(training)
    training.train_mode()
    with monitor.watched(run, training, data) as watch, stop_requests() as stops:
        _train_epochs(run, training, data, watch, stops)
    if processes.first:
        run.finish({"step": training.step, "best": training.best})
    processes.wait()


def _train_epochs(
    run: RunDirectory,
    training: _Training,
    data: TrainingData,
    watch: monitor.Watch,
    stops: list[str],
) -> None:
    """All epochs that are left, or those of this call. Raises util.Preempted."""
    schedule, first_epoch = training.schedule, training.step // training.epoch_steps
    if training.unrecorded:
        _end_epoch(run, training, first_epoch - 1, watch, stopping=False)
    for epoch in range(first_epoch, schedule.most_epochs):
        if training.processes.any(schedule.enough(epoch, training.best_epoch)):
            return
        started = time.monotonic()
        _train_epoch(training, data, epoch, watch, stops)
        stopping = training.processes.any(bool(stops))
        training.seconds = time.monotonic() - started
        _end_epoch(run, training, epoch, watch, stopping=stopping)
        if stopping:
            raise util.Preempted(
                f"{_reason(stops)}: saved after epoch {epoch + 1}; the same command goes on"
            )
        called = schedule.epochs_per_call
        over = training.processes.any(schedule.enough(epoch + 1, training.best_epoch))
        if called and epoch + 1 - first_epoch >= called and not over:
            raise util.Preempted(
                f"saved after epoch {epoch + 1} of {spoken_epochs(schedule)}; the same command "
                "goes on"
            )


def _train_epoch(
    training: _Training, data: TrainingData, epoch: int, watch: monitor.Watch, stops: list[str]
) -> None:
    """The steps of an epoch that are left. Raises util.Preempted in the middle of it."""
    steps = training.epoch_steps
    skipped = training.step - epoch * steps
    batches = data.batches(epoch, training.schedule.batch_size, skipped, training.part)
    for batch in on_their_way(batches, training.processes.device):
        training.update(batch)
        watch.step(training)
        # at an epoch's end it is recorded first
        if training.processes.any(bool(stops)) and training.step % steps:
            training.save()
            raise util.Preempted(
                f"{_reason(stops)}: saved at step {training.step}; the same command goes on"
            )


def rounding(precision: str, device: torch.device) -> str:
    """What products of float32 may be rounded to, in PyTorch's words: on a GPU TF32 (``high``)."""
    return "highest" if device.type == "cpu" or precision == STRICT else "high"


def on_device(data: TrainingData, wanted: str, device: torch.device) -> TrainingData:
    """``data`` with its EEG on a GPU if ``wanted`` is yes, or auto and it fits."""
    if device.type == "cpu" or wanted == "no":
        return data  # a CPU reads memory-mapped files as fast as its own memory
    free, _ = torch.cuda.mem_get_info(device)
    if wanted == "auto" and data.held_bytes > HELD_SHARE * free:
        util.LOG.info("%.1f GB of EEG stay in main memory", data.held_bytes / 1e9)
        return data
    return data.held_on(device)


def _announce(training: _Training) -> None:
    processes = training.processes
    util.LOG.info(
        "training %s on %s%s: %s, %d steps each",
        describe_parameters(training.model),
        processes.device,
        f" in {processes.count} processes" if processes.count > 1 else "",
        spoken_epochs(training.schedule),
        training.epoch_steps,
    )


def _reason(stops: list[str]) -> str:
    return stops[0] if stops else "another process was told to stop"


# ---------------------------------------------------------------- records


def _end_epoch(
    run: RunDirectory, training: _Training, epoch: int, watch: monitor.Watch, *, stopping: bool
) -> None:
    """Record the epoch, validate, and save; for the first time before validation, which may fail.

    It needs more memory than training does: if that is too much, nothing is lost.
    """
    schedule = training.schedule
    validated = epoch + 1 == schedule.most_epochs or (epoch + 1) % schedule.val_every == 0
    if not training.checkpoints.written:
        training.save()
    training.ledger.read()
    sums, training.ledger.sums = training.ledger.sums, {}
    means = training.processes.mean([value / training.epoch_steps for value in sums.values()])
    if training.processes.first:
        record = {
            "epoch": epoch + 1,
            "step": training.step,
            "lr": schedule.learning_rate * training.share(),
            **dict(zip(sums, means, strict=True)),
        }
        better = False
        if validated:
            record |= training.validate()
            # without held-out concepts nothing can choose: best is the last one
            chosen_by = record.get("select", training.best)
            better = chosen_by > training.best or "select" not in record
            training.best = max(training.best, chosen_by)
            training.best_epoch = epoch + 1 if better else training.best_epoch
        watch.report(record, training.step)
        append_jsonl(
            run.path / "metrics.jsonl",
            record | {"seconds": round(training.seconds, 1), "best_so_far": better},
        )
        called = schedule.epochs_per_call and (epoch + 1) % schedule.epochs_per_call == 0
        last = schedule.enough(epoch + 1, training.best_epoch)
        if better or last or stopping or called or (epoch + 1) % schedule.save_every == 0:
            training.save(best=better)
    training.processes.wait()


def _drop_later_records(path: Path, step: int, *, unrecorded: bool) -> None:
    """Forget epochs that were recorded but not saved before a kill: they are trained again.

    That of ``step`` itself, too, where it was recorded but its record not yet saved.
    """
    records = read_jsonl(path)
    kept = [record for record in records if record["step"] < step + (not unrecorded)]
    if len(kept) < len(records):
        with atomic_write(path) as file:
            file.writelines(json_line(record) for record in kept)
