"""``--align euclidean``: one covariance for everybody, kept with the model; strangers marked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from helpers_training import joint_flags, write_people

import ATMS_retrieval
import dataset
import evaluate
import report
import train
from datafiles.alignment import Reading, euclidean, inverse_root, mean_covariance
from datafiles.eeg_files import eeg_file, open_recording, select_signal
from datafiles.stimuli import PARTITIONS, list_stimuli
from dataset import DataChoice, open_training
from decoder.decoder import Decoder
from rundirs.files import read_json

CONCEPTS = 12
C = len(builders.CHANNELS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three people of one response, each mixed into the channels by a matrix of its own."""
    root = write_people(tmp_path_factory.mktemp("aligned") / "DATA", CONCEPTS)
    draw = np.random.default_rng(0)
    for subject in range(3):
        mixing = np.eye(C) + 0.3 * draw.normal(size=(C, C))
        for partition in PARTITIONS:
            rows = len(list_stimuli(root, partition))
            eeg = 3**subject * mixing @ draw.normal(size=(rows, 4, C, 20))
            content = builders.published(subject, rows) | {"preprocessed_eeg_data": eeg}
            file = eeg_file(root, f"sub-0{subject + 1}", partition)
            builders.write_published(file, content)
    return root


def choice(world: Path, **more: object) -> DataChoice:
    return DataChoice(world, world / "bank", "average", 0.25, 0, **more)


def covariance(eeg: np.ndarray) -> np.ndarray:
    """Of trials [N, R, C, T], as the definition has it."""
    trials = eeg.reshape(-1, *eeg.shape[2:]).astype(np.float64)
    return np.mean([trial @ trial.T / trial.shape[1] for trial in trials], axis=0)


def test_everybody_s_mean_covariance_becomes_the_identity(world):
    data = open_training(choice(world, align="euclidean")).aligned()
    for recording, cut in zip(data.recordings, data.cuts, strict=True):
        aligned = cut.cut(np.asarray(recording.eeg[data.train_rows.numpy()]))
        assert np.abs(covariance(aligned) - np.eye(C)).max() < 1e-3
    plain = open_training(choice(world)).aligned()
    assert all(cut.spatial is None for cut in plain.cuts) and "align" not in plain.signal


def test_held_out_pictures_are_not_looked_at(world):
    data = open_training(choice(world, align="euclidean"))
    of_training = data.aligned().cuts[0].spatial
    everything = euclidean(data.recordings[0], data.cuts[0], range(len(data.stimulus)))
    own = euclidean(data.recordings[0], data.cuts[0], data.train_rows.tolist())
    assert np.array_equal(of_training, own) and not np.allclose(own, everything)


def test_batches_are_aligned_wherever_the_eeg_lies(world):
    data = open_training(choice(world, align="euclidean")).aligned()
    held = data.held_on(torch.device("cpu"))
    for one, other in zip(data.batches(0, 8), held.batches(0, 8), strict=True):
        torch.testing.assert_close(one.eeg, other.eeg, rtol=1e-4, atol=1e-4)
    bare = replace(data, cuts=[replace(cut, spatial=None) for cut in data.cuts])
    for one, other in zip(data.batches(0, 8), bare.batches(0, 8), strict=True):
        for eeg, raw, subject in zip(one.eeg, other.eeg, one.subject, strict=True):
            expected = torch.from_numpy(data.cuts[subject].spatial) @ raw
            torch.testing.assert_close(eeg, expected, rtol=1e-4, atol=1e-4)


def test_an_average_reference_leaves_a_direction_without_variance():
    draw = np.random.default_rng(0).normal(size=(3, 4000))
    referenced = draw - draw.mean(axis=0)
    aligned = inverse_root(referenced @ referenced.T / 4000) @ referenced
    values = np.linalg.eigvalsh(aligned @ aligned.T / 4000)
    assert np.allclose(values, [0, 1, 1], atol=1e-2)


def test_a_stranger_is_aligned_by_the_own_recording(world, tmp_path):
    """Whatever its unit and mixing; a known person's matrix is the training's."""
    file = eeg_file(world, "sub-01", "test")
    recording = open_recording(file, tmp_path)
    signal = select_signal(recording, None)
    reading = Reading(signal.channels, signal.times, aligned=True)
    found = reading.signal(recording)
    assert np.abs(mean_covariance(recording, found, range(3)) - np.eye(C)).max() < 1e-3
    known = replace(reading, spatial=2 * np.eye(C, dtype=np.float32)).signal(recording)
    assert np.allclose(known.cut(recording.eeg[0]), 2 * recording.eeg[0])
    assert reading.transductive and not replace(reading, spatial=np.eye(C)).transductive


def flags(world: Path, out: Path, *more: object) -> list[str]:
    call = ("--epochs", 1, "--batch_size", 4, "--val_fraction", 0.25, "--align", "euclidean", *more)
    return joint_flags(world, out, *call)


def scores(world: Path, run: Path, out: Path, *more: object) -> tuple[dict, str]:
    call = ["--model_path", run, "--data_path", world, "--clip_feature_path", world / "bank"]
    call += ["--output_dir", out, "--permutations", 3, "--prior_steps", 2, *more]
    assert evaluate.main([str(token) for token in call]) == 0
    return read_json(out / "results.json"), (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", [train, ATMS_retrieval])
def test_the_matrices_are_kept_with_the_model(world, tmp_path, stage):
    run = tmp_path / "run"
    assert stage.main(flags(world, run, "--subjects", "sub-01", "sub-02")) == 0
    decoder = Decoder.load(run, "best")
    asked = choice(world, align="euclidean", subjects=["sub-01", "sub-02"])
    data = open_training(asked).aligned()
    for index, name in enumerate(data.signal["subjects"]):
        assert np.allclose(decoder.reading(name).spatial, data.cuts[index].spatial)
    assert decoder.reading("sub-03").transductive
    known, text = scores(world, run, tmp_path / "known")
    assert known["aligned_by_test"] == [] and "Transductive" not in text
    stranger, text = scores(world, run, tmp_path / "stranger", "--subjects", "sub-03")
    assert stranger["aligned_by_test"] == ["sub-03"] and "Transductive" in text
    page = tmp_path / "report.html"
    assert report.main(["--runs", str(tmp_path / "stranger"), "--output", str(page)]) == 0
    assert "Transductive" in page.read_text(encoding="utf-8")


def test_a_model_that_is_adapted_keeps_the_others_matrices(world, tmp_path, capsys):
    run, more = tmp_path / "run", ("--subjects", "sub-03", "--adapt_from")
    assert train.main(flags(world, run, "--subjects", "sub-01", "sub-02")) == 0
    assert train.main(flags(world, tmp_path / "new", *more, run)) == 0
    before, after = Decoder.load(run, "best"), Decoder.load(tmp_path / "new", "best")
    for name in ("sub-01", "sub-02"):
        assert np.array_equal(before.reading(name).spatial, after.reading(name).spatial)
    own = open_training(choice(world, align="euclidean", subjects=["sub-03"])).aligned()
    assert np.allclose(after.reading("sub-03").spatial, own.cuts[0].spatial)
    plain = [*joint_flags(world, tmp_path / "other", *map(str, more), str(run))]
    assert train.main(plain) == 2
    assert "trained with --align euclidean" in capsys.readouterr().err


def test_the_curve_of_minutes_is_not_of_aligned_models(world, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(flags(world, run, "--subjects", "sub-01", "sub-02")) == 0
    more = ("--subjects", "sub-03", "--adapt_from", run, "--minutes", 0.1, 0.2)
    assert train.main(flags(world, tmp_path / "new", *more)) == 2
    assert "--minutes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_training_does_not_open_test_recordings(world, tmp_path, monkeypatch):
    """Alignment sees no EEG of test pictures before evaluate.py."""
    monkeypatch.setattr(dataset, "open_test", lambda *_: pytest.fail("opened"))
    for name in ("sub-01", "sub-02", "sub-03"):
        file = eeg_file(world, name, "test")
        file.rename(file.with_suffix(".away"))
    try:
        assert train.main(flags(world, tmp_path / "run")) == 0
    finally:
        for file in world.rglob("*.away"):
            file.rename(file.with_suffix(".npy"))
