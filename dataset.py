"""Recordings and feature banks, joined by stimulus id; splits. As a script: a check of DATA."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("check")

import numpy as np
import torch

import util
from datafiles import check
from datafiles.alignment import Reading, euclidean
from datafiles.averaging import MEAN, SingleTrials, join_repetitions
from datafiles.blurs import blurs_of, drawn_targets, lots_of
from datafiles.datasets.block_design import Blocks, convert_blocks
from datafiles.datasets.registry import layout_in
from datafiles.eeg_files import (
    Recording,
    Signal,
    average_trials,
    cache_folder,
    cache_home,
    check_rows,
    common_scale,
    list_subjects,
    match_signal,
    mean_trial,
    open_recording,
    select_signal,
)
from datafiles.export import Export, write_as_form
from datafiles.feature_bank import BLURRED, open_bank
from datafiles.feature_import import FeatureImport, import_features
from datafiles.feature_join import FeatureJoin, join_features
from datafiles.fetch import Fetch, fetch
from datafiles.splits import held_out_concepts, numbered
from datafiles.stimuli import IMAGE_FOLDER, Stimulus, check_disjoint, list_stimuli, stimulus_id
from modalities import AUTO, NAMES
from util import WHOLE, Part


@dataclass(frozen=True)
class TestEEG:
    """Averaged EEG [N, C, T] of one subject's test recording; stimuli where DATA is at hand."""

    __test__ = False  # not a pytest class

    eeg: torch.Tensor
    subject: str
    stimuli: list[Stimulus] | None
    hash: str
    source: Path
    trials: SingleTrials | None = None  # None: there are no single ones
    transductive: bool = False  # aligned by itself, as a stranger's recording

    @property
    def ids(self) -> list[int]:
        """Stimulus ids; of the row number where there are no pictures."""
        return (
            [item.id for item in self.stimuli]
            if self.stimuli
            else [stimulus_id(f"row/{row}") for row in range(len(self.eeg))]
        )

    @property
    def names(self) -> list[str]:
        """Folders for the output, one per row: of a concept with several pictures one for each."""
        if not self.stimuli:
            return [f"{row + 1:05d}_unknown" for row in range(len(self.eeg))]
        pictures = Counter(item.folder for item in self.stimuli)
        return [
            item.folder if pictures[item.folder] == 1 else item.key.split("/", 1)[1]
            for item in self.stimuli
        ]


def open_test(
    file: Path,
    subject: str,
    data_path: Path | None,
    cache_dir: Path | None,
    reading: Reading,
    averaging: str = MEAN,
) -> TestEEG:
    """One subject's test recording, its repetitions joined, as a model reads it."""
    # first the pictures: a DATA that is not there must not be made by the cache
    stimuli = list_stimuli(data_path, "test") if data_path else None
    cache = cache_folder(data_path or cache_home(file), cache_dir)
    recording = open_recording(file, cache, stimuli)
    if stimuli:
        check_rows(recording, stimuli)
    signal = reading.signal(recording)
    averaged = join_repetitions(recording, signal, averaging)
    trials = SingleTrials(recording, signal)
    return TestEEG(averaged, subject, stimuli, recording.hash, file, trials, reading.transductive)


# ---------------------------------------------------------------- training data


@dataclass(frozen=True)
class Batch:
    """eeg float32 [B, C, T]; subject, stimulus int64 [B]; targets {modality: float32 [B, D]}."""

    eeg: torch.Tensor
    subject: torch.Tensor
    stimulus: torch.Tensor
    targets: dict[str, torch.Tensor]

    def part(self, part: Part) -> Batch:
        """A part of the rows."""
        return self.mapped(part.of)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Each tensor of it changed."""
        targets = {name: change(rows) for name, rows in self.targets.items()}
        return Batch(change(self.eeg), change(self.subject), change(self.stimulus), targets)

    def to(self, device: torch.device) -> Batch:
        """On a device; a GPU takes it from pinned memory, and nobody waits for the copy."""
        return self.mapped(lambda rows: util.sent(rows, device))


def _as_tensor(eeg: np.ndarray) -> torch.Tensor:
    """A view of a memory-mapped array, which nothing writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(eeg)


@dataclass(frozen=True)
class TrainingData:
    """Recordings of all subjects, joined with their targets, split by concept.

    ``signal``: {channels, times, subjects}; ``targets`` {modality: [N, D]} in stimulus row order,
    and the layers that were asked for, or the blurred versions;
    ``stimulus`` and ``concept`` int64 [N]: their ids and the number of each one's concept;
    ``train_rows`` and ``val_rows`` int64: rows of disjoint concepts.
    """

    recordings: list[Recording]
    cuts: list[Signal]
    signal: dict[str, Any]
    stimulus: torch.Tensor
    concept: torch.Tensor
    targets: dict[str, torch.Tensor]
    train_rows: torch.Tensor
    val_rows: torch.Tensor
    trials: str
    seed: int
    clip: dict[str, Any]
    hashes: dict[str, str] = field(default_factory=dict)
    first_subject: int = 0  # the model's index of the first subject here
    concept_names: Sequence[str] = ()  # by number
    notes: Sequence[str] = ()  # to be said in the log
    held: list[torch.Tensor] | None = None  # on a device: EEG [N, R, C, T] per subject, cut

    def aligned(self) -> TrainingData:
        """Each person's EEG whitened by its own training trials, where that was asked for."""
        if not self.signal.get("align"):
            return self
        rows = self.train_rows.tolist()
        pairs = zip(self.recordings, self.cuts, strict=True)
        cuts = [replace(cut, spatial=euclidean(item, cut, rows)) for item, cut in pairs]
        return replace(self, cuts=cuts)

    def concepts(self) -> dict[str, list[str]]:
        """Names of the concepts that are trained on and ``held_out``, sorted."""
        parts = {"trained": self.train_rows, "held_out": self.val_rows}
        return {
            part: [self.concept_names[number] for number in self.concept[rows].unique().tolist()]
            for part, rows in parts.items()
        }

    @cached_property
    def samples(self) -> torch.Tensor:
        """int64 [S, 3]: (subject, stimulus row, repetition; -1 = not a single one) of an epoch."""
        repetitions = (
            range(min(int(item.trial_counts.max()) for item in self.recordings))
            if self.trials == "single"
            else (-1,)
        )
        every = torch.cartesian_prod(
            torch.arange(len(self.recordings)), self.train_rows, torch.tensor(repetitions)
        )
        subject, row, repetition = every.unbind(1)
        return every[repetition < self.counts[subject, row]]

    @cached_property
    def counts(self) -> torch.Tensor:
        return trial_counts(self.recordings)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches only, so that every step sees the same number of negatives."""
        return max(1, len(self.samples) // batch_size)

    def batches(
        self, epoch: int, batch_size: int, first: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """The epoch's batches from number ``first`` on, or this process' part of each.

        Order and trial subsets depend on (seed, epoch) alone.
        """
        order = torch.randperm(
            len(self.samples), generator=util.generator_for(self.seed, "order", epoch)
        )
        lots = lots_of(len(blurs_of(self.targets)), len(self.samples), self.seed, epoch)
        kept = self._kept_trials(epoch)
        for index in range(first, self.steps_per_epoch(batch_size)):
            numbers = part.of(order[index * batch_size : (index + 1) * batch_size])
            subject, row, repetition = self.samples[numbers].unbind(1)
            eeg = self._gather(subject, row, repetition, None if kept is None else kept[numbers])
            yield Batch(
                eeg,
                subject + self.first_subject,
                self.stimulus[row],
                drawn_targets(self.targets, row, None if lots is None else lots[numbers]),
            )

    def _kept_trials(self, epoch: int) -> torch.Tensor | None:
        """bool [S, R]: of which repetitions a sample is the mean in this epoch; None: a single one.

        ``random``: as many as a fair die says, drawn without replacement.
        """
        if self.trials == "single":
            return None
        most = int(self.counts.max())
        count = self.counts[self.samples[:, 0], self.samples[:, 1], None]
        exists = torch.arange(most) < count
        if self.trials == "average":
            return exists
        draw = util.generator_for(self.seed, "trials", epoch)
        lots = torch.rand(len(self.samples), most, generator=draw).masked_fill(~exists, 2.0)
        size = 1 + (torch.rand(len(self.samples), 1, generator=draw) * count).long()
        return lots.argsort(dim=1).argsort(dim=1) < size

    def _gather(
        self,
        subject: torch.Tensor,
        row: torch.Tensor,
        repetition: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """EEG float32 [B, C, T] of samples, where the EEG is held: one read for each subject."""
        shape = (len(row), len(self.signal["channels"]), len(self.signal["times"]))
        found = None
        for index in subject.unique().tolist():
            rows = (subject == index).nonzero().squeeze(1)
            source, cut = self._source(index)
            chosen = row[rows].to(source.device)
            if kept is None:
                eeg = source[chosen, repetition[rows].to(source.device)]
            else:
                weight = kept[rows, : source.shape[1]].to(source)
                eeg = torch.einsum("br,brct->bct", weight, source[chosen])
                eeg = eeg / weight.sum(dim=1)[:, None, None]
            found = torch.empty(shape, device=source.device) if found is None else found
            found[rows.to(source.device)] = eeg if cut is None else cut.cut(eeg)
        return found

    def _source(self, index: int) -> tuple[torch.Tensor, Signal | None]:
        """A subject's EEG [N, R, channels, samples], and how it still has to be cut."""
        if self.held is not None:
            return self.held[index], None
        return _as_tensor(self.recordings[index].eeg), self.cuts[index]

    @property
    def held_bytes(self) -> int:
        """What :meth:`held_on` takes."""
        each = 4 * len(self.signal["channels"]) * len(self.signal["times"])
        repetitions = (
            1 if self.trials == "average" else item.eeg.shape[1] for item in self.recordings
        )
        return sum(len(self.stimulus) * count * each for count in repetitions)

    def held_on(self, device: torch.device) -> TrainingData:
        """The same with all EEG on a device; averaged there is one repetition."""
        held = []
        for item, cut in zip(self.recordings, self.cuts, strict=True):
            if self.trials == "average":
                eeg = average_trials(item, cut)[:, None]
            else:
                eeg = torch.from_numpy(np.ascontiguousarray(cut.cut(item.eeg)))
            held.append(eeg.to(device))
        return replace(self, held=held)

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out stimuli averaged over repetitions: EEG [subjects x V, C, T], subject ids.

        Subject-major.
        """
        eeg = [
            mean_trial(item, cut, row)
            for item, cut in zip(self.recordings, self.cuts, strict=True)
            for row in self.val_rows.tolist()
        ]
        subject = torch.arange(len(self.recordings)).repeat_interleave(len(self.val_rows))
        shape = (-1, len(self.signal["channels"]), len(self.signal["times"]))
        return torch.from_numpy(np.asarray(eeg, np.float32).reshape(shape)), (
            subject + self.first_subject
        )

    def groups(self, stimulus: torch.Tensor, positives: str) -> torch.Tensor | None:
        """Group numbers int64 [B] of rows with these stimulus ids [B], by ``--contrast_positives``.

        None for ``pair``: each row is alone. Rows of one stimulus, having one target, then get the
        loss and gradients that grouping them would give.
        """
        if positives == "pair":
            return None
        ids, concept = self._concepts_on(stimulus.device)
        return concept[torch.searchsorted(ids, stimulus)]

    def _concepts_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, concepts) int64 [N] by rising id, copied to a device once: it is not waited for."""
        if device not in self._by_id:
            ids, place = self.stimulus.sort()
            self._by_id[device] = ids.to(device), self.concept[place].to(device)
        return self._by_id[device]

    @cached_property
    def _by_id(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def describe(self) -> Iterator[str]:
        """The plan of a run, for people."""
        yield (
            f"read {', '.join(self.signal['subjects'])}: {len(self.signal['channels'])} channels x "
            f"{len(self.signal['times'])} samples, {len(self.samples)} training samples "
            f"({self.trials} trials)"
        )
        if "scale" in self.signal:
            yield f"multiply the recordings, which are not whitened, by {self.signal['scale']:g}"
        if "align" in self.signal:
            yield "align everybody's EEG by the mean covariance of the own training trials"
        yield (
            f"train on {len(self.train_rows)} pictures, validate on {len(self.val_rows)} pictures "
            "of held-out concepts"
        )
        if lost := int((self.counts == 0).any(dim=0).sum()):
            yield f"{lost} pictures are left out: somebody has no trial of them"
        if blurs := blurs_of(self.targets)[1:]:
            yield f"contrast with the picture, {' or '.join(blurs)}, by lot"
        yield from self.notes


def trial_counts(recordings: Sequence[Recording]) -> torch.Tensor:
    """int64 [subjects, N]: trials of each picture."""
    return torch.from_numpy(np.stack([item.trial_counts for item in recordings]))


def training_stimuli(data_path: Path) -> list[Stimulus]:
    """The training pictures in row order. Raises DataError, also if a concept is tested, too."""
    stimuli = list_stimuli(data_path, "training")
    if (Path(data_path) / IMAGE_FOLDER["test"]).is_dir():
        check_disjoint(stimuli, list_stimuli(data_path, "test"))
    return stimuli


@dataclass(frozen=True)
class DataChoice:
    """What a run trains on; names as the flags of ``args.py``."""

    data_path: Path
    clip_feature_path: Path
    trials: str
    val_fraction: float
    seed: int
    subjects: Sequence[str] | None = None
    channels: Sequence[str] | None = None
    time_window: Sequence[float] | None = None
    cache_dir: Path | None = None
    dataset: str = AUTO
    align: str = "none"

    def recordings(self, stimuli: Sequence[Stimulus]) -> dict[str, Recording]:
        """{subject: its training recording of these}. Raises UserError / DataError."""
        folder = cache_folder(self.data_path, self.cache_dir)
        layout = layout_in(self.data_path, self.dataset)
        found = {
            name: open_recording(layout.file(name, "training"), folder, stimuli)
            for name in list_subjects(self.data_path, self.subjects, self.dataset)
        }
        for recording in found.values():
            check_rows(recording, stimuli)
        return found


def what_is_read(
    of: Mapping[str, Recording], asked: DataChoice
) -> tuple[list[Signal], dict[str, Any]]:
    """How each subject's recording is cut and scaled, and what a model's header says of it."""
    recordings = list(of.values())
    cut = select_signal(recordings[0], asked.channels, asked.time_window)
    cuts = [match_signal(recording, cut.channels, cut.times) for recording in recordings]
    scale = common_scale(recordings, cuts)
    signal = {"channels": cut.channels, "times": cut.times, "subjects": list(of)}
    scaled = [replace(one, scale=scale) for one in cuts]
    signal |= {} if scale == 1 else {"scale": scale}
    return scaled, signal | ({} if asked.align == "none" else {"align": asked.align})


def open_training(
    asked: DataChoice,
    layers: Sequence[str] = (),
    donor: Mapping[str, Sequence[str]] | None = None,
    needed: Sequence[str] = NAMES,
) -> TrainingData:
    """Open everything training reads, checked and joined by stimulus id. UserError / DataError.

    ``layers``: whose features are wanted among the targets; without any, all blurred versions are.
    ``donor``: the concepts of the model that training starts from, see
    :func:`datafiles.splits.fair_validation`. ``needed``: the modalities.
    """
    stimuli = training_stimuli(asked.data_path)
    also = None if layers else BLURRED
    bank = open_bank(asked.clip_feature_path, "training", layers, needed, also)
    targets = bank.rows_for(stimuli)
    of = asked.recordings(stimuli)
    recordings = list(of.values())
    cuts, signal = what_is_read(of, asked)
    concepts = [item.concept for item in stimuli]
    held_out, notes = held_out_concepts(concepts, asked.val_fraction, asked.seed, donor)
    is_val = torch.tensor([concept in held_out for concept in concepts])
    seen = trial_counts(recordings).all(dim=0)  # by everybody
    names, numbers = numbered(concepts)
    return TrainingData(
        recordings,
        cuts,
        signal,
        torch.tensor([item.id for item in stimuli]),
        numbers,
        targets,
        (seen & ~is_val).nonzero().squeeze(1),
        (seen & is_val).nonzero().squeeze(1),
        asked.trials,
        asked.seed,
        bank.clip,
        {"clip_features": bank.hash} | {f"eeg_{name}": item.hash for name, item in of.items()},
        concept_names=names,
        notes=notes,
    )


# ---------------------------------------------------------------- as a script


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Inspect or export a data folder, or import a bank. Exit code 1 if something is wrong."""
    options = args.resolve("check", argv)
    values = options.values
    if values.fetch:
        for line in fetch(options.settings(Fetch)):
            print(line, flush=True)
        return 0
    if values.import_features:
        print(*import_features(options.settings(FeatureImport)), sep="\n")
        return 0
    if values.join_features:
        print(*join_features(options.settings(FeatureJoin)), sep="\n")
        return 0
    if values.blocks:
        print(*convert_blocks(options.settings(Blocks)), sep="\n")
        return 0
    if values.export:
        print(*write_as_form(options.settings(Export)), sep="\n")
        return 0
    findings = check.examine(
        values.data_path,
        values.subjects,
        values.captions,
        values.clip_feature_path,
        values.check == "full",
        values.dataset,
    )
    print(f"{values.data_path}:", *findings.lines(), sep="\n")
    return int(bool(findings.problems))


if __name__ == "__main__":
    raise SystemExit(main())
