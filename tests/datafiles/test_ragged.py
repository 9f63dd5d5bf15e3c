"""Pictures with different numbers of trials: each is the mean of its own, and none of another's."""

from __future__ import annotations

from collections import Counter

import builders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_forms import write_flat

import evaluate
import train
from datafiles import eeg_files
from datafiles.averaging import SingleTrials
from datafiles.datasets import registry
from datafiles.datasets.form import DealtTrials
from datafiles.eeg_files import Recording, Signal
from datafiles.stimuli import PARTITIONS, list_stimuli
from dataset import main as check
from util import DataError

COUNTS = (4, 1, 3, 2, 4, 4, 1, 2, 3, 4, 4, 0)  # of the twelve training pictures
TEST_COUNTS = (3, 2, 4)


@pytest.fixture
def data(tmp_path):
    """DATA with Alljoined's form, most pictures without some of their trials, and a bank."""
    root = tmp_path / "data"
    builders.write_pictures(root)
    write_ragged(root)
    builders.write_bank(root / "bank", root)
    return root


def write_ragged(root, subject=0):
    folder = root / "preprocessed_eeg" / f"sub-{subject + 1:02d}"
    folder.mkdir(parents=True)
    for partition, counts in zip(PARTITIONS, (COUNTS, TEST_COUNTS), strict=True):
        content = builders.published(subject, len(counts), 4)
        pairs = [(row, one) for row, count in enumerate(counts) for one in range(count)]
        mixed = [pairs[place] for place in np.random.default_rng(1).permutation(len(pairs))]
        keys = [item.key for item in list_stimuli(root, partition)]
        eeg = np.stack([content["preprocessed_eeg_data"][pair] for pair in mixed])
        file = folder / f"preprocessed_eeg_{partition}_flat.npy"
        write_flat(file, content, partition, [keys[row] for row, _ in mixed], eeg)
    return folder


def expected(rows):
    """Mean repetition of each row, which is what its values hold beside its number."""
    return {row: (count - 1) / 2 for row, count in enumerate(COUNTS) if row in rows}


def test_each_picture_is_the_mean_of_its_own_trials(data):
    opened = builders.open_world(data, trials="average")
    assert opened.counts.tolist() == [list(COUNTS)]
    rows = {*opened.train_rows.tolist(), *opened.val_rows.tolist()}
    assert rows == set(range(11)), "the twelfth has no trial"
    assert any("1 pictures are left out" in line for line in opened.describe())
    found = {}
    for batch in [*opened.batches(0, 1), *opened.held_on(torch.device("cpu")).batches(0, 1)]:
        for eeg in batch.eeg:
            row = int(eeg[0, 0]) // 10
            found[row] = float(eeg[0, 0]) - 10 * row
            assert found[row] == pytest.approx(expected({row})[row], abs=1e-5)
    assert found.keys() == set(opened.train_rows.tolist())
    eeg, _ = opened.validation()
    means = expected(set(opened.val_rows.tolist()))
    assert (eeg[:, 0, 0] - 10 * opened.val_rows).tolist() == pytest.approx(list(means.values()))


def test_single_trials_are_those_that_there_are(data):
    opened = builders.open_world(data, trials="single")
    seen = Counter()
    for batch in opened.batches(0, 1):
        value = int(batch.eeg[0, 0, 0])
        seen[value // 10] += 1
        assert value % 10 < COUNTS[value // 10]
    assert seen == {row: COUNTS[row] for row in opened.train_rows.tolist()}


def test_random_means_hold_no_trial_that_is_not_there(data):
    """Of one trial the mean is that trial in every epoch."""
    opened = builders.open_world(data, trials="random")
    for epoch in range(6):
        for batch in opened.batches(epoch, 1):
            value = float(batch.eeg[0, 0, 0])
            count = COUNTS[int(value) // 10]
            assert value % 10 <= count - 1
            assert count > 1 or value % 10 == 0


def test_repetitions_are_dealt_from_those_of_each_stimulus():
    index = np.array([[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, -1, -1]])
    eeg = DealtTrials(np.arange(7.0).reshape(7, 1, 1), index)
    assert eeg.counts == [4, 1, 2]
    assert np.asarray(eeg)[:, :, 0, 0].tolist() == [[0, 1, 2, 3], [4, 0, 0, 0], [5, 6, 0, 0]]
    assert eeg[2, 1].tolist() == [[6.0]] and eeg[:, :, :, :1][1].shape == (4, 1, 1)
    recording = Recording(np.asarray(eeg), ["Oz"], [0.0], "", None, counts=eeg.counts)
    trials = SingleTrials(recording, Signal(["Oz"], [0.0], [0], 0))
    assert trials.repetitions == 1
    dealt = [trials.dealt(np.random.default_rng(seed)) for seed in range(40)]
    assert {tuple(one[:, 0]) for one in dealt} == {(a, 0, b) for a in range(4) for b in range(2)}


def test_training_and_scores_of_a_ragged_recording(chain, tmp_path, capsys):
    """By the commands; the check says how many, the forms of whole arrays are refused."""
    root = tmp_path / "data"
    for partition in PARTITIONS:
        root.mkdir(exist_ok=True)
        (root / f"{partition}_images").symlink_to(chain.data / f"{partition}_images")
    folder = root / "preprocessed_eeg" / "sub-01"
    folder.mkdir(parents=True)
    for partition in PARTITIONS:
        file = eeg_files.eeg_file(chain.data, "sub-01", partition)
        read = registry.parse(file)
        keys = [item.key for item in list_stimuli(root, partition)]
        shown = [key for row, key in enumerate(keys) for _ in range(read.eeg.shape[1] - row % 2)]
        eeg = np.concatenate([read.eeg[row][row % 2 :] for row in range(len(keys))])
        content = {"ch_names": read.channels, "times": read.times}
        write_flat(
            folder / f"preprocessed_eeg_{partition}_flat.npy", content, partition, shown, eeg
        )
    assert train.main(chain.train_flags(tmp_path / "run", "--data_path", root)) == 0
    flags = ["--model_path", tmp_path / "run", "--data_path", root, "--clip_feature_path",
             chain.features, "--prior_steps", 2, "--permutations", 3, "--average", 1, 2,
             "--device", "cpu", "--output_dir", tmp_path / "s"]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    assert check(["--data_path", str(root)]) == 0
    assert "test 6 pictures x 2 to 3 trials" in capsys.readouterr().out
    out = ["--export", "ubp", "--output_path", str(tmp_path / "out")]
    assert check(["--data_path", str(root), *out]) == 1
    assert "as many of each" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the table


def _changed(folder, change):
    table = folder / "experiment_metadata.parquet"
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(table).to_pylist())), table)


@pytest.mark.parametrize(
    ("change", "told"),
    [(lambda rows: [row | {"dropped": False} for row in rows], "were kept, and"),
     (lambda rows: [{key: row[key] for key in row if key != "dropped"} for row in rows],
      "columns partition, dropped, image_path"),
     (lambda rows: [row | {"image_path": f"{place}.jpg"} for place, row in enumerate(rows)],
      "no row of 12 of 12 pictures"),
     (lambda rows: [row | {"image_path": None} for row in rows], "rows without image_path"),
     (lambda rows: [], "0 rows")],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(data, tmp_path, change, told):
    folder = data / "preprocessed_eeg" / "sub-01"
    _changed(folder, change)
    file = folder / "preprocessed_eeg_training_flat.npy"
    with pytest.raises(DataError, match=told):
        eeg_files.open_recording(file, tmp_path / "c", list_stimuli(data, "training"))


def _released(row, keys, concept):
    """A row as the released tables have it: pictures are numbers, concepts and places from 0."""
    place = [key.split("/", 1)[1] for key in keys].index(row["image_path"])
    number, name = keys[place].split("/")[1].split("_", 1)
    within = sum(key.split("/")[1] == keys[place].split("/")[1] for key in keys[:place])
    return row | {"image_path": f"{place:05d}.jpg", "category_num": int(number) - 1,
                  "category_name": concept(name), "category_img_num": within}  # fmt: skip


@pytest.mark.parametrize("concept", [str, lambda name: name.rstrip("0123456789")])
def test_the_released_table_numbers_the_pictures(data, tmp_path, concept):
    """As with names; numbers tell apart concepts that are spelled alike."""
    folder = data / "preprocessed_eeg" / "sub-01"
    files = {part: eeg_files.eeg_file(data, "sub-01", part) for part in PARTITIONS}
    named = {part: eeg_files.open_recording(file, tmp_path / "a", list_stimuli(data, part)).eeg
             for part, file in files.items()}  # fmt: skip
    keys = {f"stim_{part.removesuffix('ing')}": [item.key for item in list_stimuli(data, part)]
            for part in PARTITIONS}  # fmt: skip
    _changed(folder, lambda rows: [_released(row, keys[row["partition"]], concept) for row in rows])
    table = folder / "experiment_metadata.parquet"
    table.rename(folder / "experiment_metadata_categories.parquet")
    for part, file in files.items():
        read = eeg_files.open_recording(file, tmp_path / "b", list_stimuli(data, part))
        assert np.array_equal(read.eeg, named[part])
    table = folder / "experiment_metadata_categories.parquet"
    rows = [row | {"category_name": "zebra"} for row in pq.read_table(table).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), table)
    with pytest.raises(DataError, match="no row of 3 of 3 pictures"):
        eeg_files.open_recording(files["test"], tmp_path / "c", list_stimuli(data, "test"))


def test_without_its_table_nothing_is_read(data, tmp_path):
    table = data / "preprocessed_eeg" / "sub-01" / "experiment_metadata.parquet"
    table.rename(data / "experiment_metadata.parquet")
    file = eeg_files.eeg_file(data, "sub-01", "test")
    assert eeg_files.open_recording(file, tmp_path).counts == list(TEST_COUNTS), "also from above"
    (data / "experiment_metadata.parquet").unlink()
    with pytest.raises(DataError, match=r"no experiment_metadata_categories\.parquet"):
        eeg_files.open_recording(file, tmp_path / "c")


def test_a_test_picture_without_a_trial_is_refused(data, tmp_path):
    builders.write_picture(data / "test_images" / "00009_test9" / "z.png")
    file = eeg_files.eeg_file(data, "sub-01", "test")
    with pytest.raises(DataError, match="no row of 1 of 4 pictures"):
        eeg_files.open_recording(file, tmp_path / "c", list_stimuli(data, "test"))
