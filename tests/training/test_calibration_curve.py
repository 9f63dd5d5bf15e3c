"""Calibration on nested minutes: what is read, what is scored, and that nothing selects."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers_training import joint_flags as flags
from helpers_training import write_people
from PIL import Image

import dataset
import train
from dataset import DataChoice, open_training
from decoder.decoder import Decoder
from metrics import retrieval_topk
from rundirs.files import read_json
from training.calibration_curve import minutes_folder, trials_shown, within_minutes
from util import UserError

TRIAL_S = 30.0  # so that a minute is two trials


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("three") / "DATA", 8)


@pytest.fixture(scope="module")
def known(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the first two subjects."""
    run = tmp_path_factory.mktemp("known") / "run"
    assert train.main(flags(three, run, "--subjects", "sub-01", "sub-02", "--epochs", 2)) == 0
    return run


def test_fewer_minutes_are_the_first_of_more() -> None:
    """All pictures once, then again; a picture with fewer trials than others ends early."""
    counts = torch.tensor([4, 4, 1, 3, 4])
    shown = [trials_shown(counts, number, seed=1) for number in range(17)]
    assert [int(one.sum()) for one in shown] == list(range(17))
    for fewer, more in itertools.pairwise(shown):
        assert (fewer <= more).all() and (more <= counts).all()
    assert shown[5].tolist() == [1] * 5 and torch.equal(shown[16], counts)
    assert trials_shown(counts, 3, seed=1).tolist() != trials_shown(counts, 3, seed=2).tolist()


def test_only_training_trials_of_the_minutes_are_read(three) -> None:
    asked = DataChoice(three, three / "bank", "average", 0.25, 0, subjects=["sub-03"])
    data = open_training(asked)
    limited = within_minutes(data, 3, TRIAL_S)
    assert len(limited.train_rows) == 6 and set(limited.train_rows.tolist()) < set(
        data.train_rows.tolist()
    )
    assert torch.equal(limited.val_rows, data.val_rows)
    assert torch.equal(limited.validation()[0], data.validation()[0])
    assert int(limited.counts[:, data.train_rows].sum()) == 6
    single = within_minutes(
        open_training(DataChoice(**vars(asked) | {"trials": "single"})), 3, TRIAL_S
    )
    assert len(single.samples) == 6
    for minutes in (0.01, 1e6):
        with pytest.raises(UserError, match="trials to train on"):
            within_minutes(data, minutes, TRIAL_S)


def test_one_command_trains_scores_and_draws(three, known, tmp_path, capsys) -> None:
    """The last row is the last checkpoint's own retrieval, the first that of a stranger."""
    run = tmp_path / "run"
    more = ("--adapt_from", known, "--subjects", "sub-03", "--minutes", 2, 5,
            "--trial_seconds", TRIAL_S)  # fmt: skip
    assert train.main(flags(three, run, *more)) == 0
    told = capsys.readouterr().out
    assert "| 0 | sub-03 |" in told and "stranger" in told
    curve = read_json(run / "calibration.json")
    assert [row["minutes"] for row in curve["rows"]] == [0, 2, 5]
    last = curve["rows"][-1]
    data = open_training(DataChoice(three, three / "bank", "random", 0.25, 0, subjects=["sub-03"]))
    eeg, _ = data.validation()
    targets = {name: rows[data.val_rows] for name, rows in data.targets.items()}
    truth = torch.arange(len(data.val_rows))
    for row, model, index in (
        (last, Decoder.load(minutes_folder(run, 5), "latest"), 2),
        (curve["rows"][0], Decoder.load(known, "best"), -1),
    ):
        found = model.embed(eeg, torch.full((len(eeg),), index))
        expected = retrieval_topk(found, model.gallery(targets), truth)
        assert row["top1"] == pytest.approx(expected["top1"])
        assert row["n"] == len(data.val_rows) and row["top1_chance"] == 1 / row["n"]
    assert Image.open(run / "calibration.png").width > 800
    before = (minutes_folder(run, 2) / "metrics.jsonl").read_bytes()
    assert train.main(flags(three, run, *more)) == 0, "the same command again trains nothing"
    assert (minutes_folder(run, 2) / "metrics.jsonl").read_bytes() == before


def test_test_pictures_are_not_opened(three, known, tmp_path, monkeypatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a calibration opened the test recording")

    monkeypatch.setattr(dataset, "open_test", refused)
    (three / "test_images").rename(three / "elsewhere")
    try:
        more = ("--adapt_from", known, "--subjects", "sub-03", "--minutes", 2, 4,
                "--trial_seconds", TRIAL_S)  # fmt: skip
        assert train.main(flags(three, tmp_path / "run", *more)) == 0
    finally:
        (three / "elsewhere").rename(three / "test_images")


def test_too_many_minutes_are_told_before_anything_is_trained(three, known, tmp_path, capsys):
    more = ("--adapt_from", known, "--subjects", "sub-03", "--minutes", 2, 999,
            "--trial_seconds", TRIAL_S)  # fmt: skip
    assert train.main(flags(three, tmp_path / "run", *more)) == 2
    assert "--minutes 999" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [(("--minutes", 5), "--adapt_from"), (("--trial_seconds", 1), "without --minutes"),
     (("--adapt_from", "x", "--subjects", "a", "--minutes", 5, 5), "twice")],
)  # fmt: skip
def test_what_cannot_work_is_refused(three, tmp_path, capsys, more, told) -> None:
    try:
        code = train.main(flags(three, tmp_path / "run", *more))
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and told in capsys.readouterr().err
