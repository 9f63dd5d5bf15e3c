"""The stimuli in files of some hundred, so that a kill loses one and jobs can share them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datafiles import superpixel
from datafiles.feature_bank import write_partition
from datafiles.pictures import PictureError
from datafiles.stimuli import Stimulus
from features.clip import Clip
from features.views import TEXT, PictureViews, Views
from modalities import NAMES
from rundirs.directory import RunDirectory
from rundirs.tensors import load_tensors, save_tensors
from util import DataError


@dataclass(frozen=True)
class Piece:
    """A file of features and its rows: stimuli, or else texts. A restart loses at most one."""

    path: Path
    stimuli: Sequence[Stimulus] = ()
    texts: Sequence[str] = ()


def cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def pieces_of(
    folder: Path,
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
    size: int,
) -> dict[str, list[Piece]]:
    """All work: {partition: pieces of ``size`` rows}, and under "text" each distinct text once."""

    def files(name: str, items: Sequence[Any]) -> Iterator[tuple[Path, Sequence[Any]]]:
        for number, rows in enumerate(cut(items, size)):
            yield folder / f"{name}-{number * size:06d}.safetensors", rows

    distinct = list(dict.fromkeys(itertools.chain(*texts.values())))
    pictures = {
        name: [Piece(path, stimuli=rows) for path, rows in files(name, items)]
        for name, items in stimuli.items()
    }
    return pictures | {"text": [Piece(path, texts=rows) for path, rows in files("text", distinct)]}


def encode(
    clip: Clip,
    pieces: Sequence[Piece],
    views: Views,
    batch_size: int,
    num_workers: int,
    layers: Sequence[int] = (),
) -> None:
    """Encode and save piece by piece, while processes make the pictures of the next batches.

    ``layers``: of CLIP's image side, to be kept beside the modalities. Raises DataError for a
    picture that cannot be read.
    """
    from rundirs.progress import Progress

    stimuli = [item for piece in pieces for item in piece.stimuli]
    made = iter(PictureViews(stimuli, clip.transform, views).ahead(batch_size, num_workers))
    header = {
        "clip": clip.identity,
        "normalised": False,
        "transform": str(clip.transform),
        "superpixel": superpixel.describe(views.slic_px),
        "views": list(views.names),
    }
    with Progress(made, total=len(stimuli), desc="encoding", unit="picture") as bar:
        crops = iter(bar)
        for piece in pieces:
            features = encode_piece(clip, piece, crops, batch_size, views.names, layers)
            save_tensors(piece.path, features, header)


def encode_piece(
    clip: Clip,
    piece: Piece,
    crops: Iterator[torch.Tensor | PictureError],
    batch_size: int,
    names: Sequence[str],
    layers: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Features {name: float32 [rows, D]} of a piece; ``crops``: its pictures' are next.

    ``names``: of a picture's crops; ``layers``: see :func:`encode`.
    """
    if piece.texts:
        encoded = torch.cat([clip.encode_texts(texts) for texts in cut(piece.texts, batch_size)])
        return dict.fromkeys(TEXT, encoded)
    parts = []
    for stimuli in cut(piece.stimuli, batch_size):
        shown = torch.stack(next_crops(crops, len(stimuli)))  # [b, views, 3, S, S]
        visual = clip.encode_pictures(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        features = {name: visual[:, column] for column, name in enumerate(names)}
        parts.append(features | clip.encode_layers(shown[:, names.index("image")], layers))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def next_crops(crops: Iterator[torch.Tensor | PictureError], count: int) -> list[torch.Tensor]:
    """The crops of the next ``count`` pictures. Raises PictureError if one cannot be read."""
    items = list(itertools.islice(crops, count))
    for item in items:
        if isinstance(item, PictureError):
            raise item
    return items


def read_pieces(
    pieces: Mapping[str, Sequence[Piece]],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """{partition or "text": {modality: [rows, D]}}, and the header that all pieces have.

    Raises DataError for a piece that was made in another way than the first.
    """
    loaded = {
        name: [(piece.path, *load_tensors(piece.path)) for piece in group]
        for name, group in pieces.items()
    }
    first, _, header = next(itertools.chain(*loaded.values()))
    for path, _, other in itertools.chain(*loaded.values()):
        differing = [key for key in {**header, **other} if header.get(key) != other.get(key)]
        if differing:
            raise DataError(
                path,
                "; ".join(f"{key}: {other.get(key)}" for key in differing),
                "; ".join(f"{key}: {header.get(key)}" for key in differing) + f", as {first} has",
                "delete the one that is wrong; the same command makes it again",
            )
    features = {
        name: {key: torch.cat([part[key] for _, part, _ in group]) for key in group[0][1]}
        for name, group in loaded.items()
    }
    return features, header


def join(
    run: RunDirectory,
    pieces: Mapping[str, Sequence[Piece]],
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
) -> None:
    """Write both partitions from all pieces. Raises DataError for NaN or mixed pieces."""
    encoded, header = read_pieces(pieces)
    distinct = itertools.chain(*(piece.texts for piece in pieces["text"]))
    row_of = {text: row for row, text in enumerate(distinct)}
    for partition, items in stimuli.items():
        rows = [row_of[text] for text in texts[partition]]
        found = encoded[partition] | {name: encoded["text"][name][rows] for name in TEXT}
        names = [*NAMES, *sorted(found.keys() - set(NAMES))]
        features = {name: found[name] for name in names}
        write_partition(run.path / partition, items, texts[partition], features, header)
