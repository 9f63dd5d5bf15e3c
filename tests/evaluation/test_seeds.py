"""Scores over seeds: hand counts, three columns kept apart, no mixing of what differs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ATMS_retrieval
import evaluate
from evaluation.seeds import spread
from rundirs.files import read_csv


def scored(chain, model, out, *more):
    flags = ["--model_path", model, "--data_path", chain.data, "--clip_feature_path",
             chain.features, "--permutations", 3, "--device", "cpu", "--output_dir", out,
             *more]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    return out


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory):
    """{(seed, checkpoint): scores} of two encoders, trained by one command."""
    root = tmp_path_factory.mktemp("seeds")
    flags = ["--data_path", chain.data, "--clip_feature_path", chain.features, "--epochs", 3,
             "--val_fraction", 0.2, "--learning_rate", 3e-3, "--device", "cpu", "--subjects",
             "sub-01", "--output_dir", root / "model", "--seeds", 3, 8]  # fmt: skip
    assert ATMS_retrieval.main([str(flag) for flag in flags]) == 0
    return {
        (seed, checkpoint): scored(chain, root / "model" / f"seed_{seed}",
                                   root / f"{seed}_{checkpoint}", "--checkpoint", checkpoint)
        for seed in (3, 8) for checkpoint in ("best", "latest")
    }  # fmt: skip


def over_seeds(out, *runs):
    return evaluate.main(["--over_seeds", *map(str, runs), "--output_dir", str(out)])


def by_hand(runs, checkpoint, most):
    """Share of ranks up to ``most`` in each seed's file."""
    return [
        np.mean([float(line["rank"]) <= most for line in read_csv(runs[seed, checkpoint]
                                                                  / "ranks.csv")])
        for seed in (3, 8)
    ]  # fmt: skip


def test_the_columns_are_what_is_counted_by_hand(runs, tmp_path, capsys):
    assert over_seeds(tmp_path / "s", *runs.values()) == 0
    page = capsys.readouterr().out
    assert "best on test (not a result)" in page and "NOT a result" in page
    found = json.loads((tmp_path / "s" / "seeds.json").read_text())
    assert found["seeds"] == {"best": [3, 8], "latest": [3, 8]}
    assert len({json.loads((run / "results.json").read_text())["inputs"]["model"]
                for (_, checkpoint), run in runs.items() if checkpoint == "best"}) == 2  # fmt: skip
    rows = {(row["what"], row["score"]): row for row in found["rows"]}
    for name, most in (("top1", 1), ("top5", 5)):
        row = rows["sub-01 encoder -> image", name]
        selected, last = (by_hand(runs, checkpoint, most) for checkpoint in ("best", "latest"))
        for column, values in {
            "selected": selected, "last": last,
            "best_on_test": np.maximum(selected, last).tolist(),
        }.items():  # fmt: skip
            assert row[column]["mean"] == pytest.approx(np.mean(values))
            assert row[column]["sd"] == pytest.approx(np.std(values, ddof=1))
            assert row[column]["seeds"] == 2
        assert row["interval"][0] <= row["selected"]["mean"] <= row["interval"][1]
        assert row["chance"] == pytest.approx(most / 6)


def test_without_the_last_ones_there_is_no_best_on_test(runs, tmp_path):
    assert over_seeds(tmp_path / "s", runs[3, "best"], runs[8, "best"]) == 0
    row = json.loads((tmp_path / "s" / "seeds.json").read_text())["rows"][0]
    assert row["last"] is None and row["best_on_test"] is None


def test_what_is_not_of_one_thing_is_refused(chain, runs, tmp_path, capsys):
    best = runs[3, "best"]
    model = best.parent / "model" / "seed_8"
    shuffled = scored(chain, model, tmp_path / "c", "--control", "shuffled_eeg")
    stranger = scored(chain, model, tmp_path / "d", "--subjects", "sub-02")
    capsys.readouterr()
    for others, told in (
        ([best], "a second time"), ([runs[3, "latest"]], "1 seeds with --checkpoint best"),
        ([shuffled], "other inputs, or under another control"), ([stranger], "other inputs"),
        ([tmp_path / "none"], "no finished run"),
    ):  # fmt: skip
        assert over_seeds(tmp_path / "s", best, *others) in (1, 2)
        assert told in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_seed_given_twice_or_with_other_work_is_refused(capsys):
    for main, given, told in (
        (ATMS_retrieval.main, ["--data_path", "x", "--clip_feature_path", "x", "--output_dir", "x",
                               "--seeds", "1", "1"], "one of them twice"),
        (evaluate.main, ["--over_seeds", "a", "b", "--model_path", "m", "--output_dir", "o"],
         "reads finished runs"),
    ):  # fmt: skip
        assert main(given) == 2
        assert told in capsys.readouterr().err


def test_one_seed_has_no_spread():
    assert spread([]) is None
    assert spread([0.5])["mean"] == 0.5 and np.isnan(spread([0.5])["sd"])
