"""Retrieval by the number of repetitions averaged: all of them are the main score, one is less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain

import evaluate
from datafiles.averaging import SingleTrials
from datafiles.eeg_files import Recording, Signal
from dataset import TestEEG
from evaluation import repetitions
from rundirs.files import read_json
from util import UserError

WORLD = 3  # repetitions in the tiny world
STIMULI, REPETITIONS, CHANNELS, SAMPLES = 40, 8, 4, 10


class Reader:
    """A stand-in for an encoder that cannot be better or worse: the EEG is the embedding."""

    def condition(self, test: TestEEG, rows: range) -> torch.Tensor:
        return test.eeg[list(rows)].flatten(1)


def noisy(seed: int = 0) -> tuple[TestEEG, torch.Tensor]:
    """A recording of a pattern for each stimulus under noise, and the patterns [N, D]."""
    random = np.random.default_rng(seed)
    patterns = random.standard_normal((STIMULI, 1, CHANNELS, SAMPLES))
    noise = 4 * random.standard_normal((STIMULI, REPETITIONS, CHANNELS, SAMPLES))
    eeg = (patterns + noise).astype(np.float32)
    names, times = list("abcd"), [i / 100 for i in range(SAMPLES)]
    recording = Recording(eeg, names, times, "", Path("noisy.npy"))
    trials = SingleTrials(recording, Signal(names, times, list(range(CHANNELS)), 0))
    whole = torch.from_numpy(eeg.mean(axis=1))
    test = TestEEG(whole, "sub-01", None, "", Path("noisy.npy"), trials)
    return test, torch.from_numpy(patterns).float().flatten(1)


def row(test: TestEEG, gallery: torch.Tensor, count: int, control: str | None = None) -> dict:
    return repetitions.repetition_row(Reader(), test, gallery, count, control, 0, 20)


def test_groups_share_no_trial_and_all_of_them_are_the_average() -> None:
    test, _ = noisy()
    for count in (1, 2, 3, REPETITIONS):
        groups = list(repetitions.dealt(test, count, 0))
        assert len(groups) == REPETITIONS // count
    torch.testing.assert_close(groups[0].eeg, test.eeg)
    singles = torch.stack([group.eeg for group in repetitions.dealt(test, 1, 0)])
    found = singles.sort(dim=0).values  # each stimulus' own eight trials, in another order
    stored = torch.from_numpy(np.sort(np.moveaxis(test.trials.recording.eeg, 1, 0), axis=0))
    torch.testing.assert_close(found, stored)


def test_more_repetitions_find_more_and_shuffled_eeg_finds_nothing() -> None:
    test, gallery = noisy()
    rows = [row(test, gallery, count) for count in (1, 2, 4, 8)]
    scores = [found["top1"] for found in rows]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.2
    assert [found["groups"] for found in rows] == [8, 4, 2, 1]
    assert rows[0]["median_rank"] > rows[-1]["median_rank"]
    for found in rows:
        low, high = found["top1_interval"]
        assert low <= found["top1"] <= high
        assert found["top1_shuffled"] < 2.5 * found["top1_chance"] == 2.5 / STIMULI
    assert row(test, gallery, 8, "shuffled_eeg")["top1"] < 0.1


def test_more_than_there_are_is_refused() -> None:
    test, _ = noisy()
    repetitions.check_average(test, [1, REPETITIONS])
    with pytest.raises(UserError, match=f"{REPETITIONS} repetitions"):
        repetitions.check_average(test, [1, REPETITIONS + 1])
    with pytest.raises(UserError, match="1 repetitions"):
        repetitions.check_average(replace(test, trials=None), [2])


def test_all_repetitions_of_a_run_score_as_its_main_row(chain: Chain, tmp_path: Path) -> None:
    command = (
        "--model_path", chain.model, "--data_path", chain.data, "--device", "cpu",
        "--clip_feature_path", chain.features, "--prior_steps", 2, "--permutations", 5,
    )  # fmt: skip
    call = [str(word) for word in command]
    call += ["--average", "1"]
    assert evaluate.main([*call, str(WORLD), "--output_dir", str(tmp_path / "a")]) == 0
    results = read_json(tmp_path / "a" / "results.json")
    main = {r["subject"]: r for r in results["retrieval"] if r["query"] == "encoder -> image"}
    rows = results["repetitions"]["rows"]
    found = [(found["subject"], found["repetitions"]) for found in rows]
    assert found == [(subject, count) for subject in main for count in (1, WORLD)]
    for found in rows:
        if found["repetitions"] == WORLD:
            for key in ("top1", "top5", "top1_interval"):
                assert found[key] == pytest.approx(main[found["subject"]][key])
    assert "## Repetitions averaged" in (tmp_path / "a" / "table.md").read_text()
    assert evaluate.main([*call, str(WORLD + 1), "--output_dir", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()
    bad = ["--control", "mean_embedding", "--output_dir", str(tmp_path / "c")]
    assert evaluate.main([*call, *bad]) == 2
