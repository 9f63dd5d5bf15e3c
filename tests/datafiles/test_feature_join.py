"""Several encoders in one bank: rows by picture, identities, a mixture trained on it, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain

import dataset
import evaluate
import train
from datafiles.feature_bank import check_clip, open_bank
from datafiles.stimuli import list_stimuli
from rundirs.files import read_json
from rundirs.tensors import save_tensors
from util import DataError


def other_bank(features: Chain, root: Path, seed: int = 0) -> Path:
    """An imported bank of images alone, 5 numbers each, its rows in another order."""
    draw = torch.Generator().manual_seed(seed)
    files = []
    for partition in ("training", "test"):
        ids = [item.id for item in list_stimuli(features.data, partition)]
        order = torch.randperm(len(ids), generator=draw)
        rows = torch.randn(len(ids), 5, generator=draw)
        rows[:, 0] = torch.arange(len(ids))  # which tells whose they are
        files.append(root / f"other_{partition}.safetensors")
        tensors = {"image": rows[order], "stimulus": torch.tensor(ids)[order]}
        save_tensors(files[-1], tensors, {})
    bank = root / "other"
    words = ["--data_path", features.data, "--import_features", *files, "--output_path", bank]
    assert dataset.main([str(word) for word in words]) == 0
    return bank


def join(features: Chain, out: Path, *named: str) -> int:
    words = ["--data_path", features.data, "--clip_feature_path", features.features,
             "--join_features", *named, "--output_path", out]  # fmt: skip
    return dataset.main([str(word) for word in words])


@pytest.fixture(scope="module")
def joined(features: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joined")
    assert join(features, root / "bank", f"dinov2={other_bank(features, root)}") == 0
    return root / "bank"


@pytest.mark.parametrize("partition", ["training", "test"])
def test_rows_are_joined_by_picture_and_the_rest_stays(features: Chain, joined: Path, partition):
    bank = open_bank(joined, partition, ["image_dinov2", "image_layer_2"])
    own = open_bank(features.features, partition, ["image_layer_2"])
    assert bank.features["image_dinov2"][:, 0].tolist() == [*range(len(bank.ids))]
    assert all(torch.equal(bank.features[name], own.features[name]) for name in own.features)
    assert bank.clip["joined"].keys() == {"image_dinov2"}
    assert {key: bank.clip[key] for key in own.clip} == own.clip
    assert open_bank(joined, partition).clip == own.clip
    rows = read_json(joined / f"{partition}.json")["rows"]
    assert rows == read_json(features.features / f"{partition}.json")["rows"]


def test_a_mixture_of_encoders_is_trained_and_scored(features: Chain, joined: Path, tmp_path: Path):
    run = tmp_path / "model"
    flags = features.train_flags(run, "--contrast_layer", "final", "dinov2", "--epochs", 1)
    flags[flags.index("--clip_feature_path") + 1] = str(joined)
    assert train.main(flags) == 0
    flags = features.evaluate_flags(tmp_path / "scores", "--model_path", run)
    assert evaluate.main(flags) == 1  # the plain bank has no such images
    flags[flags.index("--clip_feature_path") + 1] = str(joined)
    assert evaluate.main(flags) == 0
    protocol = read_json(tmp_path / "scores" / "results.json")["protocol"]
    assert "image_dinov2" in protocol["encoder"]


def test_another_encoder_of_the_same_name_is_refused(features: Chain, joined: Path, tmp_path: Path):
    second = other_bank(features, tmp_path, seed=1)
    assert join(features, tmp_path / "bank", f"dinov2={second}") == 0
    one, other = (open_bank(path, "test", ["image_dinov2"]) for path in (joined, tmp_path / "bank"))
    with pytest.raises(DataError, match="joined"):
        check_clip(other.clip, other.path, one.clip, "the model")
    plain = open_bank(features.features, "test")
    check_clip(plain.clip, plain.path, one.clip, "the model")  # to draw from, it is the same


@pytest.mark.parametrize(
    ("named", "code", "told"),
    [
        (["dinov2"], 2, "NAME=BANK"),
        (["final=OTHER"], 2, "NAME=BANK"),
        (["a b=OTHER"], 2, "NAME=BANK"),
        (["x=OTHER", "x=OTHER"], 2, "x twice"),
        (["layer_2=OTHER"], 2, "has image_layer_2"),
        (["x=NOWHERE"], 1, "no such folder"),
    ],
)
def test_what_cannot_be_joined_is_refused_before_anything_is_written(
    features: Chain, tmp_path: Path, capsys, named, code, told
):
    other = other_bank(features, tmp_path)
    given = [text.replace("OTHER", str(other)) for text in named]
    assert join(features, tmp_path / "bank", *given) == code
    assert told in capsys.readouterr().err and not (tmp_path / "bank").exists()


def test_the_bank_to_join_to_must_be_named(features: Chain, tmp_path: Path, capsys):
    words = ["--data_path", features.data, "--join_features", "x=y", "--output_path", tmp_path]
    assert dataset.main([str(word) for word in words]) == 2
    assert "--clip_feature_path" in capsys.readouterr().err
