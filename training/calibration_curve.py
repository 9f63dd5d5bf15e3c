"""How many minutes of a new person's EEG a model needs: train.py --adapt_from RUN --minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metrics
import util
from dataset import TrainingData
from decoder.controls import shuffled_top_k
from decoder.decoder import Decoder
from rundirs.checkpoints import LATEST
from rundirs.environment import environment
from rundirs.files import atomic_write, write_json
from rundirs.markdown import number, table, with_interval
from util import UserError

PERMUTATIONS = 200
HOW_CALIBRATED = (
    "encoder -> image among held-out training concepts, which neither the model nor its "
    "calibration was trained on, averaged over their trials; the last checkpoint, so that nothing "
    "is selected; 0 minutes: the model as it is, to which the person is a stranger; 95 % bootstrap "
    "over pictures; control: EEG dealt to other pictures"
)
CurveRow = Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """On how many minutes a model is trained, and where; names as the flags of ``args.py``."""

    minutes: list[float] | None
    output_dir: Path


def calibrations(asked: Calibration) -> list[Calibration]:
    """The runs of a call: one, or of several ``--minutes`` one each."""
    if len(asked.minutes or ()) < 2:
        return [asked]
    return [
        Calibration([one], minutes_folder(asked.output_dir, one)) for one in asked.minutes or ()
    ]


def minutes_folder(run: Path, minutes: float) -> Path:
    """Of the training on so many minutes of a new person's EEG."""
    return run / f"minutes_{minutes:g}"


def trials_shown(counts: torch.Tensor, trials: int, seed: int) -> torch.Tensor:
    """int64 [N]: trials of each picture after the first ``trials`` of a session, see below.

    counts int64 [N]: of all sessions. All pictures come once, in random order, then again: of more
    trials, those of fewer are the first.
    """
    shown = torch.zeros_like(counts)
    for repetition in range(int(counts.max())):
        draw = util.generator_for(seed, "minutes", repetition)
        order = torch.randperm(len(counts), generator=draw)
        there = order[counts[order] > repetition]
        shown[there[: max(trials - int(shown.sum()), 0)]] += 1
    return shown


def within_minutes(data: TrainingData, minutes: float, trial_seconds: float) -> TrainingData:
    """The training trials of so many minutes of each person; held-out concepts stay as they are.

    Raises UserError for fewer minutes than a trial of a picture, or more than were recorded.
    """
    rows, trials = data.train_rows, round(60 * minutes / trial_seconds)
    there = int(data.counts[:, rows].sum(dim=1).min())
    if not 2 <= trials <= there:
        raise UserError(
            f"--minutes {minutes:g}",
            f"{trials:,} trials of {trial_seconds:g} s",
            f"2 to {there:,} trials to train on, {there * trial_seconds / 60:.3g} minutes",
            "choose others, or the time of a trial in your recording (--trial_seconds)",
        )
    recordings = []
    for recording, counts in zip(data.recordings, data.counts, strict=True):
        own = counts.clone()
        own[rows] = trials_shown(counts[rows], trials, data.seed)
        recordings.append(replace(recording, counts=own.tolist()))
    limited = replace(data, recordings=recordings)
    seen = rows[(limited.counts[:, rows] > 0).all(dim=0)]
    note = f"{minutes:g} minutes: {trials:,} trials of {trial_seconds:g} s, {len(seen):,} pictures"
    return replace(limited, train_rows=seen, notes=[*data.notes, note])


# ---------------------------------------------------------------- the curve


def curve_rows(
    models: Mapping[float, Decoder], subjects: Sequence[str], data: TrainingData
) -> list[dict[str, Any]]:
    """A row per person and model. ``models``: by minutes; ``data``: with held-out concepts."""
    targets = {name: rows[data.val_rows] for name, rows in data.targets.items()}
    eeg, _ = data.validation()
    rows = []
    for minutes, decoder in sorted(models.items()):
        for subject, own in zip(subjects, eeg.split(len(data.val_rows)), strict=True):
            index = decoder.subject_index(subject)
            gallery = decoder.gallery(targets, index).cpu()
            embedded = decoder.embed(own, torch.full((len(own),), index))
            similarity = metrics.cosine_similarity(embedded, gallery)
            rows.append({"minutes": minutes, "subject": subject, **_scores(similarity, data.seed)})
    return rows


def _scores(similarity: torch.Tensor, seed: int) -> dict[str, Any]:
    truth = torch.arange(len(similarity))
    better, tied = metrics.ranks(similarity, truth)
    row: dict[str, Any] = {"n": len(truth)}
    for k in (1, 5):
        hits = metrics.top_k_probability(better, tied, k).numpy()
        row[f"top{k}"] = float(hits.mean())
        row[f"top{k}_interval"] = metrics.bootstrap_interval(hits, seed)
        dealt = shuffled_top_k(similarity, truth, k, seed, PERMUTATIONS)
        row[f"top{k}_shuffled"] = float(dealt.mean())
        row[f"top{k}_chance"] = min(k / len(truth), 1.0)
    return row


def curve_table(rows: Sequence[CurveRow]) -> list[str]:
    head = ["minutes", "subject", "N"]
    for k in (1, 5):
        head += [f"top-{k} [95 %]", "shuffled EEG", "chance"]
    lines = []
    for row in rows:
        cells = [f"{row['minutes']:g}", row["subject"], f"{row['n']}"]
        for name in ("top1", "top5"):
            cells += [with_interval(row[name], row[f"{name}_interval"]),
                      number(row[f"{name}_shuffled"]), number(row[f"{name}_chance"])]  # fmt: skip
        lines.append(cells)
    return table(head, lines)


def draw_curve(rows: Sequence[CurveRow], simulated: bool, path: Path) -> None:
    """Score against minutes, a line per person, with chance and the stranger's score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    minutes = sorted({row["minutes"] for row in rows})
    for axis, (name, title) in zip(axes, (("top1", "top-1"), ("top5", "top-5")), strict=True):
        for subject in dict.fromkeys(row["subject"] for row in rows):
            own = [row for row in rows if row["subject"] == subject]
            places = [minutes.index(row["minutes"]) for row in own]
            ends = np.array([row[f"{name}_interval"] for row in own])
            (line,) = axis.plot(places, [row[name] for row in own], marker="o", label=subject)
            axis.fill_between(places, *ends.T, alpha=0.15, color=line.get_color(), linewidth=0)
        shuffled = [np.mean([row[f"{name}_shuffled"] for row in rows if row["minutes"] == one])
                    for one in minutes]  # fmt: skip
        axis.plot(range(len(minutes)), shuffled, color="0.4", linestyle=":", label="shuffled EEG")
        axis.axhline(rows[0][f"{name}_chance"], color="0.4", linewidth=0.8, label="chance")
        axis.set(title=title, xlabel="minutes of the new person's EEG", ylim=(0, None))
        axis.set_xticks(range(len(minutes)), ["0\nstranger"] + [f"{m:g}" for m in minutes[1:]])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    mark = ", SIMULATED EEG" if simulated else ""
    figure.suptitle(f"Encoder → image among N = {rows[0]['n']} pictures of unseen concepts{mark}")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=140, format="png")
    pyplot.close(figure)


def write_curve(
    run: Path, donor: Decoder, minutes: Sequence[float], data: TrainingData, simulated: bool
) -> list[str]:
    """``calibration.json`` and ``calibration.png`` of finished runs; returns the table."""
    subjects = data.signal["subjects"]
    models = {0.0: donor} | {one: Decoder.load(minutes_folder(run, one), LATEST) for one in minutes}
    rows = curve_rows(models, subjects, data)
    write_json(
        run / "calibration.json",
        {
            "how": HOW_CALIBRATED,
            "rows": rows,
            "seed": data.seed,
            "simulated": simulated,
            **environment(),
        },
    )
    draw_curve(rows, simulated, run / "calibration.png")
    return [*curve_table(rows), "", HOW_CALIBRATED + (". SIMULATED EEG." if simulated else ".")]
