"""Controls say nothing about the stimulus, or everything, and never pass for a decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import args
import evaluate
import generate
from datafiles.eeg_files import locate_test_eeg
from datafiles.feature_bank import open_bank
from dataset import TestEEG, open_test
from decoder import controls
from decoder.controls import Prediction
from decoder.decoder import Decoder
from modalities import CONTROLS, NAMES
from rundirs.files import read_json, read_jsonl
from unet import Sampling


@pytest.fixture(scope="module")
def opened(chain: Chain) -> tuple[Decoder, TestEEG]:
    decoder = Decoder.load(chain.model, "best")
    eeg = chain.data / "Preprocessed_data_250Hz" / "sub-01"
    file, subject, data = locate_test_eeg(eeg, None, None)
    return decoder, open_test(file, subject, data, None, decoder.reading(subject))


def predicted(chain: Chain, opened, control: str | None, seed: int = 0) -> dict[str, torch.Tensor]:
    decoder, test = opened
    rows = range(len(test.eeg))
    how = Prediction(3, 1.0, "ddim", seed, control=control, clip_feature_path=chain.features)
    return controls.predict_embeddings(decoder, test, rows, how)


def test_shuffling_leaves_nobody_their_own_eeg(opened) -> None:
    test = opened[1]
    for seed in range(20):
        eeg = controlled = controls.controlled_eeg(test, "shuffled_eeg", seed).eeg
        same = (controlled[:, None] == test.eeg[None]).flatten(2).all(dim=2)
        assert not same.diagonal().any()
        assert same.sum(dim=0).tolist() == same.sum(dim=1).tolist() == [1] * len(eeg)
    one, two = (controls.controlled_eeg(test, "shuffled_eeg", seed).eeg for seed in (0, 1))
    assert not torch.equal(one, two)


def test_noise_has_the_scale_of_the_eeg_and_nothing_of_it(opened) -> None:
    test = opened[1]
    noise = controls.controlled_eeg(test, "noise_eeg", 0).eeg
    assert torch.allclose(noise.std(dim=(0, 2)), test.eeg.std(dim=(0, 2)), rtol=0.15)
    found = np.corrcoef(noise.flatten().numpy(), test.eeg.flatten().numpy())[0, 1]
    assert abs(found) < 4 / np.sqrt(noise.numel())


def test_no_control_is_the_decoder_itself(chain: Chain, opened) -> None:
    decoder, test = opened
    expected = decoder.predict(test, range(len(test.eeg)), Sampling(3, 1.0, "ddim"), 0)
    assert all(torch.equal(rows, expected[name]) for name, rows in
               predicted(chain, opened, None).items())  # fmt: skip


@pytest.mark.parametrize("control", ["shuffled_eeg", "noise_eeg"])
def test_eeg_controls_change_every_prediction(chain: Chain, opened, control: str) -> None:
    real, other = predicted(chain, opened, None), predicted(chain, opened, control)
    for name in NAMES:
        assert (real[name] - other[name]).abs().amax(dim=1).min() > 0, name


def test_the_ceiling_is_the_stimulus_own_embedding(chain: Chain, opened) -> None:
    bank = open_bank(chain.features, "test")
    found = predicted(chain, opened, "true_embedding")
    for row, stimulus in enumerate(opened[1].ids):
        place = bank.ids.index(stimulus)
        assert all(torch.equal(found[name][row], bank.features[name][place]) for name in NAMES)


def test_the_mean_embedding_is_of_training_pictures(chain: Chain, opened) -> None:
    bank = open_bank(chain.features, "training")
    for name, rows in predicted(chain, opened, "mean_embedding").items():
        assert torch.equal(rows, bank.features[name].mean(dim=0).expand(len(rows), -1))


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
def test_embedding_controls_ask_for_the_bank(stage: str, chain: Chain, tmp_path, capsys) -> None:
    flags = {
        "generate": chain.generate_flags(tmp_path / "run"),
        "evaluate": ["--data_path", "D", "--output_dir", "O", "--images", "I"],
    }[stage]
    with pytest.raises(SystemExit):
        args.resolve(stage, [*flags, "--control", "true_embedding"])
    assert "--clip_feature_path" in capsys.readouterr().err


def test_a_control_is_marked_in_every_output(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--mode", "fused", "--control", "shuffled_eeg")
    assert generate.main(chain.generate_flags(run, *more)) == 0
    assert {record["control"] for record in read_jsonl(run / "images.jsonl")} == {"shuffled_eeg"}
    drawn = list(run.glob("*/*.png"))
    assert drawn and all("shuffled_eeg" in path.name for path in drawn)
    for path in run.glob("*/fused*.png"):
        assert CONTROLS["shuffled_eeg"] in Image.open(path).text["Comment"]
    assert evaluate.main(chain.evaluate_flags(tmp_path / "scores", "--images", run)) == 0
    assert CONTROLS["shuffled_eeg"] in (tmp_path / "scores" / "table.md").read_text()


def test_the_ceiling_finds_every_stimulus(chain: Chain, tmp_path: Path) -> None:
    """evaluate.py --control true_embedding: each prior's gallery holds its query."""
    more = ("--model_path", chain.model, "--control", "true_embedding")
    assert evaluate.main(chain.evaluate_flags(tmp_path / "scores", *map(str, more))) == 0
    results = read_json(tmp_path / "scores" / "results.json")
    queries = {*(f"prior {name}" for name in NAMES), "fused priors"}
    assert {row["query"] for row in results["retrieval"]} == queries
    assert all(row["top1"] == 1.0 for row in results["retrieval"])
    assert CONTROLS["true_embedding"] in (tmp_path / "scores" / "table.md").read_text()
