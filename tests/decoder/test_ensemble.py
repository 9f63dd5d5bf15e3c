"""Several encoders in one model: their sum, each alone to the bit, subjects, files, a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain

import evaluate
import train
from decoder.decoder import Decoder, make_encoder
from decoder.ensemble import Ensemble
from modalities import ENCODERS

SIZES = {"n_channels": 17, "n_times": 100, "n_subjects": 3, "embed_dim": 32}
NAME = "+".join(ENCODERS)


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    made = make_encoder(NAME, SIZES)
    assert isinstance(made, Ensemble)
    for member in made.members:
        torch.nn.init.normal_(member.subject_layer.weight, std=0.1)
    return made.eval()


EEG = torch.randn(4, 17, 100, generator=torch.Generator().manual_seed(1))
SUBJECT = torch.tensor([0, 1, -1, 2])


@torch.no_grad()
@pytest.mark.parametrize("place", range(len(ENCODERS)))
def test_all_weight_on_one_encoder_is_that_one_to_the_bit(place: int) -> None:
    made = ensemble()
    made.logits.copy_(torch.full((3,), -torch.inf).index_fill(0, torch.tensor(place), 0.0))
    assert torch.equal(made(EEG, SUBJECT), made.members[place](EEG, SUBJECT))


@torch.no_grad()
def test_it_is_the_weighted_sum() -> None:
    made = ensemble()
    made.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    parts = [member(EEG, SUBJECT) for member in made.members]
    weights = made.logits.softmax(dim=0)
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(made(EEG, SUBJECT), expected)


def test_gradients_reach_every_parameter_that_is_trained() -> None:
    made = ensemble()
    (made(EEG, SUBJECT).square().mean() * made.similarity_scale).backward()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert len(dict(made.named_parameters())) - len(trained) == 3  # each one's own scale


@torch.no_grad()
def test_a_new_person_begins_as_somebody_unknown() -> None:
    made = ensemble()
    unknown = made(EEG, torch.full((4,), -1))
    made.add_subjects(1)
    torch.testing.assert_close(made(EEG, torch.full((4,), 3)), unknown)
    again = make_encoder(made.name, made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(EEG, SUBJECT), made(EEG, SUBJECT))
    assert len(made.subject_parameters()) > 3


def test_a_training_of_two_encoders_is_kept_and_scored(features: Chain, tmp_path: Path) -> None:
    run = tmp_path / "model"
    words = ("--encoder", "EEGProject+NICE", "--noise_draws", 1, "--epochs", 1)
    assert train.main(features.train_flags(run, *words)) == 0
    found = Decoder.load(run, "best").encoder
    assert found.name == "EEGProject+NICE" and (found.logits != 0).all()
    assert evaluate.main(features.evaluate_flags(tmp_path / "scores", "--model_path", run)) == 0


@pytest.mark.parametrize("name", ["NICE+NICE", "NICE+", "NICE+ATMZ"])
def test_names_that_are_no_encoders_are_refused(features: Chain, tmp_path: Path, capsys, name):
    assert train.main(features.train_flags(tmp_path / "run", "--encoder", name)) == 2
    assert "--encoder" in capsys.readouterr().err
