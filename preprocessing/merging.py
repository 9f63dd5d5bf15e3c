"""All sessions of a subject in the two files of the published layout."""

from __future__ import annotations

import contextlib
import pickle
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import util
from datafiles.datasets.things_eeg2 import EEG_FILE
from datafiles.stimuli import PARTITIONS
from preprocessing import quality
from preprocessing.amplitude import check_alike
from preprocessing.recordings import Subject
from preprocessing.sessions import SessionTrials, Settings, part_path
from preprocessing.whitening import whitener
from rundirs.directory import RunDirectory
from rundirs.files import atomic_write, read_json
from util import LOG, DataError


def whiteners(parts: Mapping[str, SessionTrials]) -> dict[str, np.ndarray]:
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
    parts: Sequence[np.ndarray], pictures: int | None, fixed: bool, seed: int, where: str
) -> list[list[tuple[int, int]]]:
    """[picture][repetition] -> (part, row in it), sessions in order; all as often as the rarest.

    ``parts``: the picture of each trial of a session, int [n]; ``fixed``: all pictures must have
    been shown equally often. Raises DataError.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for number, part in enumerate(parts):
        for row, condition in enumerate(part.tolist()):
            found.setdefault(condition, []).append((number, row))
    counts = check_counts({row: len(items) for row, items in found.items()}, pictures, fixed, where)
    expected = len(counts)
    if len(set(counts)) > 1:
        LOG.warning(
            "%s: %d to %d trials of a picture, so %d of each are kept, drawn at random",
            where, min(counts), max(counts), min(counts),
        )  # fmt: skip
    return [_chosen_repetitions(found[row], min(counts), seed, row) for row in range(expected)]


def check_counts(
    shown: Mapping[int, int], pictures: int | None, fixed: bool, where: str
) -> list[int]:
    """How often each picture was shown, by row; ``fixed``: all must have been equally often.

    ``pictures``: how many there are, where that is known. Raises DataError.
    """
    expected = pictures or max(shown, default=0) + 1
    lost = sorted(set(range(expected)) - shown.keys())
    if lost:
        raise DataError(
            where,
            f"no trial of {len(lost)} pictures, e.g. picture {lost[0] + 1}",
            f"trials of pictures 1 to {expected}",
            "add the sessions in which they were shown (--sessions), or remove the pictures",
        )
    counts = [shown[row] for row in range(expected)]
    if fixed and len(set(counts)) > 1:
        raise DataError(
            where,
            f"{min(counts)} to {max(counts)} trials of a picture",
            "the same number of each",
            "THINGS-EEG2 needs all of its sessions",
        )
    return counts


def _chosen_repetitions(
    items: list[tuple[int, int]], number: int, seed: int, row: int
) -> list[tuple[int, int]]:
    draw = util.numpy_generator_for(seed, "repetitions", row)
    chosen = draw.choice(len(items), number, replace=False) if number < len(items) else None
    return items if chosen is None else [items[index] for index in sorted(chosen)]


def merged(
    parts: Sequence[SessionTrials],
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
    with atomic_write(path, "wb") as file:
        file.write(head + b"\x8e" + struct.pack("<Q", expected))  # BINBYTES8
        written = sum(file.write(block) for block in content)
        if written != expected:
            raise ValueError(f"{written} bytes for an array of {expected}")
        file.write(tail)


def merge_subject(subject: Subject, settings: Settings, run: RunDirectory) -> None:
    """Whiten, join and write both partitions, and what to look at."""
    folder = run.path / "parts"
    rows = [row for path in sorted(folder.glob("ses-*.json")) for row in read_json(path)]
    sizes = {f"{subject.name} {row['session']}": row["amplitude"] for row in rows}
    check_alike(sizes, rows[0]["unit"])
    parts = {
        partition: {
            session.name: SessionTrials.load(part_path(folder, session, partition))
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
    parts: Mapping[str, SessionTrials],
    matrices: Mapping[str, np.ndarray],
    settings: Settings,
    folder: Path,
) -> tuple[int, int, int, int]:
    """Write one of the two files; its shape."""
    from rundirs.progress import Progress

    own, path = list(parts.values()), folder / EEG_FILE[partition]
    where = f"{subject.name}: {partition} trials of all sessions"
    shown, pictures = [part.conditions for part in own], subject.rows.get(partition)
    at = places(shown, pictures, bool(subject.repetitions), settings.seed, where)
    shape = (len(at), len(at[0]), len(settings.channels), settings.kept)
    of = [matrices.get(name, matrices.get("")) for name in parts]
    rows = Progress(
        merged(own, of, at, settings),
        desc=f"{subject.name} {partition}",
        total=shape[0] * shape[1],
        unit="trial",
        leave=False,
    )
    about = {"ch_names": list(settings.channels), "times": own[0].times}
    write_streamed(path, shape, settings.dtype, iter(rows), about)
    return shape
