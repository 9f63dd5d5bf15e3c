"""Training that goes on from another model: fair validation, its inputs, what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_training import joint_flags, write_people

import ATMS_retrieval
import dataset
import train
from datafiles import splits
from decoder import fusion, low_level
from decoder.decoder import Decoder, model_file
from rundirs.files import read_json, read_jsonl
from rundirs.tensors import load_tensors, save_tensors

CONCEPTS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three people who saw the same 12 concepts."""
    return write_people(tmp_path_factory.mktemp("starting") / "DATA", CONCEPTS)


def flags(root: Path, out: Path, *more: object) -> list[str]:
    """One epoch; three of the twelve concepts are held out."""
    return joint_flags(root, out, "--epochs", 1, "--batch_size", 4, "--val_fraction", 0.25, *more)


@pytest.fixture(scope="module")
def encoder(world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("encoder") / "run"
    assert ATMS_retrieval.main(flags(world, run)) == 0
    return run


@pytest.fixture(scope="module")
def two(world, tmp_path_factory) -> Path:
    """A model of the first two people."""
    run = tmp_path_factory.mktemp("two") / "run"
    assert train.main(flags(world, run, "--subjects", "sub-01", "sub-02")) == 0
    return run


def held_out(run: Path) -> set[str]:
    return set(Decoder.load(run, "latest").concepts["held_out"])


def test_a_model_says_what_it_was_trained_on(world, encoder, two):
    for run in (encoder, two):
        concepts = Decoder.load(run, "best").concepts
        assert len(concepts["trained"]) == 9 and len(concepts["held_out"]) == 3
        assert not set(concepts["trained"]) & set(concepts["held_out"])
    data = dataset.open_training(dataset.DataChoice(world, world / "bank", "average", 0.25, 0))
    assert data.concepts() == Decoder.load(two, "best").concepts


@pytest.mark.parametrize("start", ["--init_from", "--adapt_from"])
def test_validation_sees_no_concept_that_the_donor_was_trained_on(
    world, encoder, two, tmp_path, capsys, start
):
    donor = encoder if start == "--init_from" else two
    more = (start, donor) if start == "--init_from" else (start, donor, "--subjects", "sub-03")
    assert train.main(flags(world, tmp_path / "other", *more, "--seed", 5)) == 0
    chosen = splits.split_concepts([f"concept{n}" for n in range(CONCEPTS)], 0.25, 5)
    assert held_out(tmp_path / "other") == held_out(donor) != chosen
    assert "validating on the 3 that it held out" in capsys.readouterr().err
    assert "that it held out" in (tmp_path / "other" / "log.txt").read_text()


def test_what_a_donor_s_donor_was_trained_on_counts(world, two, tmp_path):
    """By way of a model of other pictures: the first one's concepts are still known."""
    state, header = load_tensors(model_file(two, "best"))
    header["concepts"] = {"trained": ["elsewhere"], "held_out": ["concept0", "concept1"]}
    save_tensors(tmp_path / "donor" / "checkpoints" / "best" / "model.safetensors", state, header)
    more = ("--adapt_from", tmp_path / "donor", "--subjects", "sub-03")
    assert train.main(flags(world, tmp_path / "run", *more)) == 0
    found = Decoder.load(tmp_path / "run", "latest").concepts
    assert "elsewhere" in found["trained"] and len(found["trained"]) == 10


def test_a_donor_that_held_out_nothing_leaves_nothing_to_validate_on(world, tmp_path, capsys):
    donor = tmp_path / "donor"
    assert ATMS_retrieval.main(flags(world, donor, "--val_fraction", 0)) == 0
    more = ("--init_from", donor)
    assert train.main(flags(world, tmp_path / "run", *more)) == 2
    told = capsys.readouterr().err
    assert "--val_fraction 0" in told and "3 of 3 validation concepts" in told
    assert not (tmp_path / "run").exists()
    assert train.main(flags(world, tmp_path / "run", *more, "--val_fraction", 0)) == 0


def test_an_older_donor_is_told(world, encoder, tmp_path, capsys):
    donor = tmp_path / "donor"
    shutil.copytree(encoder, donor, symlinks=True)
    state, header = load_tensors(model_file(donor, "best"))
    del header["concepts"]
    save_tensors(model_file(donor, "best"), state, header)
    assert train.main(flags(world, tmp_path / "run", "--init_from", donor)) == 0
    assert "of an older version" in capsys.readouterr().err


def test_the_donor_is_an_input(world, encoder, tmp_path, capsys):
    donor, run = tmp_path / "donor", tmp_path / "run"
    shutil.copytree(encoder, donor, symlinks=True)
    assert train.main(flags(world, run, "--init_from", donor)) == 0
    assert "init_from" in read_json(run / "inputs.json")
    state, header = load_tensors(model_file(donor, "best"))
    save_tensors(model_file(donor, "best"), {k: v + 1 for k, v in state.items()}, header)
    assert train.main(flags(world, run, "--init_from", donor)) == 2
    assert "input init_from" in capsys.readouterr().err


def test_an_encoder_alone_is_not_adapted(world, encoder, tmp_path, capsys):
    more = ("--adapt_from", encoder, "--subjects", "sub-03")
    assert train.main(flags(world, tmp_path / "run", *more)) == 2
    assert "--init_from" in capsys.readouterr().err


def test_strangers_are_not_trained_beside_a_new_person(world, two, tmp_path, capsys):
    more = ("--adapt_from", two, "--subjects", "sub-03", "--trainable", "subject_layers")
    assert train.main(flags(world, tmp_path / "run", *more, "--subject_dropout", 0.2)) == 2
    assert "--subject_dropout" in capsys.readouterr().err


def test_the_low_level_head_of_a_new_person_is_fitted_on_their_eeg(world, two, tmp_path):
    run = tmp_path / "run"
    more = ("--adapt_from", two, "--subjects", "sub-03", "--trainable", "subject_layers")
    assert train.main(flags(world, run, *more, "--low_level")) == 0
    head = low_level.load_head(run)
    assert head.subjects == ("sub-03",)
    decoder = Decoder.load(run, "best")
    data = dataset.open_training(
        dataset.DataChoice(world, world / "bank", "average", 0.25, 0, ["sub-03"])
    )
    eeg = torch.from_numpy(data.cuts[0].cut(data.recordings[0].eeg).mean(axis=1))
    features = low_level.head_inputs(decoder, eeg, 2)
    torch.testing.assert_close(
        head.mean[0].float(), features[data.train_rows].mean(0), rtol=1e-3, atol=1e-2
    )


def test_a_resumed_run_keeps_what_validation_found(world, tmp_path):
    """With --val_every 2, a checkpoint between two validations."""
    run = tmp_path / "run"
    command = flags(world, run, "--epochs", 4, "--val_every", 2, "--epochs_per_call", 1)
    for _ in range(3):
        train.main(command)
    made = Decoder.load(run, "latest")
    assert len(read_jsonl(run / "metrics.jsonl")) == 3
    assert made.calibration and made.held_out
    assert made.calibration == Decoder.load(run, "best").calibration


# --- validation of many people ------------------------------------------------------------------


def test_validation_is_the_mean_over_its_pieces(world, two, monkeypatch):
    """The aligner's loss does not depend on how many rows are looked at at once."""
    data = dataset.open_training(dataset.DataChoice(world, world / "bank", "average", 0.25, 0))
    decoder = Decoder.load(two, "best")
    decoder.encoder.add_subjects(1)
    objective = train.JointObjective(decoder, data, train.Contrast(0.1), 1.0, 1)
    sizes, losses = [], objective._losses

    def seen(embedding, *inputs):
        sizes.append(len(embedding))
        return losses(embedding, *inputs)

    monkeypatch.setattr(objective, "_losses", seen)
    monkeypatch.setattr(train, "VALIDATION_DRAWS", 400)
    found = {}
    for rows in (512, 4):
        monkeypatch.setattr(train, "VALIDATION_ROWS", rows)
        found[rows] = objective.validate()
    assert sizes == [18, 4, 4, 4, 4, 2]
    assert found[4]["val_aligner"] == pytest.approx(found[512]["val_aligner"], rel=0.05)
    assert found[4]["val_image_top5"] == found[512]["val_image_top5"]


def test_calibration_is_capped_and_says_so(world, two, monkeypatch, caplog):
    data = dataset.open_training(dataset.DataChoice(world, world / "bank", "average", 0.25, 0))
    decoder = Decoder.load(two, "best")
    decoder.encoder.add_subjects(1)
    decoder.calibration = None
    objective = train.JointObjective(decoder, data, train.Contrast(0.1), 1.0, 1)
    monkeypatch.setattr(fusion, "CALIBRATION_ROWS", 5)
    monkeypatch.setattr(train.util.LOG, "propagate", True)
    with caplog.at_level("INFO", train.util.LOG.name):
        objective.validate()
    assert "calibration sees 5 of 18 held-out rows" in caplog.text
    assert {of["n"] for of in decoder.calibration.values()} == {5}
    json.dumps(decoder.header())
