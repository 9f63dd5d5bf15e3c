"""benchmarks/alignment.py: flags that exist, scores against oracles, intervals, found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from helpers_benchmarks import loaded

import args
from datafiles.feature_bank import open_bank
from decoder.decoder import Decoder

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "alignment.py"


@pytest.fixture(scope="module")
def benchmark():
    with loaded(SCRIPT) as module:
        yield module


def test_every_variant_is_a_command_and_no_two_are_the_same(benchmark) -> None:
    seen = []
    for variant in benchmark.VARIANTS.values():
        _, command = benchmark.demo.training(Path("O"), 0, benchmark.demo.QUICK, **variant.train)
        values = vars(args.resolve("train", command[1:]).values)
        seen.append((values, variant.sampling, variant.bank, variant.views))
    assert all(one not in seen[:place] for place, one in enumerate(seen))
    assert set(benchmark.chosen_variants(["aligner_", "target"], [])) == {
        benchmark.BASE, "aligner_mlp", "aligner_none", "aligner_mlp_restore_variance",
        "aligner_alone", "aligner_mlp_alone",
        "target_mse_0.1", "target_mse_1.0",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="alginer"):
        benchmark.chosen_variants(["alginer"], [])


@pytest.fixture(scope="module")
def scored(benchmark, chain: Chain, tmp_path_factory):
    """A folder as the benchmark makes it, around the tiny chain; its scores, its file."""
    out = tmp_path_factory.mktemp("alignment")
    (out / "world").mkdir()
    (out / "world" / "data").symlink_to(chain.data)
    (out / "clip_features").symlink_to(chain.features)
    file = out / "scores.json"
    base = benchmark.VARIANTS[benchmark.BASE]
    return out, file, benchmark.score_run(out, chain.model, base, file, 0)


def test_scores_are_those_of_the_predictions(benchmark, chain: Chain, scored) -> None:
    _, _, scores = scored
    decoder, found = Decoder.load(chain.model, "best"), []
    bank = open_bank(chain.features, "test")
    for subject in ("sub-01", "sub-02"):
        data = chain.data
        test = benchmark.open_test(
            benchmark.eeg_file(data, subject, "test"), subject, data, None,
            decoder.reading(subject),
        )  # fmt: skip
        sampling = benchmark.VARIANTS[benchmark.BASE].sampling
        made = decoder.predict(test, range(6), sampling, 0)["image"]
        true = bank.rows_for(test.stimuli)["image"]
        made, true = (decoder.bank.standardise("image", rows) for rows in (made, true))
        first = torch.cosine_similarity(made[:, None], true, dim=2).argmax(dim=1)
        found.append([(first == torch.arange(6)).double(), torch.cosine_similarity(made, true)])
    for place, name in enumerate(("top1_image", "cosine_image")):
        wanted = (found[0][place] + found[1][place]) / 2
        np.testing.assert_allclose(scores["eeg"][name], wanted, rtol=1e-4, atol=1e-5)
    assert scores["eeg"].keys() == scores["shuffled_eeg"].keys() == set(benchmark.SCORES)
    assert scores["eeg"]["cosine_image"] != scores["shuffled_eeg"]["cosine_image"]


def test_scores_are_found_again_unless_the_sampling_changed(
    benchmark, chain: Chain, scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file, scores = scored
    base = benchmark.VARIANTS[benchmark.BASE]

    def refuse(*_) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(benchmark, "scores_of", refuse)
    assert benchmark.score_run(out, chain.model, base, file, 0) == scores
    other = benchmark.VARIANTS["guidance_1"]
    with pytest.raises(AssertionError, match="scored again"):
        benchmark.score_run(out, chain.model, other, file, 0)


def test_intervals_know_that_seeds_differ(benchmark) -> None:
    """Of equal stimuli, the spread is that of the seeds; of equal seeds, that of the stimuli."""
    draw = np.random.default_rng(0)
    by_seed = np.repeat(draw.normal(size=(5, 1)), 50, axis=1)
    by_stimulus = np.repeat(draw.normal(size=(1, 50)), 5, axis=0)
    low, high = benchmark.crossed_interval(by_seed, 0)
    assert low < by_seed.mean() < high and high - low > by_seed[:, 0].std()
    low, high = benchmark.crossed_interval(by_stimulus, 0)
    assert 0.3 < high - low < 0.8  # 4 standard errors of 1 / sqrt(50)


def test_rows_are_compared_with_the_base_by_stimulus(benchmark) -> None:
    own, shuffled = np.random.default_rng(0).normal(size=(2, 40))

    def both_seeds(above: float) -> list[dict[str, dict[str, list[float]]]]:
        parts = {"eeg": own + above, "shuffled_eeg": shuffled}
        of = {part: dict.fromkeys(benchmark.SCORES, rows.tolist()) for part, rows in parts.items()}
        return [of, of]

    found = {benchmark.BASE: both_seeds(0.0), "better": both_seeds(0.1)}
    rows = benchmark.rows_of(found, seed=0)
    better = rows["better/cosine_text"]
    assert better["difference"] == pytest.approx(0.1)
    assert better["control"] == pytest.approx(shuffled.mean())
    assert better["difference_interval"] == pytest.approx((0.1, 0.1))
    assert {"value", "low", "high", "n", "seed", "control"} <= better.keys()
    assert better["n"] == 40 and better["seeds"] == 2 and better["low"] < better["high"]
    assert rows["better/top1_image"]["chance"] == 1 / 40 and better["chance"] == 0
    lines = benchmark.as_markdown(rows).splitlines()
    assert [line.count(" +") for line in lines[2:]] == [0, len(benchmark.SCORES)]
