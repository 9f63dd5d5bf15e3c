"""Published forms of one recording: same averages, same scores, told apart by content."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from helpers_forms import IMAGES_OF, WRITERS, write_as

import evaluate
import report
import train
from datafiles import eeg_files
from datafiles.datasets import registry
from datafiles.pickles import read_pickled_dict
from datafiles.stimuli import PARTITIONS, list_stimuli
from dataset import TrainingData
from dataset import main as check
from modalities import DATASETS, EXPORTS
from util import DataError, UserError


@pytest.fixture
def data(tmp_path):
    """DATA with pictures, without recordings."""
    builders.write_pictures(tmp_path / "data", training=6, images=IMAGES_OF["training"], test=3)
    return tmp_path / "data"


def contents(root, repetitions=4):
    """{partition: content}, its values saying where they belong."""
    return {
        partition: builders.published(0, len(list_stimuli(root, partition)), repetitions)
        for partition in PARTITIONS
    }


def test_every_form_is_a_choice():
    assert tuple(registry.FORMS) == DATASETS == tuple(WRITERS)


def test_every_form_is_documented():
    text = (Path(registry.__file__).parents[2] / "docs" / "datasets.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if "| `" in line}
    rows = {name: line for name, line in rows.items() if "." not in name}  # other tables: of files
    assert tuple(rows) == ("--dataset", *DATASETS)
    for name, form in registry.FORMS.items():
        assert all(file in rows[name] for file in form.files.values()), name
        assert form.folders[0].rstrip("*") in rows[name], name


@pytest.mark.parametrize("form", DATASETS)
def test_a_form_holds_what_was_written(data, form, tmp_path):
    given = contents(data)
    files = write_as(form, data, "sub-01", given)
    assert registry.layout_in(data).form.name == form
    assert eeg_files.list_subjects(data, None) == ["sub-01"]
    for file, partition in zip(files, PARTITIONS, strict=True):
        assert eeg_files.eeg_file(data, "sub-01", partition) == file
        assert registry.form_of(file).name == form
        stimuli = list_stimuli(data, partition)
        read = eeg_files.open_recording(file, tmp_path / "cache", stimuli)
        np.testing.assert_array_equal(read.eeg, given[partition]["preprocessed_eeg_data"])
        assert read.channels == list(builders.CHANNELS)
        np.testing.assert_allclose(read.times, np.arange(20) / builders.RATE_HZ, atol=1e-12)
        eeg_files.check_rows(read, stimuli)


def rewritten(chain, root, form) -> None:
    """The chain's two people in another form, beside links to its pictures."""
    for partition in PARTITIONS:
        folder = f"{partition}_images"
        shutil.copytree(chain.data / folder, root / folder)
    for name in eeg_files.list_subjects(chain.data, None):
        files = {one: eeg_files.eeg_file(chain.data, name, one) for one in PARTITIONS}
        given = {one: read_pickled_dict(file) for one, file in files.items()}
        written = write_as(form, root, name, given)
        shutil.copy(files["test"].parent / "simulated.json", written[0].parent)


def retrieval(chain, root, out, *more) -> list[dict]:
    flags = ["--model_path", chain.model, "--data_path", root, "--clip_feature_path",
             chain.features, "--prior_steps", 3, "--permutations", 5, "--device", "cpu",
             "--output_dir", out, *more]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    return json.loads((out / "results.json").read_text())["retrieval"]


@pytest.mark.parametrize("form", [name for name in DATASETS if name != "things-eeg2"])
def test_another_form_has_the_same_scores(chain, tmp_path, form):
    """Also the same training: the EEG that a batch is made of."""
    root = tmp_path / "data"
    rewritten(chain, root, form)
    assert retrieval(chain, root, tmp_path / "b") == retrieval(chain, chain.data, tmp_path / "a")
    batches = []
    for where in (chain.data, root):
        opened: TrainingData = builders.open_world(where, clip_feature_path=chain.features)
        batches.append(next(opened.batches(0, 8)).eeg)
    assert torch.equal(*batches)


def test_two_forms_need_a_name(chain, tmp_path, capsys):
    root = tmp_path / "data"
    rewritten(chain, root, "ubp")
    given = {one: read_pickled_dict(eeg_files.eeg_file(chain.data, "sub-01", one))
             for one in PARTITIONS}  # fmt: skip
    given["test"] = given["test"] | {
        "preprocessed_eeg_data": given["test"]["preprocessed_eeg_data"][::-1]
    }
    write_as("things-eeg2", root, "sub-01", given)
    with pytest.raises(UserError, match=r"things-eeg2 in .*, ubp in "):
        registry.layout_in(root)
    assert check(["--data_path", str(root)]) == 2
    assert "--dataset" in capsys.readouterr().err
    one = ["--subjects", "sub-01"]
    found = [
        retrieval(chain, root, tmp_path / form, *one, "--dataset", form)
        for form in ("ubp", "things-eeg2")
    ]
    assert found[0] == retrieval(chain, chain.data, tmp_path / "own", *one)
    assert found[1] != found[0]
    flags = chain.train_flags(tmp_path / "run", "--data_path", root, *one, "--epochs", 1)
    assert train.main([*flags, "--dataset", "ubp"]) == 0
    assert train.main(flags) == 2
    assert report.main(["--runs", str(tmp_path / "run")]) == 0, "the run says which"


def test_float16_loses_less_than_a_thousandth(data, tmp_path):
    given = contents(data)
    noise = np.random.default_rng(0).normal(size=given["test"]["preprocessed_eeg_data"].shape)
    given["test"] |= {"preprocessed_eeg_data": noise.astype(np.float16)}
    file = write_as("ubp", data, "sub-01", given)[1]
    read = eeg_files.open_recording(file, tmp_path / "cache")
    assert np.abs(read.eeg - noise).max() < 4e-3
    assert np.sqrt(np.square(read.eeg - noise).mean()) < 1e-3


def test_rows_of_other_pictures_are_refused(data, tmp_path):
    file = write_as("ubp", data, "sub-01", contents(data))[0]
    (data / "training_images/00001_train1/train1_1.png").rename(
        data / "training_images/00001_train1/train1_3.png"
    )
    with pytest.raises(DataError, match=r"no row of 1 of 12 pictures.*train1_3\.png"):
        eeg_files.open_recording(file, tmp_path / "cache", list_stimuli(data, "training"))
    (data / "training_images/00001_train1/train1_3.png").unlink()
    with pytest.raises(DataError, match=r"rows of 12 pictures, 11 are there; not .*train1_1\.png"):
        eeg_files.parsed_recording(file, list_stimuli(data, "training"))


def test_rows_in_another_order_are_those_of_their_pictures(data, tmp_path):
    """Mixed with what they are called: read right, not refused; a copy in each order of its own."""
    file = write_as("ubp", data, "sub-01", contents(data))[0]
    stimuli = list_stimuli(data, "training")
    wanted = eeg_files.open_recording(file, tmp_path / "cache", stimuli).eeg
    content = torch.load(file, weights_only=False)
    order = np.random.default_rng(2).permutation(12)
    torch.save(content | {"eeg": content["eeg"][order], "img": content["img"][order]}, file)
    read = eeg_files.open_recording(file, tmp_path / "cache", stimuli)
    np.testing.assert_array_equal(read.eeg, wanted)
    assert read.pictures == [item.key for item in stimuli]
    backwards = eeg_files.open_recording(file, tmp_path / "cache", stimuli[::-1])
    np.testing.assert_array_equal(backwards.eeg, wanted[::-1])
    np.testing.assert_array_equal(eeg_files.parsed_recording(file, stimuli).eeg, wanted)


def _saved(data, **changed):
    file = data / "Preprocessed_data_250Hz_whiten" / "sub-01" / "test.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = [item.key for item in list_stimuli(data, "test")]
    content = {"eeg": np.zeros((3, 2, 5, 20), np.float16), "img": keys,
               "ch_names": list(builders.CHANNELS), "times": np.arange(20) / 100}  # fmt: skip
    kept = {key: value for key, value in (content | changed).items() if value is not None}
    torch.save(kept, file)
    return file


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"img": ["a.jpg"] * 3}, "not train_images"), ({"img": None}, "also img"),
     ({"img": [["test_images/a/b.png", "test_images/a/c.png"]] * 3}, "of several pictures"),
     ({"img": ["test_images/a/b.png"]}, "1 pictures in img, 3 rows"),
     ({"ch_names": None}, "ch_names"), ({"times": None, "ch_names": None}, "ch_names"),
     ({"eeg": np.zeros((3, 2, 5), np.float16)}, r"shape \(3, 2, 5\)")],
)  # fmt: skip
def test_what_a_ubp_file_lacks_is_told(data, changed, told):
    with pytest.raises(DataError, match=told):
        registry.parse(_saved(data, **changed))


def test_meg_of_ubp_has_neither_names_nor_times(data):
    meg = np.full((3, 1, 271, 201), 2e-13, np.float32)
    read = registry.parse(_saved(data, eeg=meg, ch_names=None, times=None))
    assert read.channels[0] == "MEG001" and len(set(read.channels)) == 271
    assert read.times[-1] == 1.0
    np.testing.assert_array_equal(read.eeg, meg)


def test_plain_arrays_need_their_info(data):
    file = write_as("neurobridge", data, "sub-01", contents(data))[0]
    (file.parent.parent / "info.json").rename(file.parent / "info.json")
    assert registry.parse(file).eeg.shape == (12, 4, 5, 20)
    (file.parent / "info.json").unlink()
    with pytest.raises(DataError, match=r"no info\.json beside it"):
        registry.parse(file)


def test_a_longer_baseline_and_fewer_repetitions_are_read(data, tmp_path):
    """Uncut times belong to as many samples; three repetitions of float32."""
    given = contents(data, repetitions=3)
    given["test"] |= {
        "preprocessed_eeg_data": np.zeros((3, 3, 5, 25), np.float32),
        "times": np.arange(-5, 20) / 100,
    }
    file = write_as("things-eeg2", data, "sub-01", given)[1]
    read = eeg_files.open_recording(file, tmp_path / "cache")
    assert read.eeg.shape == (3, 3, 5, 25) and read.times[0] == -0.05


@pytest.mark.parametrize("given", ["file", "subject", "folder", "DATA"])
def test_a_test_recording_is_found_from_any_folder(data, given):
    file = write_as("ubp", data, "sub-01", contents(data))[1]
    place = {"file": file, "subject": file.parent, "folder": file.parents[1], "DATA": data}[given]
    assert eeg_files.locate_test_eeg(place, None, None) == (file, "sub-01", data)


def test_nothing_in_a_file_is_run(data, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = _saved(data, text=Bomb())
    with pytest.raises(DataError, match=r"refused: the file asks to load (io|_io|builtins)\.open"):
        registry.parse(file)
    file.write_bytes(pickle.dumps({"meg_data": Bomb()}))
    with pytest.raises(DataError, match="refused"):
        registry.parse(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", EXPORTS)
def test_an_export_has_the_same_scores(chain, tmp_path, form, capsys):
    out = tmp_path / "out"
    flags = ["--data_path", str(chain.data), "--export", form, "--output_path", str(out)]
    assert check(flags) == 0
    written = [tmp_path / line for line in capsys.readouterr().out.split("\n") if line]
    assert len(written) == 4 and all(file.exists() for file in written)
    for partition in PARTITIONS:
        shutil.copytree(chain.data / f"{partition}_images", out / f"{partition}_images")
    assert registry.layout_in(out).form.name == {"npy": "things-eeg2"}.get(form, form)
    assert eeg_files.is_simulated(out)
    of = [retrieval(chain, root, tmp_path / f"of_{root.name}") for root in (chain.data, out)]
    assert [row["top1"] for row in of[0]] == [row["top1"] for row in of[1]]
    assert check(flags) == 2
    assert "is there already" in capsys.readouterr().err


def test_volts_are_not_exported_as_float16(data, tmp_path):
    given = contents(data)
    volts = 1e-6 * np.random.default_rng(0).normal(size=(3, 4, 5, 20))
    given["test"] |= {"preprocessed_eeg_data": volts}
    write_as("things-eeg2", data, "sub-01", given)
    flags = ["--data_path", str(data), "--export", "ubp", "--output_path", str(tmp_path / "out")]
    assert check(flags) == 0
    (file,) = (tmp_path / "out").glob("*/sub-01/test.pt")
    np.testing.assert_allclose(registry.parse(file).eeg, volts, rtol=1e-6)


def test_an_array_of_unequal_concepts_cannot_be_exported(data, tmp_path, capsys):
    builders.write_picture(data / "training_images/00001_train1/train1_3.png")
    given = contents(data)
    write_as("things-eeg2", data, "sub-01", given)
    out = tmp_path / "out"
    code = check(["--data_path", str(data), "--export", "neurobridge", "--output_path", str(out)])
    assert code == 1 and "2 pictures of 00002_train2, 3 of others" in capsys.readouterr().err
    assert not list(out.rglob("*.npy"))


@pytest.mark.parametrize("flags", [["--export", "ubp"], ["--output_path", "x"]])
def test_an_export_needs_a_place(data, flags):
    assert check(["--data_path", str(data), *flags]) == 2
