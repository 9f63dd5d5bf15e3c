"""What people see of a training: losses, their sums, a first-minute check, trackers.

``training`` is loop.py's state of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import util
from dataset import TrainingData
from loss import first_non_finite
from modalities import AUTO
from rundirs.directory import RunDirectory

READ_EVERY = 16  # steps between reading losses off a GPU: each read waits for it
SANITY_STEPS = 30  # after which the first batch is looked at again


class Ledger:
    """Losses of the steps: sums of the epoch so far, and the last ones. Refuses NaN."""

    def __init__(self, read_every: int) -> None:
        self.read_every = read_every
        self.sums: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._unread: list[tuple[int, list[str], torch.Tensor]] = []

    def add(self, step: int, losses: Mapping[str, torch.Tensor], norm: torch.Tensor) -> None:
        values = torch.stack([value.detach().float() for value in (*losses.values(), norm)])
        self._unread.append((step, list(losses), values))
        if len(self._unread) >= self.read_every:
            self.read()

    def read(self) -> None:
        """Raises DataError for the first loss or gradient that was not finite."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        table = torch.stack([values for _, _, values in unread]).cpu()
        for (step, names, _), row in zip(unread, table, strict=True):
            culprit = first_non_finite(dict(zip([*names, "the gradient"], row, strict=True)))
            if culprit:
                raise util.DataError(
                    f"step {step}",
                    f"{culprit} is not finite",
                    "finite numbers",
                    "the last checkpoint is kept; lower --learning_rate or set --grad_clip",
                )
            self.last = dict(zip(names, row.tolist(), strict=False))
            for name, value in self.last.items():
                self.sums[name] = self.sums.get(name, 0.0) + value


class Sanity:
    """Whether anything is learned at all, told in the first minute from the first batch.

    It is looked at without dropout and with the same noise before the first step and after some;
    the run itself does not change by it.
    """

    def __init__(self, training: Any, data: TrainingData) -> None:
        batches = data.batches(0, training.schedule.batch_size, 0, training.part)
        self.batch = next(batches).to(training.processes.device)
        self.before = self._losses(training)

    @torch.no_grad()
    def _losses(self, training: Any) -> dict[str, float]:
        training.model.eval()
        generator = util.generator_for(
            training.schedule.seed, "sanity", device=training.processes.device
        )
        losses = training.objective.losses(self.batch, generator, training.part)
        training.train_mode()
        return {name: float(value) for name, value in losses.items()}

    def tell(self, training: Any) -> None:
        """One line: is a loss falling, what norms do the targets have, is any modality dead?"""
        after = self._losses(training)
        parts = [name for name in after if name.startswith("prior_")] or ["loss"]
        falls = ", ".join(
            f"{name.removeprefix('prior_')} {self.before[name]:.3f} -> {after[name]:.3f}"
            for name in parts
        )
        dead = [name for name in parts if after[name] == self.before[name]]
        norm = self.batch.targets["image"].norm(dim=1).mean()
        verdict = "falls" if after["loss"] < self.before["loss"] else "DOES NOT FALL"
        util.LOG.info(
            "sanity, first batch after %d steps: loss %.3f -> %.3f %s; %s; mean norm of image "
            "targets %.2f%s",
            training.step,
            self.before["loss"],
            after["loss"],
            verdict,
            falls,
            norm,
            f"; DEAD: {', '.join(dead)}" if dead else "",
        )


@dataclass(frozen=True)
class Watch:
    """Who sees each step: a ``bar``, and the first-minute check; ``report`` sees each epoch."""

    bar: Any
    sanity: Sanity | None
    report: Callable[[Mapping[str, float], int], None]

    def step(self, training: Any) -> None:
        self.bar.update()
        if training.step % READ_EVERY == 0 and training.ledger.last:
            self.bar.set_postfix(_shown(training.ledger.last), refresh=False)
        if self.sanity and training.step == min(SANITY_STEPS, training.steps):
            self.sanity.tell(training)


def _shown(losses: Mapping[str, float]) -> dict[str, str]:
    """The last losses, modality by modality, beside the bar."""
    return {
        name.removeprefix("prior_"): f"{value:.2f}"
        for name, value in losses.items()
        if not name.startswith("cosine_")
    }


@contextlib.contextmanager
def watched(run: RunDirectory, training: Any, data: TrainingData) -> Iterator[Watch]:
    """From where a run stands to its end, or to where it is left."""
    from rundirs.progress import Progress

    sanity = Sanity(training, data) if training.step == 0 else None
    silent = not training.processes.first
    with (
        reporters(run, training, training.computing.report_to) as report,
        Progress(
            total=None if training.schedule.epochs == AUTO else training.steps,
            initial=training.step,
            desc="training",
            unit="step",
            disable=silent,
        ) as bar,
    ):
        yield Watch(bar, sanity, report)


@contextlib.contextmanager
def reporters(run: RunDirectory, training: Any, report_to: str) -> Iterator[Any]:
    """A function of (record, step) that tells TensorBoard, and wandb or trackio if asked to."""
    if not training.processes.first:
        yield lambda _record, _step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    tracker = _tracker(report_to)
    if tracker:
        tracker.init(project="eeg-to-image", name=run.path.name, config=training.model.header())
    with SummaryWriter(str(run.path / "tensorboard"), purge_step=training.step) as board:

        def report(record: Mapping[str, float], step: int) -> None:
            for name, value in record.items():
                board.add_scalar(name, value, step)
            if tracker:
                tracker.log(dict(record), step=step)

        yield report
    if tracker:
        tracker.finish()


def _tracker(name: str) -> Any:
    """The module wandb or trackio, which agree in init, log and finish; None for ``none``."""
    try:
        if name == "wandb":
            import wandb as tracker
        elif name == "trackio":
            import trackio as tracker
        else:
            tracker = None
    except ImportError:
        raise util.UserError(
            "--report_to", f"{name} is not installed", "an installed package", f"pip install {name}"
        ) from None
    return tracker
