"""Pre-trained encoders from a folder: electrodes by place, rate, weights, what is learned.

Their weights are random here: what is tested is the way in, which is the same for trained ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Chain

import evaluate
import train
from datafiles.electrodes import positions
from decoder.decoder import Decoder
from decoder.foundation import EncoderChoice, Foundation, read_pretrained
from rundirs.tensors import load_tensors
from util import UserError

OURS = ("Pz", "P3", "P4", "P7", "P8", "PO7", "PO8", "Oz", "O1", "O2")
THEIRS = ("Fz", "Cz", "Pz", "O1", "O2", "Oz")
SMALL = {
    "Labram": {"num_layers": 1, "n_chans": 128},  # its own electrodes, as published
    "CBraMod": {"n_layer": 1, "n_chans": len(THEIRS)},
    "EEGPT": {"depth": 1, "embed_dim": 64, "num_heads": 2},
    "REVE": {"depth": 1, "embed_dim": 64, "heads": 2, "head_dim": 32},  # is told the places
}
RATE_HZ, WINDOW = 200, 200


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """braindecode's models; the positions that REVE fetches are beside, as it has them offline."""
    pytest.importorskip("braindecode", reason="optional; its models are tried where it is")
    from braindecode import models

    (tmp_path / "reve").mkdir()
    known = {name: place.tolist() for name, place in positions([*OURS, *THEIRS]).items()}
    (tmp_path / "reve" / "reve_positions.json").write_text(json.dumps(known), encoding="utf-8")
    monkeypatch.setenv("REVE_POSITIONS_PATH", str(tmp_path / "reve"))
    return models


def saved(models: ModuleType, folder: Path, name: str, **changes: object) -> Path:
    """A freshly initialised model as braindecode saves it."""
    torch.manual_seed(0)
    places = positions(THEIRS)
    told = {} if name == "Labram" else {
        "chs_info": [{"ch_name": one, "kind": "eeg", "loc": places[one]} for one in THEIRS]
    }  # fmt: skip
    sizes = {"n_outputs": 2, "n_times": WINDOW, "sfreq": RATE_HZ, **told, **SMALL[name], **changes}
    getattr(models, name)(**sizes).save_pretrained(folder)
    return folder


def opened(
    name: str, folder: Path, learnt: str = "full", channels=OURS, n_times=150, rate_hz=250.0
) -> Foundation:
    pretrained = read_pretrained(EncoderChoice(name, folder, learnt))
    sizes = {"n_channels": len(channels), "n_times": n_times, "n_subjects": 2, "embed_dim": 32}
    torch.manual_seed(1)
    encoder = Foundation(sizes, name, pretrained.config, learnt, channels, rate_hz)
    encoder.load_pretrained(pretrained.weights)
    return encoder.eval()


EEG = torch.randn(3, len(OURS), 150, generator=torch.Generator().manual_seed(2))
SUBJECT = torch.tensor([0, 1, -1])
every_model = pytest.mark.parametrize("name", [*SMALL])


@every_model
@torch.no_grad()
def test_the_order_of_channels_changes_nothing(models, tmp_path: Path, name: str) -> None:
    folder = saved(models, tmp_path / name, name)
    one = opened(name, folder)
    order = torch.randperm(len(OURS), generator=torch.Generator().manual_seed(3))
    other = opened(name, folder, channels=[OURS[place] for place in order])
    other.load_state_dict(one.state_dict())
    found = one(EEG, SUBJECT)
    torch.testing.assert_close(other(EEG[:, order], SUBJECT), found, rtol=1e-4, atol=1e-5)
    assert (one(EEG[:, order], SUBJECT) - found).abs().max() > 1e-3  # without their places it does


@every_model
@torch.no_grad()
def test_weights_are_those_that_were_saved(models, tmp_path: Path, name: str) -> None:
    folder = saved(models, tmp_path / name, name)
    encoder, (weights, _) = opened(name, folder), load_tensors(folder / "model.safetensors")
    own = encoder.model.state_dict()
    used = [key for key in own if key not in encoder.unused]
    assert used and all(torch.equal(own[key], weights[key]) for key in used)
    moved = {key: value + 0.1 for key, value in weights.items()}
    before = encoder(EEG, SUBJECT)
    encoder.load_pretrained(moved)
    assert (encoder(EEG, SUBJECT) - before).abs().max() > 1e-3
    lost = sorted(used)[0]
    with pytest.raises(ValueError, match="weights lack"):
        encoder.load_pretrained({key: value for key, value in weights.items() if key != lost})


@every_model
@pytest.mark.parametrize("learnt", ["full", "lora", "frozen"])
def test_what_is_learned(models, tmp_path: Path, name: str, learnt: str) -> None:
    if learnt == "lora":
        pytest.importorskip("peft", reason="optional; low-rank changes are tried where it is")
    encoder = opened(name, saved(models, tmp_path / name, name), learnt)
    encoder.train()
    assert encoder.model.training == (learnt != "frozen")
    encoder.eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the second half of a low-rank change moves first
        optimizer.zero_grad()
        (encoder(EEG, SUBJECT).square().mean() * encoder.similarity_scale).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    changed = {key for key, value in encoder.state_dict().items()
               if key.startswith("model.") and not torch.equal(value, before[key])}  # fmt: skip
    if learnt == "frozen":
        assert not changed
    elif learnt == "lora":
        assert changed and all("lora_" in key for key in changed)
    else:
        assert len(changed) > len(encoder.model.state_dict()) / 2


@torch.no_grad()
def test_a_recording_at_the_models_rate_and_electrodes_is_read_as_it_is(
    models, tmp_path: Path
) -> None:
    folder = saved(models, tmp_path / "m", "CBraMod")
    encoder = opened("CBraMod", folder, channels=THEIRS[::-1], n_times=120, rate_hz=200.0)
    eeg = EEG[:, : len(THEIRS), :120]
    padded = torch.nn.functional.pad(eeg.flip(1), (0, WINDOW - 120))
    features = encoder.model(padded, return_features=True)["features"]
    expected = encoder.head(features.flatten(1, -2).mean(dim=1))
    torch.testing.assert_close(encoder(eeg, SUBJECT), expected)


@torch.no_grad()
def test_a_tone_keeps_its_frequency_at_the_models_rate(models, tmp_path: Path) -> None:
    encoder = opened("CBraMod", saved(models, tmp_path / "m", "CBraMod"))
    tone = torch.sin(2 * np.pi * 10 * torch.arange(150) / 250)
    at_rate = tone @ encoder.resample
    expected = torch.sin(2 * np.pi * 10 * torch.arange(WINDOW) / RATE_HZ)
    torch.testing.assert_close(at_rate[10:105], expected[10:105], rtol=0, atol=0.02)
    assert not at_rate[120:].any()


def test_a_training_from_pretrained_weights_is_kept_and_scored(
    models, features: Chain, tmp_path: Path
) -> None:
    folder = saved(models, tmp_path / "m", "CBraMod")
    run = tmp_path / "model"
    words = ("--encoder", "CBraMod", "--encoder_weights", folder, "--encoder_training", "frozen",
             "--noise_draws", 1, "--epochs", 1)  # fmt: skip
    assert train.main(features.train_flags(run, *words)) == 0
    weights, _ = load_tensors(folder / "model.safetensors")
    for part in folder.iterdir():  # the run needs them no more
        part.unlink()
    decoder = Decoder.load(run, "best")
    own = decoder.encoder.model.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in own if "final" not in key)
    assert evaluate.main(features.evaluate_flags(tmp_path / "scores", "--model_path", run)) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_times": None}, "rate and the window"),
        ({"chs_info": None}, "electrodes"),
        ({"n_layer": "many"}, "is not built"),
        ({"activation": "os.system"}, "other code"),
    ],
)
def test_a_folder_that_does_not_say_enough_is_refused(
    models, features: Chain, tmp_path: Path, capsys, changes, told
) -> None:
    folder = saved(models, tmp_path / "m", "CBraMod")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ("--encoder", "CBraMod", "--encoder_weights", folder)
    assert train.main(features.train_flags(tmp_path / "run", *words)) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_pickled_weights_are_not_read(models, tmp_path: Path) -> None:
    folder = saved(models, tmp_path / "m", "CBraMod")
    (folder / "model.safetensors").unlink()  # braindecode writes pytorch_model.bin beside it
    with pytest.raises(UserError, match="no config"):
        read_pretrained(EncoderChoice("CBraMod", folder))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--encoder_weights", "NOWHERE"), "class of braindecode"),
        (("--encoder_training", "lora"), "--encoder_training does nothing"),
        (("--adapt_from", "RUN", "--subjects", "sub-03", "--encoder_weights", "D"), "--encoder_w"),
    ],
)
def test_flags_without_each_other_are_refused(
    features: Chain, tmp_path: Path, capsys, words, told
) -> None:
    assert train.main(features.train_flags(tmp_path / "run", *words)) == 2
    assert told in capsys.readouterr().err
