"""Feature banks: rows belong to their stimuli; damage is told."""

from __future__ import annotations

import builders
import numpy as np
import pytest
import torch

from datafiles.feature_bank import check_clip, open_bank
from datafiles.stimuli import list_stimuli
from rundirs.tensors import load_tensors, save_tensors
from util import DataError

DIM = 3


@pytest.fixture
def world(tmp_path):
    """DATA with one subject, its bank in DATA/bank."""
    return builders.write_world(tmp_path / "DATA")


def test_a_bank_is_joined_by_id_whatever_its_row_order(world):
    stimuli = list_stimuli(world, "training")
    order = np.random.default_rng(0).permutation(len(stimuli)).tolist()
    bank = open_bank(builders.write_bank(world / "other", world, order), "training")
    assert bank.ids == [stimuli[row].id for row in order]
    assert bank.clip == builders.CLIP
    wanted = [stimuli[row] for row in (7, 0, 11)]
    for name, rows in bank.rows_for(wanted).items():
        expected = [[builders.target(row, name)] * DIM for row in (7, 0, 11)]
        assert rows.tolist() == expected


def test_a_bank_of_other_pictures_is_refused(world):
    bank = open_bank(world / "bank", "test")
    with pytest.raises(DataError, match=r"12 of 12 pictures, e\.g\. training_images/00001_train1"):
        bank.rows_for(list_stimuli(world, "training"))
    builders.write_picture(world / "training_images" / "00001_train1" / "new.png")
    with pytest.raises(DataError, match=r"1 of 13 pictures.*new\.png"):
        builders.open_world(world)


def test_an_unfinished_or_absent_bank_is_refused(world):
    (world / "bank" / "DONE").unlink()
    with pytest.raises(DataError, match="no finished feature bank"):
        open_bank(world / "bank", "training")
    with pytest.raises(DataError, match="no such folder"):
        open_bank(world / "none", "training")


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _poison(tensors):
    tensors["text"][3, 1] = float("nan")


def _repeat_id(tensors):
    tensors["stimulus"][1] = tensors["stimulus"][0]


def _three_axes(tensors):
    tensors["image"] = tensors["image"][:, None]


def _add(tensors):
    tensors["depth"] = torch.ones(12, DIM)


@pytest.mark.parametrize(
    "spoil", [_drop("image"), _drop("stimulus"), _poison, _repeat_id, _three_axes, _add]
)
def test_a_spoilt_bank_is_refused(world, spoil):
    tensors = builders.bank_tensors(list_stimuli(world, "training"))
    spoil(tensors)
    path = world / "bank" / "training.safetensors"
    save_tensors(path, tensors, {"clip": builders.CLIP})
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")


def test_a_bank_without_its_origin_or_cut_short_is_refused(world):
    path = world / "bank" / "training.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")
    save_tensors(path, load_tensors(world / "bank" / "test.safetensors")[0], {})
    with pytest.raises(DataError, match=r"training\.safetensors"):
        open_bank(world / "bank", "training")


def test_a_bank_of_another_clip_is_refused(world):
    bank = open_bank(world / "bank", "test")
    check_clip(bank.clip, bank.path, builders.CLIP, world / "model")
    for key in builders.CLIP:
        with pytest.raises(DataError, match=f"{key} other, as .*model was trained on"):
            check_clip(bank.clip, bank.path, builders.CLIP | {key: "other"}, world / "model")


def test_bank_hash_follows_its_content(world):
    before = open_bank(world / "bank", "training").hash
    builders.write_bank(world / "bank", world, list(reversed(range(12))))
    assert open_bank(world / "bank", "training").hash != before
