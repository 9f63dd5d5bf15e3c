"""Block designs: drift alone solves a leaky split, and no other; what leaks is marked."""

from __future__ import annotations

import json
import shutil

import builders
import numpy as np
import pytest
import torch

import evaluate
import report
from datafiles.alignment import Reading
from datafiles.datasets import registry
from datafiles.datasets.block_design import read_blocks, split_blocks
from datafiles.eeg_files import average_trials, list_subjects, open_recording, select_signal
from datafiles.stimuli import BLOCK_LEAK, check_disjoint, list_stimuli
from dataset import TrainingData, open_test
from dataset import main as check
from util import DataError

CLASSES, IMAGES, CHANNELS, SAMPLES = 10, 10, 8, 60
PEOPLE = (1, 2)


def drifting(path, legacy=False, key="eeg", names=False):
    """EEG that knows the time and no picture: each class, a block, has an offset of its own."""
    draw = np.random.default_rng(0)
    labels = [f"n{number:08d}" for number in range(CLASSES)]
    images = [f"{name}_{image}" for name in labels for image in range(IMAGES)]
    listed = []
    for subject in PEOPLE:
        drift = draw.normal(size=(CLASSES, CHANNELS, 1))
        for number in draw.permutation(len(images)).tolist():
            if subject == 2 and number == 7:
                continue  # somebody did not see it
            block = number // IMAGES
            noise = draw.normal(size=(CHANNELS, SAMPLES + number % 3), scale=0.3)
            eeg = torch.from_numpy((drift[block] + noise).astype(np.float32))
            image, label = (images[number] + ".JPEG", labels[block]) if names else (number, block)
            listed.append({key: eeg, "image": image, "label": label, "subject": subject})
    content = {"dataset": listed, "labels": labels, "images": images}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def imagenet(tmp_path):
    for block in range(CLASSES):
        for image in range(IMAGES):
            name = f"n{block:08d}/n{block:08d}_{image}.JPEG"
            builders.write_picture(tmp_path / "imagenet" / name, 10 * block + image)
    return tmp_path / "imagenet"


def convert(imagenet, file, out, *more):
    flags = ["--data_path", imagenet, "--blocks", file, "--output_path", out, *more]
    return check([str(flag) for flag in flags])


def top1(data):
    """Of nearest class: ridge from EEG to a random code of each class, as training sees them."""
    builders.write_bank(data / "bank", data)
    opened: TrainingData = builders.open_world(data, trials="average", val_fraction=0.0)
    code = {f"n{block:08d}": builders.normal(64, seed=block) for block in range(CLASSES)}
    hits = []
    for number, name in enumerate(opened.signal["subjects"]):
        train = average_trials(opened.recordings[number], opened.cuts[number]).mean(dim=2)
        rows = opened.train_rows
        wanted = torch.stack([code[item.folder] for item in list_stimuli(data, "training")])
        inputs = torch.cat([train, torch.ones(len(train), 1)], dim=1)[rows]
        penalty = 0.1 * torch.eye(inputs.shape[1])
        weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted[rows])
        file = data / "preprocessed_eeg" / name / "preprocessed_eeg_test_flat.npy"
        reading = Reading(opened.signal["channels"], opened.signal["times"])
        test = open_test(file, name, data, None, reading)
        seen = test.eeg.mean(dim=2)
        predicted = torch.cat([seen, torch.ones(len(seen), 1)], dim=1) @ weights
        classes = sorted({item.folder for item in test.stimuli})
        gallery = torch.stack([code[name] for name in classes])
        nearest = (predicted[:, None] * gallery).sum(dim=2).argmax(dim=1)
        right = [classes.index(item.folder) for item in test.stimuli]
        hits.append((nearest == torch.tensor(right)).float().mean().item())
    return float(np.mean(hits)), 1 / len(classes)


def test_drift_alone_solves_the_leaky_split_and_no_other(imagenet, tmp_path, capsys):
    file = drifting(tmp_path / "eeg.pth")
    assert convert(imagenet, file, tmp_path / "leaky", "--split", "random") == 2
    assert "--allow_block_leak" in capsys.readouterr().err and not (tmp_path / "leaky").exists()
    leak = ["--split", "random", "--allow_block_leak"]
    assert convert(imagenet, file, tmp_path / "leaky", *leak) == 0
    score, chance = top1(tmp_path / "leaky")
    assert score > 0.8 and chance == 1 / CLASSES
    guarded = []
    for seed in range(4):
        assert convert(imagenet, file, tmp_path / f"{seed}", "--seed", str(seed)) == 0
        guarded.append(top1(tmp_path / f"{seed}"))
    chance = guarded[0][1]
    assert chance == 1 / (CLASSES // 5)
    assert abs(np.mean([score for score, _ in guarded]) - chance) < 0.3
    assert (tmp_path / "leaky" / BLOCK_LEAK).exists() and not (tmp_path / "0" / BLOCK_LEAK).exists()


@pytest.mark.parametrize("form", [{}, {"legacy": True}, {"key": "eeg_data", "names": True}])
def test_each_trial_is_of_its_picture(imagenet, tmp_path, form):
    """Of zips and of older files, by number and by name; those that somebody missed too."""
    file = drifting(tmp_path / "eeg.pth", **form)
    assert convert(imagenet, file, tmp_path / "data") == 0
    trials = {(one.subject, one.picture): one.eeg for one in read_blocks(file)}
    stimuli = list_stimuli(tmp_path / "data", "training")
    check_disjoint(stimuli, list_stimuli(tmp_path / "data", "test"))
    assert list_subjects(tmp_path / "data", None) == ["sub-01", "sub-02"]
    for subject in PEOPLE:
        folder = tmp_path / "data" / "preprocessed_eeg" / f"sub-{subject:02d}"
        read = open_recording(
            folder / "preprocessed_eeg_training_flat.npy", tmp_path / "cache", stimuli
        )
        assert read.eeg.shape[2:] == (CHANNELS, SAMPLES)
        averaged = average_trials(read, select_signal(read, None)).numpy()
        for row, item in enumerate(stimuli):
            wanted = trials.get((subject, item.path.stem), np.zeros((CHANNELS, SAMPLES)))
            np.testing.assert_array_equal(averaged[row], wanted[:, :SAMPLES])
    assert min(read.trial_counts) == (0 if "n00000000_7" in {i.path.stem for i in stimuli} else 1)


def test_test_pictures_are_those_that_everybody_saw(tmp_path):
    trials = read_blocks(drifting(tmp_path / "eeg.pth"))
    for seed in range(20):
        parts = split_blocks(trials, "random", seed)
        assert "n00000000_7" not in parts["test"]
        assert not parts["test"] & parts["training"]


def test_what_leaks_is_marked_everywhere(chain, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(chain.data, root)
    (root / BLOCK_LEAK).write_text("{}")
    flags = ["--model_path", chain.model, "--data_path", root, "--clip_feature_path",
             chain.features, "--prior_steps", 2, "--permutations", 3, "--device", "cpu",
             "--output_dir", tmp_path / "scores"]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["block_leak"]
    assert "BLOCK LEAKAGE" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert report.main(["--runs", str(tmp_path / "scores"), "--output", str(page)]) == 0
    assert "BLOCK LEAKAGE" in page.read_text()
    (root / BLOCK_LEAK).unlink()
    assert report.main(["--runs", str(tmp_path / "scores"), "--output", str(page)]) == 0
    assert "BLOCK LEAKAGE" in page.read_text(), "the scores say it themselves"


def test_shared_concepts_are_told_where_data_says_that_it_leaks(tmp_path, caplog):
    root = tmp_path / "data"
    builders.write_pictures(root)
    builders.write_picture(root / "test_images" / "00001_train1" / "b.png")
    parts = [list_stimuli(root, partition) for partition in ("training", "test")]
    with pytest.raises(DataError, match="test concepts among the training"):
        check_disjoint(*parts)
    (root / BLOCK_LEAK).write_text("{}")
    check_disjoint(*parts)
    assert "BLOCK LEAKAGE" in caplog.text


@pytest.mark.parametrize(
    ("content", "told"),
    [({"labels": []}, "a dict of dataset"), ({"dataset": []}, "a dict of dataset"),
     ({"dataset": [{"eeg": torch.ones(2, 9)}]}, "KeyError: 'image'"),
     ({"dataset": [{"eeg": torch.ones(9), "image": "a", "label": "b", "subject": 1}]}, "shape"),
     ({"dataset": [{"eeg": torch.ones(2, 9), "image": 5, "label": "b", "subject": 1}],
       "images": ["a"]}, "IndexError"),
     ({"dataset": [{"eeg": torch.ones(2, 9), "image": "a", "label": "../b", "subject": 1}]},
      "class '../b'"),
     ({"dataset": [{"eeg": torch.ones(2, 9), "image": "a", "label": "b", "subject": 1}]},
      "1 of 1 pictures are not there"),
     ({"dataset": [{"eeg": torch.ones(128, 10), "image": "a", "label": "b", "subject": 1}]},
      "the shortest of 10 samples"),
     ({"dataset": [{"eeg": torch.ones(n, 9), "image": "a", "label": "b", "subject": 1}
                   for n in (2, 3)]}, "trials of [2, 3] channels")],
)  # fmt: skip
def test_what_a_block_file_lacks_is_told(tmp_path, content, told, capsys):
    torch.save(content, tmp_path / "eeg.pth")
    (tmp_path / "imagenet").mkdir()
    assert convert(tmp_path / "imagenet", tmp_path / "eeg.pth", tmp_path / "data") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_people_without_a_picture_in_common_are_refused(imagenet, tmp_path, capsys):
    images = [f"n{block:08d}_{image}" for block in range(CLASSES) for image in range(IMAGES)]
    listed = [{"eeg": torch.ones(2, 9), "image": name, "label": name[:9], "subject": number % 2}
              for number, name in enumerate(images)]  # fmt: skip
    torch.save({"dataset": listed}, tmp_path / "eeg.pth")
    assert convert(imagenet, tmp_path / "eeg.pth", tmp_path / "data") == 1
    assert "no test trial of 2 of 2 people" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_lists_that_hold_each_other_are_not_built(tmp_path):
    """30 lists of two that are one take no room; as an array they would be a billion numbers."""
    nested: list = [1.0]
    for _ in range(30):
        nested = [nested, nested]
    one = {"eeg": nested, "image": "a", "label": "b", "subject": 1}
    torch.save({"dataset": [one]}, tmp_path / "eeg.pth")
    with pytest.raises(DataError, match="a list, not an array"):
        read_blocks(tmp_path / "eeg.pth")
    content = builders.published() | {"preprocessed_eeg_data": nested}
    file = builders.write_published(tmp_path / "eeg.npy", content)
    assert registry.form_of(file).name == "things-eeg2"
    with pytest.raises(DataError, match="is a list, not an array"):
        registry.parse(file)


def test_a_folder_with_something_in_it_is_kept(imagenet, tmp_path, capsys):
    file = drifting(tmp_path / "eeg.pth")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("x")
    assert convert(imagenet, file, tmp_path / "data") == 2
    assert "is not empty" in capsys.readouterr().err
