"""dataset.py --check: finds what is wrong with a data folder, and nothing where all is well."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import builders
import numpy as np
import pytest
from PIL import Image

import dataset
from datafiles import check, pickles, stimuli
from datafiles.eeg_files import eeg_file
from rundirs.files import write_json

CHANNELS = ("Fz", "Cz", "Pz", "O1")
SHIFTED = ("O1", "Pz", "Cz", "Fz")


def write_eeg(root: Path, subject: str, partition: str, rows: int, trials: int, order=CHANNELS):
    """Noise of standard deviation 1: no two trials alike."""
    draw = np.random.default_rng([rows, trials, int(subject[-2:])])
    content = {
        "preprocessed_eeg_data": draw.normal(size=(rows, trials, len(order), 30)),
        "ch_names": list(order),
        "times": np.arange(-5, 30) / 100,
    }
    builders.write_published(eeg_file(root, subject, partition), content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two people, 4 x 2 training and 3 test pictures, and their bank in ``bank``."""
    root = tmp_path_factory.mktemp("doctor")
    builders.write_pictures(root, training=4, images=2, test=3)
    draw = np.random.default_rng(0)
    for path in sorted(root.rglob("*.png")):
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(path)
    for subject, order in (("sub-01", CHANNELS), ("sub-02", CHANNELS)):
        write_eeg(root, subject, "training", 8, 4, order)
        write_eeg(root, subject, "test", 3, 6, order)
    builders.write_bank(root / "bank", root)
    return root


@pytest.fixture
def data(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def run(root: Path, capsys, *flags: object) -> tuple[int, str]:
    code = dataset.main(["--check", "--data_path", str(root), *map(str, flags)])
    told = capsys.readouterr()
    return code, told.out + told.err[told.err.find("error:") :]


def change(root: Path, edit, subject: str = "sub-01", partition: str = "training") -> None:
    """Rewrite a published file after ``edit(content)``."""
    path = eeg_file(root, subject, partition)
    read = pickles.read_pickled_dict(path)
    content = {
        "preprocessed_eeg_data": np.array(read["preprocessed_eeg_data"]),
        "ch_names": list(read["ch_names"]),
        "times": np.array(read["times"]),
    }
    path.unlink()  # the arrays that were read are views of it
    path.write_bytes(pickle.dumps(edit(content) or content))


def edited(key: str, function):
    def edit(content):
        content[key] = function(content[key])

    return edit


# --- well ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["quick", "full"])
def test_all_is_well(data, capsys, depth):
    before = sorted(data.rglob("*"))
    code, told = run(data, capsys, "--check", depth, "--clip_feature_path", data / "bank")
    assert code == 0, told
    assert "training_images/: 8 pictures of 4 concepts, 2 of each" in told
    assert "sub-02: training 8 pictures x 4 trials, test 3 pictures x 6 trials; 4 channels" in told
    assert "at 100 Hz; float64" in told and "SIMULATED" not in told
    assert "problem" not in told and "note" not in told
    assert f"next: python train.py --data_path {data}" in told
    assert sorted(data.rglob("*")) == before


def test_the_next_command_fits_what_is_there(data, capsys):
    assert "next: python clip_feature_extractor.py" in run(data, capsys)[1]
    (data / "Raw_data/sub-01").mkdir(parents=True)
    shutil.rmtree(data / "Preprocessed_data_250Hz")
    code, told = run(data, capsys)
    assert (code, "next: python preprocess.py" in told) == (0, True)
    shutil.rmtree(data / "Raw_data")
    code, told = run(data, capsys)
    assert code == 1 and "preprocess.py" in told


def test_what_is_no_problem_is_noted(data, capsys):
    def reorder(content):
        content["preprocessed_eeg_data"] = content["preprocessed_eeg_data"][:, :, ::-1]
        content["ch_names"] = content["ch_names"][::-1]

    change(data, reorder, "sub-02")
    change(data, edited("preprocessed_eeg_data", lambda eeg: eeg[:, :3]), "sub-02")
    write_json(data / "Preprocessed_data_250Hz/sub-01/simulated.json", {})
    (data / "training_images/00001_train1/x.gif").write_bytes(b"GIF89a")
    change(data, lambda c: c[EEG].__setitem__((slice(None), slice(None), 1), c[EEG][:, :, 1] * 9))
    one = eeg_file(data, "sub-01", "test")
    one.rename(data.parent / "elsewhere.npy")
    one.symlink_to(data.parent / "elsewhere.npy")
    code, told = run(data, capsys)
    assert code == 0, told
    for part in (
        "another order in sub-02",
        "training: [3, 4] trials",
        "SIMULATED",
        "x.gif",
        "link",
        "noisy channels: Cz",
    ):
        assert part in told


def test_little_of_a_large_file_is_read(data, monkeypatch):
    """Values of a sample of the trials; of the rest, a few numbers."""
    monkeypatch.setattr(check, "SAMPLED_TRIALS", 8)
    change(data, lambda c: c["preprocessed_eeg_data"].__setitem__((3, 0, 0, 0), np.nan))
    few = check.examine(data, None, None, None, False)
    many = check.examine(data, None, None, None, True)
    assert (len(few.problems), len(many.problems)) == (0, 1)


# --- not well -----------------------------------------------------------------------------------


def _swap(root: Path) -> None:
    one, two = (eeg_file(root, "sub-01", partition) for partition in stimuli.PARTITIONS)
    two.rename(one.with_suffix(".x"))
    one.rename(two)
    one.with_suffix(".x").rename(one)


def _leak(root: Path) -> None:
    trial = []
    change(root, lambda c: trial.append(c["preprocessed_eeg_data"][6, 1].copy()))
    change(
        root, lambda c: c["preprocessed_eeg_data"].__setitem__((2, 4), trial[0]), "sub-01", "test"
    )


def _rename(root: Path) -> None:
    folder = root / "training_images/00002_train2"
    folder.rename(folder.with_name("00002_other"))


def _shown(root: Path) -> None:
    """As preprocess.py notes it, before a concept gets another name."""
    known = {name: stimuli.list_stimuli(root, name) for name in stimuli.PARTITIONS}
    noted = root / "Preprocessed_data_250Hz/sub-01/inputs.json"
    write_json(noted, stimuli.keys_hashes(known))
    assert not check.examine(root, None, None, None, False).problems
    _rename(root)


def _overflow(content) -> None:
    with np.errstate(over="ignore"):
        eeg = content["preprocessed_eeg_data"] * 1e5
        content["preprocessed_eeg_data"] = eeg.astype(np.float16)


FIRST = "training_images/00001_train1/train1_1.png"
EEG = "preprocessed_eeg_data"
FAULTS = {
    "no pictures": (lambda d: shutil.rmtree(d / "test_images"), ["test_images", "no such folder"]),
    "a file missing": (lambda d: eeg_file(d, "sub-02", "test").unlink(), ["sub-02", "no such"]),
    "exchanged": (_swap, ["exchanged", "3 training and 8 test conditions"]),
    "a picture short": (lambda d: (d / FIRST).unlink(), ["8 conditions, but 7 pictures"]),
    "other pictures": (_shown, ["EEG of other pictures"]),
    "a leaked concept": (
        lambda d: (d / "test_images/00001_test1").rename(d / "test_images/00001_train2"),
        ["test concepts among the training concepts: train2"],
    ),
    "a leaked picture": (
        lambda d: shutil.copy(d / FIRST, d / "test_images/00001_test1/a.png"),
        [f"test_images/00001_test1/a.png = {FIRST}"],
    ),
    "a leaked trial": (
        _leak,
        ["test condition 2, repetition 4 = training condition 6, repetition 1"],
    ),
    "a trial twice": (
        lambda d: change(d, lambda c: c[EEG].__setitem__((0, 1), c[EEG][0, 0])),
        ["training condition 0, repetition 1 = training condition 0, repetition 0"],
    ),
    "NaN": (
        lambda d: change(d, lambda c: c[EEG].__setitem__((1, 2, 3, 4), np.nan)),
        ["condition 1, repetition 2, channel O1"],
    ),
    "float16": (lambda d: change(d, _overflow), ["float16 holds nothing above 65,504"]),
    "flat": (
        lambda d: change(d, lambda c: c[EEG].__setitem__((slice(None), slice(None), 2), 7.0)),
        ["flat channels: Pz"],
    ),
    "all flat": (lambda d: change(d, edited(EEG, np.zeros_like)), ["flat channels: Fz, Cz, Pz"]),
    "tiny": (
        lambda d: [
            change(d, edited(EEG, lambda eeg: eeg * 1e-15), *file)
            for file in (("sub-01", "training"), ("sub-01", "test"))
        ],
        ["a standard deviation of"],
    ),
    "another unit": (
        lambda d: change(d, edited(EEG, lambda eeg: eeg * 1e4), "sub-02"),
        ["where the other files have"],
    ),
    "another rate": (
        lambda d: change(d, edited("times", lambda t: t * 2), "sub-02"),
        ["at 50 Hz", "at 100 Hz"],
    ),
    "uneven times": (
        lambda d: change(d, edited("times", lambda t: np.sign(t) * t**2)),
        ["one sampling rate"],
    ),
    "times that fall": (lambda d: change(d, edited("times", lambda t: t[::-1])), ["do not grow"]),
    "a channel name twice": (
        lambda d: change(d, edited("ch_names", lambda names: ["O1", *names[1:]])),
        ["duplicate channel names: O1"],
    ),
    "other channels": (
        lambda d: change(d, edited("ch_names", lambda names: ["Oz", *names[1:]]), "sub-02"),
        ["not in both: Fz, Oz"],
    ),
    "cut": (lambda d: _cut(eeg_file(d, "sub-01", "test")), ["sub-01", "cut short"]),
    "an unreadable picture": (lambda d: (d / FIRST).write_bytes(b""), [FIRST, "an empty file"]),
}  # fmt: skip


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(data, capsys, name):
    spoil, expected = FAULTS[name]
    spoil(data)
    code, told = run(data, capsys)
    assert code == 1
    for part in (*expected, "expected:", "cure:", "next: mend them"):
        assert part in told


def test_whole_pictures_are_read_on_request(data, capsys):
    path = data / FIRST
    path.write_bytes(path.read_bytes()[:-300])
    assert run(data, capsys)[0] == 0
    code, told = run(data, capsys, "--check", "full")
    assert (code, FIRST in told) == (1, True)


def test_captions_and_banks_are_compared(data, capsys):
    (data / "c.json").write_text(json.dumps({"lion": "a lion"}))
    code, told = run(data, capsys, "--captions", data / "c.json")
    assert code == 1 and "captions of other stimuli" in told
    _rename(data)
    code, told = run(data, capsys, "--clip_feature_path", data / "bank")
    assert code == 1 and "no features of 2 of 8 pictures" in told


def test_an_absent_folder_and_unknown_subjects_are_named(data, capsys):
    assert run(data / "none", capsys)[0] == 1
    code, told = run(data, capsys, "--subjects", "sub-09")
    assert code == 1 and "sub-09" in told


@pytest.mark.parametrize("flags", [[], ["--check"], ["--check", "full"]])
def test_check_may_be_said_or_not(data, flags, capsys):
    assert dataset.main([*flags, "--data_path", str(data)]) == 0
