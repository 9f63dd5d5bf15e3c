"""Image embeddings of several encoders in one feature bank: dataset.py --join_features.

SAMGA and others contrast EEG with a mixture of image encoders (CLIP's, DINOv2, InternViT), of which
each is better at something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datafiles.feature_bank import (
    BESIDE,
    FINAL_LAYER,
    JOINED,
    layer_name,
    open_bank,
    write_partition,
)
from datafiles.stimuli import PARTITIONS, Stimulus, list_stimuli
from modalities import FINAL
from rundirs.files import read_json, write_json
from rundirs.tensors import tensors_header
from util import UserError

NEEDED = "NAME=BANK, a name for train.py --contrast_layer and a feature bank"


@dataclass(frozen=True)
class FeatureJoin:
    """Which banks become one, and where; names as the flags of ``args.py``."""

    data_path: Path
    clip_feature_path: Path
    join_features: Sequence[str]
    output_path: Path


def named_banks(given: Sequence[str]) -> dict[str, Path]:
    """{what a bank calls the features: the bank that they come from}. Raises UserError."""
    found = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (sign and path and name.isidentifier()) or name == FINAL:
            raise UserError("--join_features", text, NEEDED, "e.g. dinov2=OUT/dinov2_features")
        if layer_name(name) in found:
            raise UserError("--join_features", f"{name} twice", "a name for each", "choose another")
        found[layer_name(name)] = Path(path)
    return found


def join_features(asked: FeatureJoin) -> list[str]:
    """Write the joint bank, and what was joined in words. Raises UserError / DataError."""
    folder = Path(asked.output_path)
    named = named_banks(asked.join_features)
    if (folder / "DONE").exists() or list(folder.glob("*.safetensors")):
        raise UserError("--output_path", f"a bank is in {folder}", "a new folder", "name another")
    parts = {partition: _joined(asked, partition, named) for partition in PARTITIONS}
    told = []
    for partition, one in parts.items():
        write_partition(folder / partition, one.stimuli, one.texts, one.features, one.header)
        told += [
            f"{partition} {name}: {' x '.join(map(str, one.features[name].shape))} of {path}"
            for name, path in named.items()
        ]
    write_json(folder / "DONE", {})
    return told


@dataclass(frozen=True)
class _Partition:
    """Arguments of :func:`datafiles.feature_bank.write_partition`."""

    stimuli: list[Stimulus]
    texts: list[str]
    features: dict[str, torch.Tensor]
    header: dict[str, Any]


def _joined(asked: FeatureJoin, partition: str, named: Mapping[str, Path]) -> _Partition:
    """A partition of the joint bank, its rows in the order of the pictures."""
    stimuli = list_stimuli(asked.data_path, partition)
    own = open_bank(Path(asked.clip_feature_path), partition, (), (FINAL_LAYER,), BESIDE)
    header, listed = tensors_header(own.path), read_json(own.path.with_suffix(".json"))["rows"]
    features, joined = dict(own.rows_for(stimuli)), dict(header.get(JOINED, {}))
    if taken := sorted({*features} & {*named}):
        raise UserError(
            "--join_features", f"{own.path} has {', '.join(taken)}", "new names", "rename"
        )
    for name, folder in named.items():
        other = open_bank(folder, partition, needed=(FINAL_LAYER,))
        features[name] = other.rows_for(stimuli)[FINAL_LAYER]
        joined[name] = other.clip
    texts = {row["stimulus"]: row["text"] for row in listed}
    return _Partition(
        stimuli, [texts[item.id] for item in stimuli], features, {**header, JOINED: joined}
    )
