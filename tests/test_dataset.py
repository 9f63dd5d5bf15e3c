"""dataset: EEG, target and picture rows belong together; splits by concept; test EEG."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import builders
import numpy as np
import pytest
import torch

import dataset
from datafiles import splits
from datafiles.alignment import Reading
from datafiles.datasets.things_eeg2 import EEG_FOLDER
from datafiles.eeg_files import cache_home, eeg_file, locate_test_eeg
from datafiles.stimuli import PARTITIONS, keys_hashes, list_stimuli
from dataset import open_test
from modalities import NAMES
from rundirs.files import write_json
from util import DataError, UserError

DIM = 3

SHUFFLED = ("O2", "Fz", "Pz", "O1", "Cz")


@pytest.fixture
def world(tmp_path):
    """DATA with one subject, its bank in DATA/bank."""
    return builders.write_world(tmp_path / "DATA")


@pytest.fixture
def two_subjects(tmp_path):
    return builders.write_world(tmp_path / "DATA", (builders.CHANNELS, SHUFFLED))


def _concepts(root, rows):
    stimuli = list_stimuli(root, "training")
    return {stimuli[row].concept for row in rows.tolist()}


def test_the_split_is_by_concept_and_seeded(world):
    data = builders.open_world(world)
    held_out, trained = _concepts(world, data.val_rows), _concepts(world, data.train_rows)
    assert len(held_out) == 1
    assert not held_out & trained
    rows = data.train_rows.tolist() + data.val_rows.tolist()
    assert sorted(rows) == list(range(12))
    assert builders.open_world(world).val_rows.tolist() == data.val_rows.tolist()
    assert (
        len({tuple(builders.open_world(world, seed=seed).val_rows.tolist()) for seed in range(9)})
        > 2
    )


def test_split_sizes():
    concepts = [f"c{number}" for number in range(1654)] * 2
    assert len(splits.split_concepts(concepts, 0.05, 0)) == 83
    assert splits.split_concepts(concepts, 0.05, 0) == splits.split_concepts(
        concepts[::-1], 0.05, 0
    )
    assert splits.split_concepts(concepts, 0, 0) == set()
    assert len(splits.split_concepts(["a", "b"], 0.9, 0)) == 1
    assert splits.split_concepts(["a"], 0.5, 0) == set()


def _epoch(data, epoch=0, batch_size=4, first=0):
    return list(data.batches(epoch, batch_size, first))


def _value(batch):
    """EEG less its channel and sample: 1000 x subject + 10 x row + repetition, [B]."""
    return batch.eeg[:, 0, 0] - batch.eeg[:, 0, 0] % 1


def _origin(batch):
    """(subject, row) of each sample, from the values of its EEG."""
    value = _value(batch).long()
    return (value // 1000).tolist(), (value % 1000 // 10).tolist()


@pytest.mark.parametrize("trials", ["average", "single", "random"])
def test_eeg_subject_target_and_id_belong_together(two_subjects, trials):
    data = builders.open_world(two_subjects, trials=trials, channels=["O2", "Cz", "Fz"])
    ids = [item.id for item in list_stimuli(two_subjects, "training")]
    seen = Counter()
    for batch in _epoch(data):
        assert batch.eeg.dtype == torch.float32
        assert batch.eeg.shape == (4, 3, 20)
        subjects, rows = _origin(batch)
        assert batch.subject.tolist() == subjects
        assert batch.stimulus.tolist() == [ids[row] for row in rows]
        for name in NAMES:
            expected = [[builders.target(row, name)] * DIM for row in rows]
            assert batch.targets[name].tolist() == expected
        for eeg in batch.eeg.numpy():
            # a mean of repetitions may end in .5, .25 or thirds: compare with the first channel
            offsets = (eeg[:, 0] - eeg[0, 0]) * 16
            assert offsets.tolist() == pytest.approx([0, -3, -4], abs=0.01)
        seen.update(subjects)
    assert seen.keys() == {0, 1}


def test_a_shuffled_bank_changes_no_batch(world):
    plain = _epoch(builders.open_world(world))
    order = np.random.default_rng(1).permutation(12).tolist()
    builders.write_bank(world / "bank", world, order)
    for one, other in zip(plain, _epoch(builders.open_world(world)), strict=True):
        assert torch.equal(one.eeg, other.eeg)
        assert all(torch.equal(one.targets[name], other.targets[name]) for name in NAMES)


def test_average_trials_are_the_mean(world):
    recording = builders.open_world(world).recordings[0].eeg
    for batch in _epoch(builders.open_world(world)):
        for eeg, row in zip(batch.eeg, _origin(batch)[1], strict=True):
            np.testing.assert_allclose(eeg, recording[row].mean(axis=0), rtol=1e-6)


def test_single_trials_are_all_there_once(two_subjects):
    data = builders.open_world(two_subjects, trials="single")
    seen = Counter(int(value) for batch in _epoch(data, batch_size=1) for value in _value(batch))
    rows = data.train_rows.tolist()
    expected = {1000 * s + 10 * row + rep for s in (0, 1) for row in rows for rep in range(4)}
    assert seen == dict.fromkeys(expected, 1)


def test_random_trials_are_means_of_changing_subsets(world):
    data = builders.open_world(world, trials="random")
    possible = {np.mean(subset) for subset in _subsets(4)}
    found = set()
    for epoch in range(12):
        for batch in _epoch(data, epoch):
            repetition = (batch.eeg[:, 0, 0] % 10).tolist()
            found |= {round(value, 4) for value in repetition}
    assert {round(value, 4) for value in possible} >= found
    assert len(found) > 6
    assert {0, 1, 2, 3, 1.5} <= found  # single repetitions, and the mean of all


def _subsets(count):
    return [[item for item in range(count) if mask >> item & 1] for mask in range(1, 1 << count)]


def _same(one, other):
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.eeg, b.eeg) and torch.equal(a.stimulus, b.stimulus) for a, b in pairs)


@pytest.mark.parametrize("trials", ["single", "random"])
def test_batches_depend_on_seed_and_epoch_alone(world, trials):
    data = builders.open_world(world, trials=trials)
    first = _epoch(data, 1)
    torch.manual_seed(3)
    np.random.seed(3)
    _epoch(data, 2)
    assert _same(first, _epoch(data, 1))
    assert _same(first, _epoch(builders.open_world(world, trials=trials), 1))
    assert not _same(first, _epoch(data, 2))
    flat = [number for batch in _epoch(data, 1, 1) for number in batch.stimulus.tolist()]
    assert flat[:8] == [number for batch in first for number in batch.stimulus.tolist()][:8]


@pytest.mark.parametrize("trials", ["average", "single", "random"])
def test_an_epoch_can_be_entered_anywhere(world, trials):
    data = builders.open_world(world, trials=trials)
    whole = _epoch(data, 3, 2)
    for first in range(len(whole) + 1):
        assert _same(whole[first:], _epoch(data, 3, 2, first))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_whole_batches_each_sample_at_most_once(two_subjects, batch_size):
    data = builders.open_world(two_subjects)
    batches = _epoch(data, 0, batch_size)
    assert len(batches) == data.steps_per_epoch(batch_size) == 20 // batch_size
    assert {len(batch.eeg) for batch in batches} == {batch_size}
    pairs = [pair for batch in batches for pair in zip(*_origin(batch), strict=True)]
    assert len(set(pairs)) == len(pairs)


def test_a_batch_larger_than_the_data_is_all_of_it(world):
    (batch,) = _epoch(builders.open_world(world), 0, 1000)
    assert sorted(_origin(batch)[1]) == builders.open_world(world).train_rows.tolist()


def test_held_out_rows_are_never_in_a_batch(two_subjects):
    data = builders.open_world(two_subjects, trials="single")
    rows = {row for epoch in range(3) for batch in _epoch(data, epoch) for row in _origin(batch)[1]}
    assert rows == set(data.train_rows.tolist())


def test_validation_is_subject_major_and_averaged(two_subjects):
    data = builders.open_world(
        two_subjects, trials="random", channels=["Pz", "O1"], val_fraction=0.4
    )
    eeg, subject = data.validation()
    rows = data.val_rows.tolist()
    assert len(rows) == 4
    assert subject.tolist() == [0] * 4 + [1] * 4
    values = builders.eeg_values(0, 12, 4, ["Pz", "O1"], 20)[rows].mean(axis=1)
    expected = np.concatenate([values, values + 1000])
    np.testing.assert_allclose(eeg, expected, rtol=1e-6)
    assert eeg.dtype == torch.float32


def test_without_held_out_concepts_validation_is_empty(two_subjects):
    data = builders.open_world(two_subjects, val_fraction=0)
    eeg, subject = data.validation()
    assert eeg.shape == (0, 5, 20)
    assert len(subject) == 0
    assert len(data.train_rows) == 12


def test_subjects_can_be_chosen_and_keep_the_given_order(two_subjects):
    assert builders.open_world(two_subjects).signal["subjects"] == ["sub-01", "sub-02"]
    data = builders.open_world(two_subjects, subjects=["sub-02"])
    assert {subject for batch in _epoch(data) for subject in _origin(batch)[0]} == {1}
    assert {int(number) for batch in _epoch(data) for number in batch.subject} == {0}
    data = builders.open_world(two_subjects, subjects=["sub-02", "sub-01"])
    for batch in _epoch(data):
        assert batch.subject.tolist() == [1 - subject for subject in _origin(batch)[0]]
    with pytest.raises(UserError, match=r"sub-09.*\n.*sub-01, sub-02"):
        builders.open_world(two_subjects, subjects=["sub-09"])


def test_the_signal_is_recorded(two_subjects):
    data = builders.open_world(two_subjects, channels=["Pz", "O1"], time_window=(0.05, 0.1))
    assert data.signal["channels"] == ["Pz", "O1"]
    assert data.signal["times"] == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09])
    assert data.clip == builders.CLIP
    assert data.hashes.keys() == {"clip_features", "eeg_sub-01", "eeg_sub-02"}
    plan = " ".join(data.describe())
    assert "sub-01, sub-02" in plan and "2 channels x 5 samples" in plan


def test_a_recording_with_other_rows_is_refused(world):
    content = builders.published(rows=11)
    builders.write_published(eeg_file(world, "sub-01", "training"), content)
    with pytest.raises(DataError, match="11 conditions, but 12 pictures"):
        builders.open_world(world)


def test_data_without_subjects_is_refused(world):
    shutil.rmtree(world / EEG_FOLDER)
    with pytest.raises(DataError, match="no subjects"):
        builders.open_world(world)


def test_batches_move_as_a_whole(world):
    batch = _epoch(builders.open_world(world))[0].to(torch.device("meta"))
    tensors = (batch.eeg, batch.subject, batch.stimulus, *batch.targets.values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_test_eeg_is_found_from_file_folder_and_data(world):
    file = eeg_file(world, "sub-01", "test")
    for given in (file, file.parent, world / EEG_FOLDER, world):
        assert locate_test_eeg(given, None, None) == (file, "sub-01", world)


def test_one_of_several_subjects_must_be_named(two_subjects):
    file = eeg_file(two_subjects, "sub-02", "test")
    located = locate_test_eeg(two_subjects, "sub-02", None)
    assert located == (file, "sub-02", two_subjects)
    for subject in (None, "sub-07"):
        with pytest.raises(UserError, match=r"--subject\n(.*\n)*.*sub-01, sub-02"):
            locate_test_eeg(two_subjects, subject, None)


def test_test_eeg_errors(tmp_path):
    with pytest.raises(UserError, match="--eeg_data"):
        locate_test_eeg(tmp_path / "none", None, None)
    with pytest.raises(UserError, match="none found"):
        locate_test_eeg(tmp_path, None, None)


def test_a_file_elsewhere_has_no_pictures_unless_told(world, tmp_path):
    path = tmp_path / "mine" / "sub-33" / "eeg.npy"
    path.parent.mkdir(parents=True)
    shutil.copy(eeg_file(world, "sub-01", "test"), path)
    assert locate_test_eeg(path, None, None) == (path, "sub-33", None)
    assert locate_test_eeg(path, "sub-01", world) == (path, "sub-01", world)


def test_opened_test_eeg_is_averaged_cut_and_named(two_subjects):
    file, subject, data_path = locate_test_eeg(two_subjects, "sub-02", None)
    times = [0.05, 0.06]
    opened = dataset.open_test(file, subject, data_path, None, Reading(["Cz", "O2"], times))
    expected = builders.eeg_values(1, 3, 4, ["Cz", "O2"], 20).mean(axis=1)[..., 5:7]
    np.testing.assert_allclose(opened.eeg, expected, rtol=1e-6)
    stimuli = list_stimuli(two_subjects, "test")
    assert opened.ids == [item.id for item in stimuli]
    assert opened.names == ["00001_test1", "00002_test2", "00003_test3"]
    assert (two_subjects / "eeg_cache").is_dir()


def test_test_eeg_without_pictures_has_ids_of_its_rows(two_subjects, tmp_path):
    file = eeg_file(two_subjects, "sub-01", "test")
    opened = dataset.open_test(file, "sub-01", None, tmp_path / "cache", Reading(["Cz"], [0.0]))
    assert opened.names[2] == "00003_unknown"
    assert len(set(opened.ids)) == 3
    assert opened.stimuli is None
    assert json.loads(next((tmp_path / "cache").glob("*.json")).read_text())["shape"][0] == 3


def test_test_eeg_with_other_rows_than_pictures_is_refused(world):
    builders.write_picture(world / "test_images" / "00009_new" / "a.png")
    file = eeg_file(world, "sub-01", "test")
    with pytest.raises(DataError, match="3 conditions, but 4 pictures"):
        dataset.open_test(file, "sub-01", world, None, Reading(["Cz"], [0.0]))


def test_a_test_concept_among_the_training_concepts_is_refused(tmp_path):
    root = builders.write_world(tmp_path)
    builders.write_picture(root / "test_images" / "00099_train3" / "a.png")
    with pytest.raises(DataError, match="train3"):
        builders.open_world(root)


def _noted(root):
    """What preprocess.py notes beside the EEG that it writes."""
    known = {partition: list_stimuli(root, partition) for partition in PARTITIONS}
    write_json(eeg_file(root, "sub-01", "test").with_name("inputs.json"), keys_hashes(known))


def _open(root):
    signal = builders.open_world(root).signal
    file = eeg_file(root, "sub-01", "test")
    return open_test(file, "sub-01", root, None, Reading(signal["channels"], signal["times"]))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_eeg_of_other_pictures_is_refused_wherever_it_is_opened(world, partition):
    """Another name for a folder moves its rows: without a word all others would shift, too."""
    _noted(world)
    _open(world)
    first = sorted((world / f"{partition}_images").iterdir())[0]
    first.rename(first.with_name("00099_moved"))
    builders.write_bank(world / "bank", world, list(range(12)))
    with pytest.raises(DataError, match=f"other pictures than those of {partition}_images"):
        _open(world)


def test_pictures_of_one_concept_get_folders_of_their_own(world):
    eeg = _open(world)
    folder = world / "test_images" / eeg.names[0]
    builders.write_picture(folder / "second.png")
    names = dataclasses.replace(eeg, stimuli=list_stimuli(world, "test")).names
    assert names[:2] == [item.key.split("/", 1)[1] for item in list_stimuli(world, "test")[:2]]
    assert len(set(names)) == len(names) == 4 and names[2:] == eeg.names[1:]


@pytest.mark.parametrize("linked", ["file", "subject", "all"])
def test_a_link_changes_neither_subject_nor_place_of_the_copy(world, tmp_path, linked):
    file = eeg_file(world, "sub-01", "test")
    link = {"file": file, "subject": file.parent, "all": file.parents[1]}[linked]
    store = tmp_path / "store" / "8f3a"
    store.parent.mkdir()
    link.rename(store)
    link.symlink_to(store)
    assert locate_test_eeg(file, None, None) == (file, "sub-01", world)
    assert locate_test_eeg(file.parent, None, None) == (file, "sub-01", world)
    assert _open(world).subject == "sub-01"
    assert not list(store.parent.rglob("eeg_cache"))
    assert not cache_home(file).resolve().is_relative_to(store)
