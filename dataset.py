"""THINGS-EEG2: recordings and feature banks, joined by stimulus id; splits; safe readers."""

from __future__ import annotations

import os
import pickle
import platform
import tokenize
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import args
import util
from modalities import NAMES
from util import WHOLE, DataError, Part, UserError

EEG_FOLDER = "Preprocessed_data_250Hz"
PARTITIONS = ("training", "test")
EEG_FILE = {partition: f"preprocessed_eeg_{partition}.npy" for partition in PARTITIONS}
IMAGE_FOLDER = {partition: f"{partition}_images" for partition in PARTITIONS}
SIMULATED_NOTE = "simulated.json"  # lies in a subject's folder if its EEG is simulated
PICTURES = (".png", ".jpg", ".jpeg")
LAYER_PREFIX = "image_layer_"
FINAL_LAYER = "image"  # CLIP's last layer, projected: the image modality itself
_CACHE_VERSION = 1


# ---------------------------------------------------------------- stimuli


@dataclass(frozen=True)
class Stimulus:
    """One picture. ``key``: its path below DATA; ``id`` derives from it alone, joins everything."""

    key: str
    path: Path

    @property
    def folder(self) -> str:
        return self.key.split("/")[1]

    @property
    def concept(self) -> str:
        """Folder name after its number: ``00001_aircraft_carrier`` -> ``aircraft_carrier``."""
        return self.folder.split("_", 1)[-1]

    @cached_property
    def id(self) -> int:
        return stimulus_id(self.key)


def stimulus_id(key: str) -> int:
    """int64 identity of a stimulus: a hash of its key, whatever the order and the other files."""
    return util.seed_for(0, "stimulus", key)


def list_stimuli(data_path: Path, partition: str) -> list[Stimulus]:
    """The pictures of a partition in EEG row order: folders by name, then files by name.

    Raises DataError.
    """
    root = Path(data_path) / IMAGE_FOLDER[partition]
    if not root.is_dir():
        raise DataError(
            root,
            "no such folder",
            f"pictures as {IMAGE_FOLDER[partition]}/NNNNN_concept/*.jpg",
            "give --data_path the folder that holds training_images/ and test_images/",
        )
    found = [
        Stimulus(f"{root.name}/{folder.name}/{file.name}", file)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in PICTURES and not file.name.startswith(".")
    ]
    if not found:
        raise DataError(
            root, "no pictures", "NNNNN_concept/*.jpg or *.png", "unpack the stimuli there"
        )
    return found


def read_captions(path: Path | None) -> dict[str, str]:
    """Captions by picture key or by concept, {} without a file. Raises DataError."""
    if path is None:
        return {}
    captions = util.read_json(path)
    if not isinstance(captions, dict) or not all(
        isinstance(text, str) for text in captions.values()
    ):
        raise DataError(
            path, "something else", "a JSON object {picture or concept: caption}", "see the README"
        )
    return captions


def caption(stimulus: Stimulus, captions: dict[str, str], template: str) -> str:
    """The caption of the picture, else of its concept, else the template."""
    found = captions.get(stimulus.key) or captions.get(stimulus.concept)
    return found or template.format(concept=stimulus.concept)


def check_disjoint(training: Sequence[Stimulus], test: Sequence[Stimulus]) -> None:
    """Raise DataError if a test concept is also a training concept."""
    shared = sorted({item.concept for item in training} & {item.concept for item in test})
    if shared:
        raise DataError(
            IMAGE_FOLDER["training"],
            f"test concepts among the training concepts: {', '.join(shared[:5])}",
            "disjoint concepts",
            "move those folders out of one of the two",
        )


# ---------------------------------------------------------------- published files, never run


class _Dtype:
    """Stands in for numpy.dtype while unpickling: a name and a byte order, nothing else."""

    def __init__(self, name: object = "", *_flags: object) -> None:
        if not isinstance(name, str) or not name or name[0] not in "biufcSUO":
            raise pickle.UnpicklingError(f"arrays of type {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("damaged dtype")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return (
            np.dtype(self.name)
            if self.name[0] == "O"
            else np.dtype(self.name).newbyteorder(self.order)
        )


class _Array:
    """Stands in for numpy.ndarray while unpickling; checked and built afterwards."""

    def __init__(self, *_reconstruct: object) -> None:
        self.content: tuple[object, ...] = ()
        self.axes: object = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("damaged array")
        _, shape, dtype, fortran, raw = state
        self.content = (raw, dtype, shape, "F" if fortran else "C")

    def numpy(self) -> np.ndarray:
        if len(self.content) != 4 or not isinstance(self.content[1], _Dtype):
            raise pickle.UnpicklingError("damaged array")
        raw, dtype, shape, order = self.content
        kind = dtype.numpy()
        if kind.hasobject:
            flat = np.empty(len(raw), dtype=object)
            flat[:] = [_to_numpy(item) for item in raw]
        else:
            flat = np.frombuffer(raw, kind)
        if self.axes is not None:
            return flat.reshape(shape).transpose(self.axes)
        return flat.reshape(shape, order=order)


def _from_buffer(
    raw: object, dtype: object, shape: object, order: object, axes: object = None
) -> _Array:
    """``axes``: protocol 5's way to store a transposed view, as stored and then transposed."""
    array = _Array()
    array.content = (raw, dtype, shape, order)
    array.axes = axes if order == "K" else None
    return array


def _scalar(dtype: object, raw: object = b"") -> _Array:
    return _from_buffer(raw, dtype, (), "C")


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): dict,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): _Array,
        (f"{_core}.multiarray", "scalar"): _scalar,
        (f"{_core}.numeric", "_frombuffer"): _from_buffer,
    }


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and plain containers; any other name is refused, never imported."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused: the file asks to load {module}.{name}"
            ) from None


def _to_numpy(value: Any) -> Any:
    """Replace the stand-ins in plain containers by arrays."""
    if isinstance(value, _Array):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(item) for item in value]
    return value


_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    ImportError,
    SyntaxError,  # the text header of an .npy
    tokenize.TokenError,
)


def read_pickled_dict(
    path: Path,
    expected: str = "a pickled dict with preprocessed_eeg_data, ch_names and times",
    where_cure: str = "check --data_path and the subject's name",
) -> dict[str, Any]:
    """Read a dict of arrays from a pickle, or from ``np.save`` of a 0-d object array.

    Nothing in it is run. Raises DataError for a missing, empty, cut or other file, and for one
    that asks for more than arrays.
    """
    try:
        with open(path, "rb") as file:
            _skip_npy_header(file)
            content = _to_numpy(_RestrictedUnpickler(file).load())
    except FileNotFoundError:
        raise DataError(path, "no such file", expected, where_cure) from None
    except _DAMAGED as error:
        raise DataError(
            path,
            f"{_size(path)}, unreadable: {error or type(error).__name__}",
            expected,
            "download or convert the file again",
        ) from None
    if isinstance(content, np.ndarray) and content.dtype == object and content.size == 1:
        content = content.reshape(-1)[0]
    if not isinstance(content, dict):
        raise DataError(
            path, f"a {type(content).__name__}", expected, "download or convert the file again"
        )
    return content


def _skip_npy_header(file: IO[bytes]) -> None:
    """Leave ``file`` at its pickle: at the start, or behind the header of an object array."""
    if file.read(6) != b"\x93NUMPY":
        file.seek(0)
        return
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    _, _, dtype = read(file)
    if not dtype.hasobject:
        raise pickle.UnpicklingError(f"a plain {dtype} array without channel names and times")


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


# ---------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Recording:
    """One subject, one partition.

    ``eeg``: memory-mapped float32 [N, R, C, T]; ``times``: s after onset.
    """

    eeg: np.ndarray
    channels: list[str]
    times: list[float]
    hash: str
    path: Path


def parse_published(path: Path) -> tuple[np.ndarray, list[str], list[float]]:
    """EEG [N, R, C, T], channel names [C], times [T] of a published file. Raises DataError."""
    content = read_pickled_dict(path)
    missing = [key for key in ("preprocessed_eeg_data", "ch_names", "times") if key not in content]
    if missing:
        raise DataError(
            path,
            f"keys {sorted(map(str, content))}",
            f"also {', '.join(missing)}",
            "this is not a preprocessed THINGS-EEG2 file",
        )
    try:
        eeg = np.asarray(content["preprocessed_eeg_data"])
        channels = [str(name) for name in np.asarray(content["ch_names"]).tolist()]
        times = [float(second) for second in np.asarray(content["times"], dtype=float).tolist()]
    except (ValueError, TypeError) as error:
        raise DataError(
            path,
            f"values of another kind ({error})",
            "arrays preprocessed_eeg_data and times, a list ch_names",
            "preprocess the recording again",
        ) from None
    if eeg.ndim != 4 or eeg.dtype.kind != "f" or 0 in eeg.shape:
        raise DataError(
            path,
            f"EEG of shape {eeg.shape}, {eeg.dtype}",
            "floating point (conditions, repetitions, channels, samples)",
            "preprocess the recording again",
        )
    if eeg.shape[2:] == (17, 100):
        raise DataError(
            path,
            "17 channels x 100 samples: the 100 Hz files of the OSF page",
            "all channels at 250 Hz, 63 x 250 in THINGS-EEG2",
            "use the 250 Hz release, or preprocess the raw recordings at 250 Hz with all channels",
        )
    if len(channels) != eeg.shape[2] or len(times) < eeg.shape[3]:
        raise DataError(
            path,
            f"{len(channels)} channel names and {len(times)} times for EEG {eeg.shape}",
            f"{eeg.shape[2]} names and at least {eeg.shape[3]} times",
            "preprocess the recording again",
        )
    # as published, times still hold the baseline that the EEG array has lost
    return eeg, channels, times[len(times) - eeg.shape[3] :]


def open_recording(path: Path, cache_dir: Path) -> Recording:
    """Open a published file through its float32 copy, made on first use; later opens parse nothing.

    Raises DataError / UserError.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(
            source,
            "no such file",
            "a published EEG file",
            "check --data_path and the subject's name",
        )
    copy = copy_of(source, cache_dir)
    about = copy.with_suffix(".json")
    if not about.exists():  # written last: a copy without it is unfinished
        _convert(source, copy, about)
    record = util.read_json(about)
    try:
        eeg = np.load(copy, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            copy, f"unreadable ({error})", "the float32 copy of a recording", f"delete {about}"
        ) from None
    return Recording(eeg, record["channels"], record["times"], record["hash"], source)


def copy_of(source: Path, cache_dir: Path) -> Path:
    """Where the float32 copy of a recording lies, as long as the recording is the same."""
    stat = source.stat()
    known = [_CACHE_VERSION, util.file_hash(source), stat.st_size, stat.st_mtime_ns]
    return Path(cache_dir) / f"{source.parent.name}_{source.stem}_{util.json_hash(known)[:16]}.npy"


def _convert(source: Path, copy: Path, about: Path) -> None:
    from tqdm import tqdm

    eeg, channels, times = parse_published(source)
    # jobs on several nodes may convert the same file, with the same process number
    temporary = copy.with_name(f".{copy.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=eeg.shape)
    except OSError as error:
        raise UserError(
            "--cache_dir",
            f"{copy.parent}: {error.strerror}",
            "a folder that can be written",
            "name one with --cache_dir",
        ) from None
    try:
        for row in tqdm(
            range(len(eeg)), desc=f"converting {source.parent.name}/{source.name}", leave=False
        ):
            if not np.isfinite(eeg[row]).all():
                bad = np.argwhere(~np.isfinite(eeg[row]))[0]
                raise DataError(
                    source,
                    f"NaN or infinity at condition {row}, repetition {bad[0]}, channel "
                    f"{channels[bad[1]]}, sample {bad[2]}",
                    "finite values",
                    "preprocess the recording again",
                )
            out[row] = eeg[row]
        out.flush()
        del out
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    util.write_json(
        about,
        {
            "source": str(source),
            "channels": channels,
            "times": times,
            "shape": list(eeg.shape),
            "hash": util.file_hash(source),
        },
    )


@dataclass(frozen=True)
class Signal:
    """Which channels (by index) and which run of samples are read of a recording."""

    channels: list[str]
    times: list[float]
    channel_rows: list[int]
    start: int

    def cut(self, eeg: np.ndarray) -> np.ndarray:
        """[..., all channels, all samples] -> [..., C, T]; a view if all channels are in order."""
        eeg = eeg[..., self.start : self.start + len(self.times)]
        if self.channel_rows == list(range(eeg.shape[-2])):
            return eeg
        return eeg[..., self.channel_rows, :]


def select_signal(
    recording: Recording, channels: Sequence[str] | None, window_s: Sequence[float] | None = None
) -> Signal:
    """Channels by name (default: all) and samples with start <= time < end. Raises UserError."""
    names = list(channels) if channels else list(recording.channels)
    lost = [name for name in names if name not in recording.channels]
    if lost:
        raise UserError(
            f"{recording.path}: channels",
            f"no {', '.join(lost)}; it has {' '.join(recording.channels)}",
            "channels of this recording",
            "choose among them with --channels",
        )
    start, stop = 0, len(recording.times)
    if window_s:
        inside = [
            i for i, t in enumerate(recording.times) if window_s[0] - 1e-9 <= t < window_s[1] - 1e-9
        ]
        if not inside:
            raise UserError(
                "--time_window",
                f"{window_s[0]} to {window_s[1]} s: no samples",
                f"a part of {recording.times[0]} to {recording.times[-1]} s",
                "choose another window",
            )
        start, stop = inside[0], inside[-1] + 1
    return Signal(
        names,
        recording.times[start:stop],
        [recording.channels.index(name) for name in names],
        start,
    )


def match_signal(recording: Recording, channels: Sequence[str], times: Sequence[float]) -> Signal:
    """The channels and samples a model was trained on, found here by name and by second."""
    signal = select_signal(recording, channels)
    available = np.asarray(recording.times)
    start = int(np.abs(available - times[0]).argmin())
    found = available[start : start + len(times)]
    if len(found) != len(times) or np.abs(found - np.asarray(times)).max() > 1e-3:
        raise DataError(
            recording.path,
            f"{len(available)} samples, {available[0]:.3f} to {available[-1]:.3f} s",
            f"the {len(times)} samples from {times[0]:.3f} to {times[-1]:.3f} s that the model was "
            "trained on",
            "resample the recording, or train with a --time_window that it has",
        )
    return Signal(signal.channels, list(times), signal.channel_rows, start)


def eeg_file(data_path: Path, subject: str, partition: str) -> Path:
    return Path(data_path) / EEG_FOLDER / subject / EEG_FILE[partition]


def list_subjects(data_path: Path, wanted: Sequence[str] | None) -> list[str]:
    """The wanted subjects, or all that have a folder. Raises DataError / UserError."""
    root = Path(data_path) / EEG_FOLDER
    found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not found:
        raise DataError(root, "no subjects", "folders sub-01, sub-02, ...", "check --data_path")
    lost = [name for name in wanted or [] if name not in found]
    if lost:
        raise UserError(
            "--subjects", ", ".join(lost), f"some of {', '.join(found)}", "check the names"
        )
    return list(wanted) if wanted else found


def cache_folder(data_path: Path, cache_dir: Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(data_path) / "eeg_cache"


def is_simulated(data_path: Path | None) -> bool:
    """Whether a subject below DATA carries the simulator's own note: nobody was recorded."""
    return data_path is not None and any(
        (Path(data_path) / EEG_FOLDER).glob(f"sub-*/{SIMULATED_NOTE}")
    )


def check_rows(recording: Recording, stimuli: Sequence[Stimulus]) -> None:
    """Raise DataError unless there is one EEG row per picture."""
    if len(recording.eeg) != len(stimuli):
        raise DataError(
            recording.path,
            f"{len(recording.eeg)} conditions, but {len(stimuli)} pictures in "
            f"{stimuli[0].key.split('/')[0]}",
            "one condition per picture, both sorted by name",
            "complete the pictures or use the EEG that belongs to them",
        )


def average_trials(recording: Recording, signal: Signal) -> torch.Tensor:
    """Mean over all repetitions: float32 [N, C, T], read row by row."""
    rows = [signal.cut(recording.eeg[row]).mean(axis=0) for row in range(len(recording.eeg))]
    return torch.from_numpy(np.stack(rows).astype(np.float32, copy=False))


@dataclass(frozen=True)
class TestEEG:
    """Averaged EEG [N, C, T] of one subject's test recording; stimuli where DATA is at hand."""

    __test__ = False  # not a pytest class

    eeg: torch.Tensor
    subject: str
    stimuli: list[Stimulus] | None
    hash: str
    source: Path

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
        """Folder names for the output, one per row."""
        return (
            [item.folder for item in self.stimuli]
            if self.stimuli
            else [f"{row + 1:05d}_unknown" for row in range(len(self.eeg))]
        )


def locate_test_eeg(
    eeg_data: Path, subject: str | None, data_path: Path | None
) -> tuple[Path, str, Path | None]:
    """(file, subject, DATA or None) from a file, a ``sub-XX`` folder or DATA. Raises UserError."""
    eeg_data = Path(eeg_data)
    if not eeg_data.exists():
        raise UserError(
            "--eeg_data", f"{eeg_data}: no such file or folder", EEG_FILE["test"], "check the path"
        )
    file = eeg_data
    if eeg_data.is_dir():
        folder = eeg_data / EEG_FOLDER if (eeg_data / EEG_FOLDER).is_dir() else eeg_data
        if not (folder / EEG_FILE["test"]).exists():
            names = sorted(
                path.name for path in folder.iterdir() if (path / EEG_FILE["test"]).exists()
            )
            if subject not in names and not (subject is None and len(names) == 1):
                raise UserError(
                    "--subject",
                    subject,
                    f"one of {', '.join(names) or '(none found)'} in {folder}",
                    "name one of them",
                )
            folder = folder / (subject or names[0])
        file = folder / EEG_FILE["test"]
    subject = subject or file.resolve().parent.name
    above = file.resolve().parents
    if data_path is None and len(above) > 2 and (above[2] / IMAGE_FOLDER["test"]).is_dir():
        data_path = above[2]
    return file, subject, data_path


def open_test(
    file: Path,
    subject: str,
    data_path: Path | None,
    cache_dir: Path | None,
    channels: Sequence[str],
    times: Sequence[float],
) -> TestEEG:
    """One subject's test recording, averaged over repetitions, cut to the model's signal."""
    recording = open_recording(file, cache_folder(data_path or file.parent, cache_dir))
    stimuli = list_stimuli(data_path, "test") if data_path else None
    if stimuli:
        check_rows(recording, stimuli)
    signal = match_signal(recording, channels, times)
    return TestEEG(average_trials(recording, signal), subject, stimuli, recording.hash, file)


# ---------------------------------------------------------------- feature banks


def layer_name(layer: int | str | None) -> str | None:
    """What a bank calls the features of CLIP's image layer 1, 2, ... or ``final``; None of None."""
    if layer is None:
        return None
    return FINAL_LAYER if layer == args.FINAL else f"{LAYER_PREFIX}{layer}"


@dataclass(frozen=True)
class Bank:
    """Embeddings {modality: float32 [N, D]} of a partition, with the stimulus id of each row.

    ``features`` also holds the other layers [N, W] that it was opened with.
    """

    features: dict[str, torch.Tensor]
    ids: list[int]
    clip: dict[str, Any]
    hash: str
    path: Path

    def rows_for(self, stimuli: Sequence[Stimulus]) -> dict[str, torch.Tensor]:
        """Features in the order of ``stimuli``, joined by id. DataError for stimuli it lacks."""
        if [item.id for item in stimuli] == self.ids:
            return self.features  # the usual case: no copy of what may be half of all memory
        place = {stimulus: row for row, stimulus in enumerate(self.ids)}
        lost = [item.key for item in stimuli if item.id not in place]
        if lost:
            raise DataError(
                self.path,
                f"no features of {len(lost)} of {len(stimuli)} pictures, e.g. {lost[0]}",
                "features of every picture",
                "run clip_feature_extractor.py on this DATA again",
            )
        rows = torch.tensor([place[item.id] for item in stimuli])
        return {name: features[rows] for name, features in self.features.items()}


def open_bank(folder: Path, partition: str, layers: Collection[str | None] = ()) -> Bank:
    """A partition of the output of stage 1. DataError for an unfinished, damaged or NaN bank.

    ``layers``: names of CLIP's layers that are wanted beside the five modalities, if any.
    """
    folder = Path(folder)
    path = folder / f"{partition}.safetensors"
    if not (folder / "DONE").exists():
        raise DataError(
            folder,
            "no finished feature bank" if folder.exists() else "no such folder",
            "the output of clip_feature_extractor.py",
            "run that stage; it goes on where it stopped",
        )
    stored, header = util.load_tensors(path)
    ids = stored.pop("stimulus", torch.empty(0)).tolist()
    modalities = {name for name in stored if not name.startswith(LAYER_PREFIX)}
    if modalities != set(NAMES) or len(set(ids)) != len(ids) or "clip" not in header:
        raise DataError(
            path,
            f"tensors {sorted(stored)}",
            f"{', '.join(NAMES)} and stimulus ids",
            "run clip_feature_extractor.py again",
        )
    wanted = [*NAMES, *(name for name in sorted({*layers} - {None, *NAMES}))]
    if lost := [name for name in wanted if name not in stored]:
        raise DataError(
            path,
            f"features of {', '.join(sorted(stored))}",
            f"also {', '.join(lost)}",
            "run clip_feature_extractor.py with --image_layers into another folder",
        )
    features = {name: stored[name] for name in wanted}
    for name, rows in features.items():
        if rows.ndim != 2 or len(rows) != len(ids) or not torch.isfinite(rows).all():
            raise DataError(
                path,
                f"{name}: shape {tuple(rows.shape)}, or NaN",
                f"finite [{len(ids)}, D]",
                "run clip_feature_extractor.py again",
            )
    return Bank(features, ids, header["clip"], util.file_hash(path), path)


def check_clip(
    found_clip: Mapping[str, Any], bank: Path, clip: Mapping[str, Any], model: Path | str
) -> None:
    """Raise DataError if the bank is of another CLIP (``found_clip``) than the model's targets."""
    differing = [key for key in {**clip, **found_clip} if found_clip.get(key) != clip.get(key)]
    if differing:
        found, needed = (
            ", ".join(f"{key} {identity.get(key)}" for key in differing)
            for identity in (found_clip, clip)
        )
        raise DataError(
            bank,
            found,
            f"{needed}, as {model} was trained on",
            "use the features that the model was trained on, or train it on these",
        )


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
        targets = {name: part.of(rows) for name, rows in self.targets.items()}
        return Batch(part.of(self.eeg), part.of(self.subject), part.of(self.stimulus), targets)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.eeg.to(device),
            self.subject.to(device),
            self.stimulus.to(device),
            {name: rows.to(device) for name, rows in self.targets.items()},
        )


def _as_tensor(eeg: np.ndarray) -> torch.Tensor:
    """A view of a memory-mapped array, which nothing writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(eeg)


@dataclass(frozen=True)
class TrainingData:
    """Recordings of all subjects, joined with their targets, split by concept.

    ``signal``: {channels, times, subjects}; ``targets`` {modality: [N, D]} in stimulus row order,
    and the layer of CLIP that was asked for;
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
    held: list[torch.Tensor] | None = None  # on a device: EEG [N, R, C, T] per subject, cut

    @cached_property
    def samples(self) -> torch.Tensor:
        """int64 [S, 3]: (subject, stimulus row, repetition; -1 = not a single one) of an epoch."""
        repetitions = (
            range(min(len(item.eeg[0]) for item in self.recordings))
            if self.trials == "single"
            else (-1,)
        )
        return torch.cartesian_prod(
            torch.arange(len(self.recordings)), self.train_rows, torch.tensor(repetitions)
        )

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
        kept = self._kept_trials(epoch)
        for index in range(first, self.steps_per_epoch(batch_size)):
            numbers = part.of(order[index * batch_size : (index + 1) * batch_size])
            subject, row, repetition = self.samples[numbers].unbind(1)
            eeg = self._gather(subject, row, repetition, None if kept is None else kept[numbers])
            yield Batch(
                eeg,
                subject + self.first_subject,
                self.stimulus[row],
                {name: rows[row] for name, rows in self.targets.items()},
            )

    def _kept_trials(self, epoch: int) -> torch.Tensor | None:
        """bool [S, R]: of which repetitions a sample is the mean in this epoch; None: a single one.

        ``random``: as many as a fair die says, drawn without replacement.
        """
        if self.trials == "single":
            return None
        counts = torch.tensor([item.eeg.shape[1] for item in self.recordings])
        most = int(counts.max())
        count = counts[self.samples[:, 0], None]  # of each sample's subject
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
            cut.cut(item.eeg[row]).mean(axis=0, dtype=np.float32)
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
        ids, place = self.stimulus.sort()
        return self.concept[place[torch.searchsorted(ids, stimulus.cpu())]].to(stimulus.device)

    def describe(self) -> Iterator[str]:
        """The plan of a run, for people."""
        yield (
            f"read {', '.join(self.signal['subjects'])}: {len(self.signal['channels'])} channels x "
            f"{len(self.signal['times'])} samples, {len(self.samples)} training samples "
            f"({self.trials} trials)"
        )
        yield (
            f"train on {len(self.train_rows)} pictures, validate on {len(self.val_rows)} pictures "
            "of held-out concepts"
        )


def split_concepts(concepts: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The held-out concepts: a seeded ``fraction`` of the distinct ones; at least one if > 0."""
    distinct = sorted(set(concepts))
    if fraction == 0 or len(distinct) < 2:
        return set()
    number = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return set(util.numpy_generator_for(seed, "validation").permutation(distinct)[:number].tolist())


def open_training(
    data_path: Path,
    feature_path: Path,
    subjects: Sequence[str] | None,
    channels: Sequence[str] | None,
    time_window: Sequence[float] | None,
    trials: str,
    val_fraction: float,
    seed: int,
    cache_dir: Path | None,
    layer: str | None = None,
) -> TrainingData:
    """Open everything training reads, checked and joined by stimulus id.

    ``layer``: of CLIP, whose features are wanted among the targets. Raises UserError / DataError.
    """
    names = list_subjects(data_path, subjects)
    stimuli = list_stimuli(data_path, "training")
    if (Path(data_path) / IMAGE_FOLDER["test"]).is_dir():
        check_disjoint(stimuli, list_stimuli(data_path, "test"))
    bank = open_bank(feature_path, "training", [layer])
    targets = bank.rows_for(stimuli)
    recordings = [
        open_recording(eeg_file(data_path, name, "training"), cache_folder(data_path, cache_dir))
        for name in names
    ]
    for recording in recordings:
        check_rows(recording, stimuli)
    cut = select_signal(recordings[0], channels, time_window)
    cuts = [match_signal(recording, cut.channels, cut.times) for recording in recordings]
    held_out = split_concepts([item.concept for item in stimuli], val_fraction, seed)
    is_val = torch.tensor([item.concept in held_out for item in stimuli])
    number = {name: place for place, name in enumerate(sorted({s.concept for s in stimuli}))}
    hashes = {f"eeg_{name}": item.hash for name, item in zip(names, recordings, strict=True)}
    return TrainingData(
        recordings,
        cuts,
        {"channels": cut.channels, "times": cut.times, "subjects": names},
        torch.tensor([item.id for item in stimuli]),
        torch.tensor([number[item.concept] for item in stimuli]),
        targets,
        (~is_val).nonzero().squeeze(1),
        is_val.nonzero().squeeze(1),
        trials,
        seed,
        bank.clip,
        {"clip_features": bank.hash, **hashes},
    )
