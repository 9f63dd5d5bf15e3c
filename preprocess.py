"""Stage 0: raw EEG -> ``Preprocessed_data_250Hz/sub-XX``, session by session."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("preprocess")

import numpy as np

import util
from datafiles.eeg_files import EEG_FILE, EEG_FOLDER, SIMULATED_NOTE
from datafiles.published import OSF_SHAPE
from datafiles.stimuli import IMAGE_FOLDER, PARTITIONS, list_stimuli
from preprocessing import quality
from preprocessing.channels import (
    THINGS_CHANNELS,
    Signal,
    eeg_names,
    prepare,
    refuse_missing,
    wanted_channels,
)
from preprocessing.epochs import CHUNK, Piece, Window, cut_all
from preprocessing.recordings import (
    Recorded,
    Session,
    Subject,
    Trials,
    own_subjects,
    published_subjects,
)
from preprocessing.whitening import condition_weights, whitener
from util import LOG, DataError, UserError

PIECE_S = 120.0  # longest stretch of recording that is cut at once


@dataclass(frozen=True)
class Settings:
    """What is done to every session."""

    channels: list[str]
    interpolate: bool
    reference: list[str] | None
    band_hz: list[float] | None
    epoch_s: list[float]
    rate_hz: float
    whiten: bool
    dtype: str
    seed: int
    n_jobs: int

    def window(self, raw_hz: float) -> Window:
        return Window(self.epoch_s[0], self.epoch_s[1], raw_hz, self.rate_hz)

    @property
    def kept(self) -> int:
        """Samples of a trial that are written."""
        return self.window(self.rate_hz).kept

    @property
    def trial_bytes(self) -> int:
        return len(self.channels) * self.kept * np.dtype(self.dtype).itemsize


# ---------------------------------------------------------------- one session


@dataclass(frozen=True)
class Part:
    """The kept trials of one session and partition, on disk.

    ``conditions`` [n]: 0-based picture row of each; ``sigma`` [C, C]: their mean covariance, zero
    if it was not asked for; ``evoked`` [C, T + baseline], mean over trials, in volts; ``times``.
    """

    trials: Path
    conditions: np.ndarray
    sigma: np.ndarray
    evoked: np.ndarray
    times: np.ndarray

    def save(self) -> None:
        with util.atomic_write(self.trials.with_suffix(".npz"), "wb") as file:
            np.savez(
                file,
                conditions=self.conditions,
                sigma=self.sigma,
                evoked=self.evoked,
                times=self.times,
            )

    @classmethod
    def load(cls, trials: Path) -> Part:
        with np.load(trials.with_suffix(".npz"), allow_pickle=False) as file:
            return cls(trials, file["conditions"], file["sigma"], file["evoked"], file["times"])


def choose(trials: Trials, repetitions: int | None, seed: int, path: Path) -> np.ndarray:
    """Indices of the kept trials, by condition, then as drawn; all if ``repetitions`` is None.

    Drawn as THINGS-EEG2 does. Raises DataError for a picture that was shown less often.
    """
    from sklearn.utils import shuffle

    if repetitions is None:
        return np.lexsort((trials.onsets, trials.conditions))
    kept = []
    for condition in np.unique(trials.conditions):
        shown = np.flatnonzero(trials.conditions == condition)
        if len(shown) < repetitions:
            raise DataError(
                path,
                f"picture {condition + 1} was shown {len(shown)} times",
                f"{repetitions} times in each session",
                "the recording is incomplete: download it again",
            )
        kept.append(shuffle(shown, random_state=seed, n_samples=repetitions))
    return np.concatenate(kept)


def pieces(
    signal: Signal, trials: Trials, window: Window, weights: np.ndarray | None
) -> Iterator[Piece]:
    """The recording around the trials, in the order of time, few trials and seconds at a time."""
    first, last = window.offsets
    order = np.argsort(trials.onsets)
    longest = PIECE_S * window.raw_hz
    begin = 0
    while begin < len(order):
        start = trials.onsets[order[begin]]
        reach = np.searchsorted(trials.onsets[order], start + longest, side="right")
        rows = order[begin : min(begin + CHUNK, max(int(reach), begin + 1))]
        onsets = trials.onsets[rows] - (start + first)
        stop = int(trials.onsets[rows[-1]]) + last + 1
        yield Piece(
            signal.read(int(start) + first, stop),
            onsets,
            rows,
            None if weights is None else weights[rows],
        )
        begin += len(rows)


def extract(
    signal: Signal, trials: Trials, settings: Settings, path: Path, whiten: bool, label: str
) -> Part:
    """Cut the trials of a partition into ``path`` [n, C, T], row by row."""
    from tqdm import tqdm

    window = settings.window(signal.rate_hz)
    weights = condition_weights(trials.conditions) if whiten else None
    temporary = path.with_name(f".{path.name}.tmp")
    evoked, sigma, times = 0.0, 0.0, None
    with (
        open(temporary, "wb") as file,
        tqdm(total=len(trials.onsets), desc=label, unit="trial", leave=False) as bar,
    ):
        stretches = pieces(signal, trials, window, weights)
        for chunk in cut_all(stretches, window, settings.dtype, settings.n_jobs):
            if chunk.trials.shape[1:] != (len(settings.channels), window.kept):
                raise ValueError(f"trials of {chunk.trials.shape[1:]}")
            for row, trial in zip(chunk.rows.tolist(), chunk.trials, strict=True):
                file.seek(row * settings.trial_bytes)
                file.write(trial.tobytes())
            evoked, sigma, times = evoked + chunk.evoked, sigma + chunk.sigma, chunk.times
            bar.update(len(chunk.rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return Part(path, trials.conditions, sigma, evoked / len(trials.onsets), times)


def process_session(
    subject: Subject, session: Session, settings: Settings, folder: Path, sessions_left: int
) -> None:
    """Cut all trials of a session into ``folder``; its quality record is written last."""
    records = []
    for take in session.takes:
        recorded = take.open()
        signal = prepare(
            recorded.raw,
            recorded.path,
            settings.channels,
            settings.interpolate,
            settings.reference,
            settings.band_hz,
        )
        if signal.rate_hz < settings.rate_hz:
            LOG.warning(
                "%s: recorded at %g Hz, written at --rate %g: nothing above %g Hz is in it",
                recorded.path,
                signal.rate_hz,
                settings.rate_hz,
                signal.rate_hz / 2,
            )
        for partition in recorded.trials:
            records.append(
                _partition(
                    subject, session, recorded, signal, partition, settings, folder, sessions_left
                )
            )
        del recorded, signal  # of an hour's recording there is room for one
    util.write_json(folder / f"{session.name}.json", records)


def _partition(
    subject: Subject,
    session: Session,
    recorded: Recorded,
    signal: Signal,
    partition: str,
    settings: Settings,
    folder: Path,
    sessions_left: int,
) -> dict[str, Any]:
    """Cut one partition of a recording; what to know about its quality."""
    trials = recorded.trials[partition]
    inside = settings.window(signal.rate_hz).fits(trials.onsets, signal.samples)
    fitting = Trials(trials.onsets[inside], trials.conditions[inside])
    if not len(fitting.onsets):
        raise DataError(
            recorded.path,
            f"no whole {partition} trial among {len(trials.onsets)}",
            f"{settings.epoch_s[0]:g} to {settings.epoch_s[1]:g} s of recording around an event",
            "shorten --epoch, or check the onsets",
        )
    kept = choose(fitting, subject.repetitions.get(partition), settings.seed, recorded.path)
    check_disk(folder, len(kept) * settings.trial_bytes * (sessions_left + len(subject.sessions)))
    part = extract(
        signal,
        Trials(fitting.onsets[kept], fitting.conditions[kept]),
        settings,
        part_path(folder, session, partition),
        settings.whiten and partition == "training",
        f"{subject.name} {session.name} {partition}",
    )
    part.save()
    dropped = {"at the edge": int((~inside).sum()), "surplus": len(fitting.onsets) - len(kept)}
    if partition == next(iter(recorded.trials)):  # events that are no trials are counted once
        dropped = dict(recorded.dropped) | dropped
    return quality.record(session.name, partition, signal, len(kept), dropped, part.evoked)


def part_path(folder: Path, session: Session, partition: str) -> Path:
    return folder / f"{session.name}_{partition}.trials"


def check_disk(folder: Path, needed: int) -> None:
    """Raise DataError if what is still to be written does not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            folder,
            f"{free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB, for the sessions and the file made of them",
            "make room, name another --output_path, or choose --dtype float32",
        )


# ---------------------------------------------------------------- all sessions


def whiteners(parts: Mapping[str, Part]) -> dict[str, np.ndarray]:
    """{session: W [C, C]} from each session's training trials.

    A session without any gets W of the mean covariance of the others. Raises DataError.
    """
    if not parts:
        raise DataError(
            "--whiten",
            "no training trials",
            "training trials, from which the noise is estimated",
            "record some, or give --no-whiten",
        )
    mean = np.mean([part.sigma for part in parts.values()], axis=0)
    try:
        return {name: whitener(part.sigma) for name, part in parts.items()} | {"": whitener(mean)}
    except ValueError as error:
        raise DataError(
            "--whiten",
            f"a covariance that has no inverse ({error})",
            "channels that differ from each other",
            "leave out bridged or flat channels with --channels, or give --no-whiten",
        ) from None


def places(
    parts: Sequence[Part], pictures: int | None, fixed: bool, seed: int, where: str
) -> list[list[tuple[int, int]]]:
    """[picture][repetition] -> (part, row in it), sessions in order; all as often as the rarest.

    ``fixed``: all pictures must have been shown equally often. Raises DataError.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for number, part in enumerate(parts):
        for row, condition in enumerate(part.conditions.tolist()):
            found.setdefault(condition, []).append((number, row))
    expected = pictures or max(found) + 1
    lost = sorted(set(range(expected)) - found.keys())
    if lost:
        raise DataError(
            where,
            f"no trial of {len(lost)} pictures, e.g. picture {lost[0] + 1}",
            f"trials of pictures 1 to {expected}",
            "add the sessions in which they were shown (--sessions), or remove the pictures",
        )
    counts = [len(found[condition]) for condition in range(expected)]
    if fixed and len(set(counts)) > 1:
        raise DataError(
            where,
            f"{min(counts)} to {max(counts)} trials of a picture",
            "the same number of each",
            "THINGS-EEG2 needs all of its sessions",
        )
    if len(set(counts)) > 1:
        LOG.warning(
            "%s: %d to %d trials of a picture, so %d of each are kept, drawn at random",
            where, min(counts), max(counts), min(counts),
        )  # fmt: skip
    return [_draw(found[row], min(counts), seed, row) for row in range(expected)]


def _draw(items: list[tuple[int, int]], number: int, seed: int, row: int) -> list[tuple[int, int]]:
    draw = util.numpy_generator_for(seed, "repetitions", row)
    chosen = draw.choice(len(items), number, replace=False) if number < len(items) else None
    return items if chosen is None else [items[index] for index in sorted(chosen)]


def merged(
    parts: Sequence[Part],
    matrices: Sequence[np.ndarray | None],
    at: Sequence[Sequence[tuple[int, int]]],
    settings: Settings,
) -> Iterator[bytes]:
    """The rows [R, C, T] of the file, whitened, one picture after the other.

    The repetitions are put into one common random order, as THINGS-EEG2 does.
    """
    from sklearn.utils import shuffle

    order = shuffle(np.arange(len(at[0])), random_state=settings.seed)
    shape = (len(settings.channels), -1)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part.trials, "rb")) for part in parts]
        for repetitions in at:
            for number, row in (repetitions[index] for index in order):
                files[number].seek(row * settings.trial_bytes)
                content = files[number].read(settings.trial_bytes)
                trial = np.frombuffer(content, settings.dtype).reshape(shape)
                if matrices[number] is not None:
                    trial = (trial.T @ matrices[number]).T
                yield np.ascontiguousarray(trial, settings.dtype).tobytes()


class _Streamed:
    """Pickles as a C-ordered array whose bytes are :data:`_PLACEHOLDER`."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        make, blank, _ = np.empty(0, self.dtype).__reduce__()
        return make, blank, (1, self.shape, self.dtype, False, _PLACEHOLDER)


_PLACEHOLDER = b"the array's bytes " * 4096  # so long that pickle writes it outside its frames


def write_streamed(
    path: Path, shape: tuple[int, ...], dtype: str, content: Iterator[bytes], about: dict[str, Any]
) -> None:
    """Write the pickled dict of the published layout, protocol 4, without holding its array.

    ``content``: the array's bytes in C order. About 8 GB for a subject of THINGS-EEG2, where
    ``pickle.dump`` would hold them twice.
    """
    whole = pickle.dumps({"preprocessed_eeg_data": _Streamed(shape, dtype), **about}, protocol=4)
    head, tail = whole.split(b"B" + struct.pack("<I", len(_PLACEHOLDER)) + _PLACEHOLDER)
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with util.atomic_write(path, "wb") as file:
        file.write(head + b"\x8e" + struct.pack("<Q", expected))  # BINBYTES8
        written = sum(file.write(block) for block in content)
        if written != expected:
            raise ValueError(f"{written} bytes for an array of {expected}")
        file.write(tail)


def merge_subject(subject: Subject, settings: Settings, run: util.RunDirectory) -> None:
    """Whiten, join and write both partitions, and what to look at."""
    folder = run.path / "parts"
    parts = {
        partition: {
            session.name: Part.load(part_path(folder, session, partition))
            for session in subject.sessions
            if part_path(folder, session, partition).exists()
        }
        for partition in PARTITIONS
    }
    matrices = whiteners(parts["training"]) if settings.whiten else {}
    shapes = {}
    for partition, by_session in parts.items():
        if by_session:
            shapes[partition] = merge_partition(
                subject, partition, by_session, matrices, settings, run.path
            )
        else:
            LOG.warning("%s: no %s trials, so no %s", subject.name, partition, EEG_FILE[partition])
    quality.write(run.path, subject.name, settings.channels, parts, shapes, subject.simulated)


def merge_partition(
    subject: Subject,
    partition: str,
    parts: Mapping[str, Part],
    matrices: Mapping[str, np.ndarray],
    settings: Settings,
    folder: Path,
) -> tuple[int, int, int, int]:
    """Write one of the two files; its shape."""
    from tqdm import tqdm

    own, path = list(parts.values()), folder / EEG_FILE[partition]
    where = f"{subject.name}: {partition} trials of all sessions"
    at = places(own, subject.rows.get(partition), bool(subject.repetitions), settings.seed, where)
    shape = (len(at), len(at[0]), len(settings.channels), settings.kept)
    of = [matrices.get(name, matrices.get("")) for name in parts]
    rows = tqdm(
        merged(own, of, at, settings),
        desc=f"{subject.name} {partition}",
        total=shape[0] * shape[1],
        unit="trial",
        leave=False,
    )
    about = {"ch_names": list(settings.channels), "times": own[0].times}
    write_streamed(path, shape, settings.dtype, iter(rows), about)
    return shape


# ---------------------------------------------------------------- the stage


def find_subjects(values: Any) -> list[Subject]:
    """Whose recordings the flags mean. Raises UserError / DataError."""
    if values.raw:
        return own_subjects(values.data_path, values.raw, values.events, values.subjects)
    return published_subjects(values.data_path, values.subjects, values.sessions)


def find_channels(values: Any, subjects: Sequence[Subject]) -> list[str]:
    """The channels of the file; own recordings' headers and tables are checked on the way."""
    first = subjects[0]
    choice = values.channels or [first.default_channels]
    if not values.raw:
        return wanted_channels(choice, THINGS_CHANNELS)
    names: list[str] = []
    for subject in subjects:
        seen: dict[str, set[int]] = {partition: set() for partition in subject.rows}
        for session in subject.sessions:
            for take in session.takes:
                recorded = take.open()
                eeg = eeg_names(recorded.raw)
                names = names or wanted_channels(choice, eeg)
                if not values.interpolate_missing:
                    has = {name.upper() for name in eeg}
                    lost = [name for name in names if name.upper() not in has]
                    refuse_missing(take.path, names, lost, eeg)
                for partition, trials in recorded.trials.items():
                    seen[partition] |= set(trials.conditions.tolist())
        check_all_shown(subject, seen, values.data_path)
    return names


def check_all_shown(subject: Subject, seen: Mapping[str, set[int]], data_path: Path) -> None:
    """Raise DataError for pictures that no event shows: a row of EEG belongs to each."""
    for partition, rows in seen.items():
        lost = sorted(set(range(subject.rows[partition])) - rows)
        if lost:
            keys = [item.key for item in list_stimuli(data_path, partition)]
            raise DataError(
                f"{subject.name}: events",
                f"none for {len(lost)} of {len(keys)} {partition} pictures, e.g. {keys[lost[0]]}",
                "at least one trial of each picture",
                f"complete the table, or take those pictures out of {IMAGE_FOLDER[partition]}/",
            )


def settings_from(values: Any, channels: Sequence[str]) -> Settings:
    """Raises UserError for what later stages would take for another kind of file."""
    settings = Settings(
        list(channels),
        values.interpolate_missing,
        values.reference,
        values.band_pass,
        values.epoch,
        values.rate,
        values.whiten,
        values.dtype,
        values.seed,
        values.n_jobs,
    )
    if (len(settings.channels), settings.kept) == OSF_SHAPE:
        raise UserError(
            "--channels, --rate, --epoch",
            "17 channels x 100 samples, which later stages refuse as the files of the OSF page",
            "another number of channels or samples",
            "give --rate 250, the default, or --epoch -0.2 0.8",
        )
    if not settings.kept:
        raise UserError(
            "--rate", f"{settings.rate_hz:g} Hz: no sample in --epoch", "some", "give more"
        )
    return settings


def process_subject(subject: Subject, settings: Settings, run: util.RunDirectory) -> None:
    """All sessions, those that are done already left alone; then the subject's two files."""
    folder = run.path / "parts"
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*.tmp"):  # by a kill
        left.unlink()
    if subject.simulated:
        util.write_json(run.path / SIMULATED_NOTE, util.read_json(subject.simulated))
    for number, session in enumerate(subject.sessions):
        if (folder / f"{session.name}.json").exists():
            LOG.info("%s %s: already cut", subject.name, session.name)
            continue
        process_session(subject, session, settings, folder, len(subject.sessions) - number)
        for record in util.read_json(folder / f"{session.name}.json"):
            LOG.info("%s %s", subject.name, quality.line(record))
    merge_subject(subject, settings, run)
    run.finish({"sessions": len(subject.sessions), "channels": len(settings.channels)})
    shutil.rmtree(folder)


def forget_if_fresh(run: util.RunDirectory) -> None:
    """Remove a run whose first session failed, so that it can be begun with mended flags."""
    if not any((run.path / "parts").glob("ses-*.json")):
        shutil.rmtree(run.path)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess all subjects, or go on, or do nothing for those that are finished."""
    options = args.resolve("preprocess", argv)
    values = options.values
    subjects = find_subjects(values)
    settings = settings_from(values, find_channels(values, subjects))
    root = Path(values.output_path or values.data_path) / EEG_FOLDER
    inputs = {subject.name: subject.inputs() for subject in subjects}
    plan = [
        f"{subject.name}: cut {len(subject.sessions)} sessions to {len(settings.channels)} "
        f"channels x {settings.kept} samples at {settings.rate_hz:g} Hz, {settings.dtype}"
        for subject in subjects
    ]
    for subject in subjects:  # refuse before the first hour of work
        earlier = util.RunDirectory(root / subject.name, options.stage)
        earlier.check(options.recorded(), inputs[subject.name], options.fixed)
    for subject in subjects:
        run = util.open_run(options, root / subject.name, inputs[subject.name], plan)
        if not run.finished:
            try:
                process_subject(subject, settings, run)
            except util.StageError:
                forget_if_fresh(run)
                raise
        print((run.path / quality.TEXT).read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
