"""Joint training, strangers (leave-one-out) and new subjects (adaptation)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain
from helpers_training import joint_flags as flags
from helpers_training import write_people

import dataset
import evaluate
import train
import util
from datafiles.datasets.things_eeg2 import EEG_FOLDER
from decoder.decoder import Decoder
from masking import mask_subject
from rundirs.files import read_json
from training import loop

TRAINING = "preprocessed_eeg_training.npy"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("three") / "DATA", 8)


def people_in(eeg: torch.Tensor) -> set[int]:
    """Whose EEG it is, from its values; masks and means keep them."""
    return set((eeg.amax(dim=(1, 2)) // 1000).int().tolist())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What training is given: people by their EEG's values, and the ids they are given under."""
    seen: dict[str, list] = {"people": [], "ids": [], "validated": []}
    update, validation = loop._Training.update, dataset.TrainingData.validation

    def seen_update(self, batch):
        seen["people"] += people_in(batch.eeg)
        seen["ids"] += batch.subject.tolist()
        update(self, batch)

    def seen_validation(self):
        eeg, subject = validation(self)
        seen["validated"] += people_in(eeg)
        return eeg, subject

    monkeypatch.setattr(loop._Training, "update", seen_update)
    monkeypatch.setattr(dataset.TrainingData, "validation", seen_validation)
    return seen


def test_all_subjects_are_trained_jointly_under_their_own_ids(three, tmp_path, read):
    assert train.main(flags(three, tmp_path / "run")) == 0
    assert set(read["people"]) == {0, 1, 2} == set(read["ids"])


def test_the_left_out_subject_is_never_read(three, tmp_path, read):
    """Not in training, not in validation; its training file is not even opened."""
    file = three / EEG_FOLDER / "sub-02" / TRAINING
    away = file.rename(file.with_suffix(".away"))
    try:
        assert train.main(flags(three, tmp_path / "run", "--leave_out", "sub-02")) == 0
    finally:
        away.rename(file)
    assert set(read["people"]) == {0, 2} == set(read["validated"])
    decoder = Decoder.load(tmp_path / "run", "best")
    assert decoder.signal["subjects"] == ["sub-01", "sub-03"]
    assert decoder.subject_index("sub-02") == -1


def test_strangers_are_rehearsed_where_one_is_left_out(three, tmp_path, monkeypatch):
    ids: list[int] = []
    losses = train.JointObjective.losses

    def seen(self, batch, *rest):
        ids.extend(batch.subject.tolist())
        return losses(self, batch, *rest)

    monkeypatch.setattr(train.JointObjective, "losses", seen)
    assert train.main(flags(three, tmp_path / "all", "--epochs", 8)) == 0
    assert -1 not in ids
    ids.clear()
    assert train.main(flags(three, tmp_path / "run", "--leave_out", "sub-02", "--epochs", 8)) == 0
    assert 0.1 < ids.count(-1) / len(ids) < 0.3
    shared = "encoder.encoder.enc_embedding.subject_embedding.shared_embedding"
    tokens = [
        dict(Decoder.load(tmp_path / name, "latest").named_parameters())[shared]
        for name in ("run", "all")
    ]
    assert not torch.equal(*tokens), "the token for strangers is trained"


def test_unknown_subjects_are_drawn_for_the_whole_batch():
    ids = torch.arange(1000)
    whole = mask_subject(ids, 0.3, util.generator_for(0, "x"))
    assert 0.25 < (whole < 0).float().mean() < 0.35
    assert torch.equal(whole[whole >= 0], ids[whole >= 0])
    parts = [mask_subject(p, 0.3, util.generator_for(0, "x"), i, 2)
             for i, p in enumerate(ids.chunk(2))]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


def test_one_command_trains_all_folds_and_one_scores_them(features: Chain, tmp_path: Path) -> None:
    out = tmp_path / "folds"
    command = features.train_flags(out, "--leave_out", "each", "--epochs", 1)
    assert train.main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["without_sub-01", "without_sub-02"]
    assert Decoder.load(out / "without_sub-01", "best").signal["subjects"] == ["sub-02"]
    written = [path.stat().st_mtime_ns for path in out.glob("*/DONE")]
    assert train.main(command) == 0  # again: does nothing
    assert written == [path.stat().st_mtime_ns for path in out.glob("*/DONE")]
    scores = tmp_path / "scores"
    assert evaluate.main(features.evaluate_flags(scores, "--model_path", out)) == 0
    results = read_json(scores / "results.json")
    assert {row["subject"] for row in results["retrieval"]} == {"sub-01", "sub-02"}
    (row,) = [row for row in results["across_subjects"] if row["query"] == "encoder -> image"]
    own = [row["top5"] for row in results["retrieval"] if row["query"] == "encoder -> image"]
    assert row["subjects"] == 2
    assert row["scores"]["top5"]["mean"] == pytest.approx(sum(own) / 2)
    assert row["scores"]["top5"]["se"] == pytest.approx(abs(own[0] - own[1]) / 2)
    assert "mean ± SE" in (scores / "table.md").read_text(encoding="utf-8")
    # the fold without sub-01 is scored on sub-01 alone: the same as that model by itself
    alone = tmp_path / "alone"
    fold = ("--model_path", out / "without_sub-01", "--subjects", "sub-01")
    assert evaluate.main(features.evaluate_flags(alone, *fold)) == 0
    (one, *_), (two, *_) = (
        [r for r in read_json(run / "results.json")["retrieval"] if r["subject"] == "sub-01"]
        for run in (scores, alone)
    )
    assert one["mrr"] == pytest.approx(two["mrr"])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--leave_out", "sub-09"), "sub-01, sub-02, sub-03"),
        (("--leave_out", "sub-01", "--subjects", "sub-01"), "at least two"),
        (("--subjects", "sub-09"), "sub-09"),
        (("--adapt_from", "nowhere"), "--subjects"),
        (("--trainable", "encoder"), "--adapt_from"),
    ],
)
def test_wrong_subjects_are_refused(three, tmp_path, capsys, more, told):
    try:
        code = train.main(flags(three, tmp_path / "run", *more))
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- adaptation ---------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_named(three, tmp_path, capsys):
    command = flags(three, tmp_path / "run", "--adapt_from", "nowhere", "--subjects", "sub-03")
    assert train.main(command) == 1 and "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def known(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the first two subjects."""
    run = tmp_path_factory.mktemp("known") / "run"
    assert train.main(flags(three, run, "--subjects", "sub-01", "sub-02", "--epochs", 4)) == 0
    return run


def test_a_new_subject_begins_as_a_stranger(three, known):
    decoder, before = Decoder.load(known, "best"), Decoder.load(known, "best")
    decoder.encoder.add_subjects(1)
    eeg = torch.randn(3, 5, 20)
    new = decoder.embed(eeg, torch.full((3,), 2))
    torch.testing.assert_close(new, before.embed(eeg, torch.full((3,), -1)))
    for subject in (0, 1, -1):
        ids = torch.full((3,), subject)
        torch.testing.assert_close(decoder.embed(eeg, ids), before.embed(eeg, ids))


def test_adaptation_changes_the_new_subject_and_nothing_else(three, known, tmp_path, read):
    more = ("--adapt_from", known, "--subjects", "sub-03", "--trainable", "subject_layers")
    assert train.main(flags(three, tmp_path / "run", *more, "--learning_rate", 1e-2)) == 0
    assert set(read["people"]) == {2} and set(read["ids"]) == {2}
    old, new = Decoder.load(known, "best"), Decoder.load(tmp_path / "run", "latest")
    assert new.signal["subjects"] == ["sub-01", "sub-02", "sub-03"]
    before, after = old.state_dict(), new.state_dict()
    for name, value in after.items():
        was = before[name]
        assert torch.equal(value[: len(was)] if value.ndim else value, was), name
    added = after["encoder.subject_layer.weight"][2]
    assert not torch.equal(added, before["encoder.subject_layer.weight"].mean(0))


def test_all_may_be_trained_on_new_subjects(three, known, tmp_path):
    more = ("--adapt_from", known, "--subjects", "sub-03")
    assert train.main(flags(three, tmp_path / "run", *more)) == 0
    old, new = Decoder.load(known, "best"), Decoder.load(tmp_path / "run", "latest")
    name = "encoder.proj_eeg.0.weight"
    assert not torch.equal(old.state_dict()[name], new.state_dict()[name])


def test_known_subjects_and_another_signal_are_refused(three, known, tmp_path, capsys):
    for more, told in (
        (("--subjects", "sub-01"), "in the model already"),
        (("--subjects", "sub-03", "--channels", "Cz"), "--channels"),
    ):
        run = tmp_path / "run"
        assert train.main(flags(three, run, "--adapt_from", known, *more)) == 2
        assert told in capsys.readouterr().err and not run.exists()
