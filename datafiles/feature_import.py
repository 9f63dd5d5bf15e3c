"""Embeddings that others computed, as a feature bank: dataset.py --import_features.

Sources of the layouts: ATM's and UBP's ``ViT-H-14_features_train.pt`` (a dict of ``img_features``
and ``text_features``), ENIGMA's dicts of ``image`` by path and ``text`` by category.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datafiles.feature_bank import write_partition
from datafiles.pickles import damage_told
from datafiles.stimuli import PARTITIONS, Stimulus, check_disjoint, list_stimuli, rows_called
from modalities import NAMES
from rundirs.files import atomic_write, file_hash
from rundirs.tensors import load_tensors, load_torch
from util import DataError, UserError

EMBEDDINGS = (
    "a .pt of img_features and text_features, or of image and text by name; a .npy or .safetensors "
    "of rows with a .txt of their pictures beside it"
)
BOTH_FILES = "name the file for training and the one for test, in this order"
CALLED = {"img_features": "image", "text_features": "text", **{name: name for name in NAMES}}
UNIT = 1e-2  # how far from 1 norms may be that were made 1


@dataclass(frozen=True)
class FeatureImport:
    """What becomes a bank, and where; names as the flags of ``args.py``."""

    data_path: Path
    import_features: Sequence[Path]
    output_path: Path


@dataclass(frozen=True)
class _Found:
    """Embeddings of one file in the order of the stimuli, and how they were joined."""

    path: Path
    features: dict[str, torch.Tensor]
    joined: dict[str, str]  # {modality: by name, or by order}

    def provenance(self) -> dict[str, Any]:
        """What the bank says of the file."""
        unit = {name: bool((rows.norm(dim=1) - 1).abs().max() < UNIT)
                for name, rows in self.features.items()}  # fmt: skip
        return {"file": self.path.name, "sha256": file_hash(self.path), "joined": self.joined,
                "unit_length": unit}  # fmt: skip


def import_features(asked: FeatureImport) -> list[str]:
    """Write the bank, and what it holds in words. Raises UserError / DataError, before it does."""
    folder = Path(asked.output_path)
    if (folder / "DONE").exists() or list(folder.glob("*.safetensors")):
        raise UserError("--output_path", f"a bank is in {folder}", "a new folder", "name another")
    stimuli = {partition: list_stimuli(asked.data_path, partition) for partition in PARTITIONS}
    check_disjoint(stimuli["training"], stimuli["test"])
    found = {
        partition: read_features(Path(path), stimuli[partition])
        for partition, path in zip(PARTITIONS, asked.import_features, strict=True)
    }
    _check_alike(*found.values())
    of = {partition: one.provenance() for partition, one in found.items()}
    hashes = "+".join(one["sha256"][:16] for one in of.values())
    header = {"clip": {"model": "imported", "weights": hashes}, "imported": of}
    for partition, one in found.items():
        items = stimuli[partition]
        texts = ["(as imported)"] * len(items)
        write_partition(folder / partition, items, texts, one.features, header)
    with atomic_write(folder / "DONE") as file:
        file.write("{}")
    return [line for partition, one in found.items() for line in _told(partition, one, of)]


def _told(partition: str, found: _Found, of: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """``of``: the provenance of each partition."""
    for name, rows in found.features.items():
        length = ", of unit length" if of[partition]["unit_length"][name] else ""
        yield (
            f"{partition} {name}: {len(rows):,} x {rows.shape[1]}{length}, joined "
            f"{found.joined[name]} ({found.path.name})"
        )


def _check_alike(training: _Found, test: _Found) -> None:
    """Raise DataError unless both hold the same embeddings, of one width."""
    widths = [{name: rows.shape[1] for name, rows in one.features.items()}
              for one in (training, test)]  # fmt: skip
    if widths[0] != widths[1]:
        raise DataError(
            test.path, f"{widths[1]}, but {widths[0]} in {training.path.name}",
            "the same embeddings in both files", BOTH_FILES,
        )  # fmt: skip


# ---------------------------------------------------------------- the files


def read_features(path: Path, stimuli: Sequence[Stimulus]) -> _Found:
    """The embeddings in a file, one row per stimulus. Raises DataError; nothing in it is run."""
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        there = "no such file" if not path.exists() else f"a {path.suffix or 'file without ending'}"
        raise DataError(path, there, EMBEDDINGS, BOTH_FILES)
    content, names = reader(path)
    features, joined = {}, {}
    for called, values in content.items():
        if called in CALLED:
            name = CALLED[called]
            features[name], joined[name] = _rows(path, called, values, names, stimuli)
    if "image" not in features:
        raise DataError(
            path, f"{', '.join(map(str, content)) or 'nothing'}; no image", EMBEDDINGS, BOTH_FILES
        )
    return _Found(path, features, joined)


def _read_torch(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    return load_torch(path, EMBEDDINGS, BOTH_FILES), None


def _read_array(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    """Of images; the texts lie beside it in NAME_text.npy, a row per picture or concept."""
    found = {}
    for name, file in (("image", path), ("text", path.with_name(f"{path.stem}_text.npy"))):
        if file.exists():
            with damage_told(file, EMBEDDINGS, BOTH_FILES):
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                raise DataError(file, "no array of numbers", EMBEDDINGS, BOTH_FILES)
            found[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    return found, _listed_names(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    """Names are those of a .txt, or this project's own ids."""
    content: dict[str, Any] = dict(load_tensors(path)[0])
    ids = content.pop("stimulus", None)
    known = isinstance(ids, torch.Tensor) and ids.dtype == torch.int64 and ids.ndim == 1
    return content, _listed_names(path) or ([str(one) for one in ids.tolist()] if known else None)


READERS = {".pt": _read_torch, ".pth": _read_torch, ".npy": _read_array,
           ".safetensors": _read_safetensors}  # fmt: skip


def _listed_names(path: Path) -> list[str] | None:
    """The pictures of the rows, where NAME.txt beside the file lists them, a line each."""
    listed = path.with_suffix(".txt")
    if not listed.is_file():
        return None
    try:
        return listed.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(listed, str(error), "names of pictures in UTF-8", BOTH_FILES) from None


# ---------------------------------------------------------------- their order


def _rows(
    path: Path, called: str, given: object, names: list[str] | None, stimuli: Sequence[Stimulus]
) -> tuple[torch.Tensor, str]:
    """Embeddings float32 [N, D] in the order of the stimuli, and how that was told."""
    rows = given
    if isinstance(given, Mapping):
        rows, names = _stacked(path, called, given), [str(name) for name in given]
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.is_complex():
        shape = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise DataError(path, f"{called}: {shape}", "rows of numbers [N, D]", BOTH_FILES)
    order, how = _order(path, called, len(rows), names, stimuli)
    rows = rows.float()[torch.tensor(order)]
    if not rows.isfinite().all() or not rows.any(dim=1).all():
        raise DataError(path, f"{called}: NaN, or rows of zeros", "embeddings", "make them anew")
    return rows, how


def _stacked(path: Path, called: str, by_name: Mapping[Any, Any]) -> torch.Tensor:
    """Vectors [D] or [1, D] as rows. Raises DataError."""
    if not all(isinstance(value, torch.Tensor) for value in by_name.values()):
        raise DataError(path, f"{called} holds other things than tensors", EMBEDDINGS, BOTH_FILES)
    flat = [value.squeeze() for value in by_name.values()]
    shapes = {tuple(value.shape) for value in flat}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise DataError(path, f"{called} of shapes {sorted(shapes)[:3]}", "vectors", BOTH_FILES)
    return torch.stack(flat)


def _order(
    path: Path, called: str, count: int, names: list[str] | None, stimuli: Sequence[Stimulus]
) -> tuple[list[int], str]:
    """The row of each stimulus. Raises DataError where some have none."""
    folders = list(dict.fromkeys(item.folder for item in stimuli))
    if names is not None and len(names) == count:
        rows = rows_called(names, [_keys(item, CALLED[called] == "text") for item in stimuli])
        if lost := [item.key for item, row in zip(stimuli, rows, strict=True) if row < 0]:
            raise DataError(
                path, f"{called}: no row of {len(lost)} of {len(stimuli)} pictures, e.g. {lost[0]}",
                "a row named after each picture (or concept, of texts)", BOTH_FILES,
            )  # fmt: skip
        return rows, "by name"
    if count == len(stimuli):
        return list(range(count)), "by order"
    if CALLED[called] == "text" and count == len(folders):
        row = {name: number for number, name in enumerate(folders)}
        return [row[item.folder] for item in stimuli], "by order of concepts"
    raise DataError(
        path,
        f"{count} rows of {called}{'' if names is None else f' and {len(names)} names'}",
        f"{len(stimuli)}, one per picture, or of texts {len(folders)}, one per concept",
        BOTH_FILES,
    )


def _keys(item: Stimulus, of_concept: bool) -> list[str]:
    """What a row of this stimulus may be called, the surest first."""
    pictures = [str(item.id), *item.names]
    return [*pictures, item.folder, item.concept] if of_concept else pictures
