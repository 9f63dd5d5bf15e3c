"""NeuralBench's way of counting: ranks of single trials, of a person's mean, of everybody's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluate
import report
from evaluation import neuralbench
from evaluation.neuralbench import INSTANCES, SUBJECTS, TRIALS, Predictions

GALLERY = torch.eye(8)


def of(subject: str, *trials: tuple[int, list[float]]) -> Predictions:
    """Trials as (picture, its similarity to each of the eight)."""
    rows = torch.tensor([values for _, values in trials], dtype=torch.float32)
    return Predictions(subject, rows, torch.tensor([picture for picture, _ in trials]), GALLERY)


def similar(picture: int, better: int, tied: int = 0) -> tuple[int, list[float]]:
    """A trial of a picture that ``better`` others beat and ``tied`` others equal."""
    others = [1.0] * better + [0.5] * tied + [0.1] * (7 - better - tied)
    return picture, [*others[:picture], 0.5, *others[picture:]]


def test_a_toy_matrix_equals_the_hand_counts() -> None:
    """Ranks from 0: 0, 2, 6 and one of 4 with two ties, 5; N = 8 pictures."""
    trials = (similar(0, 0), similar(3, 2), similar(5, 6), similar(7, 4, tied=2))
    (row, _) = neuralbench.benchmark_rows([of("sub-01", *trials)], seed=0, draws=3)
    assert row["level"] == TRIALS and row["queries"] == 4 and row["n"] == 8
    assert row["inverse_rank"] == pytest.approx(np.mean([1, 5 / 7, 1 / 7, 2 / 7]))
    assert row["top5"] == pytest.approx(2 / 4) and row["top5_chance"] == 5 / 8
    ranks = torch.tensor([0.0, 2, 6, 5])
    assert row["median_rank"] == 1 + float(ranks.median())
    assert row["inverse_rank_median"] == pytest.approx(float((1 - ranks / 7).median()))


def test_predictions_are_averaged_before_they_are_ranked() -> None:
    """Two trials that are both wrong, whose mean is right; per person, then of everybody."""
    wrong, other = [0.6, 1.0] + [0.0] * 6, [0.6, 0.0, 1.0] + [0.0] * 5
    one, two = of("sub-01", (0, wrong), (0, wrong)), of("sub-02", (0, other), (0, other))
    rows = neuralbench.benchmark_rows([one, two], seed=0, draws=3)
    found = {(row["level"], row["subject"]): (row["queries"], row["inverse_rank"]) for row in rows}
    assert found == {
        (TRIALS, "sub-01"): (2, pytest.approx(6 / 7)),
        (SUBJECTS, "sub-01"): (1, pytest.approx(6 / 7)),
        (TRIALS, "sub-02"): (2, pytest.approx(6 / 7)),
        (SUBJECTS, "sub-02"): (1, pytest.approx(6 / 7)),
        (TRIALS, "all"): (4, pytest.approx(6 / 7)),
        (SUBJECTS, "all"): (2, pytest.approx(6 / 7)),
        (INSTANCES, "all"): (1, pytest.approx(1.0)),
    }


def test_lengths_of_predictions_weigh_in_their_mean() -> None:
    """As there: predictions are averaged as they are, not as unit vectors."""
    long, short = [0.0, 10.0] + [0.0] * 6, [1.0, 0.0] + [0.0] * 6
    (_, averaged) = neuralbench.benchmark_rows([of("s", (0, long), (0, short))], 0, 3)
    assert averaged["inverse_rank"] == pytest.approx(6 / 7)


def test_models_that_rank_other_galleries_are_not_pooled() -> None:
    one = of("sub-01", similar(0, 0))
    other = Predictions("sub-02", one.of_trial, one.picture, 2 * GALLERY)
    rows = neuralbench.benchmark_rows([one, other], 0, 3)
    assert {row["subject"] for row in rows} == {"sub-01", "sub-02"}


def test_dealt_elsewhere_it_is_chance() -> None:
    trials = [similar(picture, 0) for picture in range(8) for _ in range(3)]
    (row, _) = neuralbench.benchmark_rows([of("sub-01", *trials)], seed=0, draws=400)
    assert row["inverse_rank"] == 1 and row["inverse_rank_interval"] == (1.0, 1.0)
    assert row["inverse_rank_shuffled"] == pytest.approx(0.5, abs=0.03)
    assert row["top5_shuffled"] == pytest.approx(5 / 8, abs=0.05)


def test_the_command_scores_every_trial(chain, tmp_path) -> None:
    """In table and results; the mean of a person's trials is the main table's rank, nearly."""
    flags = ["--model_path", chain.model, "--data_path", chain.data, "--clip_feature_path",
             chain.features, "--prior_steps", 2, "--permutations", 5, "--device", "cpu",
             "--protocol", "neuralbench", "--output_dir", tmp_path / "s"]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    rows = results["neuralbench"]["rows"]
    people = {row["subject"] for row in results["retrieval"]}
    assert {row["subject"] for row in rows} == {*people, *(["all"] if len(people) > 1 else [])}
    assert {row["queries"] for row in rows if row["level"] == TRIALS} >= {6 * 3}
    assert "## NeuralBench" in (tmp_path / "s" / "table.md").read_text()
    page = tmp_path / "page.html"
    assert report.main(["--runs", str(tmp_path / "s"), "--output", str(page)]) == 0
    assert "As NeuralBench counts" in page.read_text()
    for more in (["--images", str(tmp_path)], ["--control", "shuffled_eeg"]):
        assert evaluate.main([*map(str, flags), *more]) == 2
