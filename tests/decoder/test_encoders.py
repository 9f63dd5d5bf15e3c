"""Every encoder behind the one contract: rows, subjects, gradients, sizes, names, files."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import Chain

import args
import evaluate
import generate
import report
import train
import util
from decoder.decoder import OWN, Decoder, check_encoder, make_encoder
from decoder.encoders import Braindecode, Encoder, UnknownEncoder, check_name
from decoder.foundation import EncoderChoice
from loss import Contrast, contrastive_total
from modalities import ENCODERS, NAMES
from rundirs.tensors import load_tensors, save_tensors

SIZES = {"n_channels": 17, "n_times": 100, "n_subjects": 3, "embed_dim": 32}
BRAINDECODE = ("ShallowFBCSPNet", "EEGNet", "ATCNet")
every_encoder = pytest.mark.parametrize("name", [*ENCODERS, *BRAINDECODE])


def encoder_of(name: str, **changes: int) -> Encoder:
    """Freshly made, its subject layer no longer the identity."""
    if name in BRAINDECODE:
        pytest.importorskip("braindecode", reason="optional; its models are tried where it is")
    torch.manual_seed(0)
    encoder = make_encoder(name, SIZES | changes)
    torch.nn.init.normal_(encoder.subject_layer.weight, std=0.1)
    torch.nn.init.normal_(encoder.subject_layer.bias, std=0.1)
    return encoder


def eeg_of(encoder: Encoder, rows: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, encoder.n_channels, encoder.n_times, generator=draw)


# --- the contract -----------------------------------------------------------------------------


@every_encoder
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    encoder, subject = encoder_of(name).eval(), torch.tensor([2, -1, 0, 2, 1])
    eeg = eeg_of(encoder, 5)
    whole = encoder(eeg, subject)
    assert whole.shape == (5, 32) and whole.dtype == torch.float32
    for row in range(5):
        alone = encoder(eeg[row : row + 1], subject[row : row + 1])
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-4, atol=1e-5)


@every_encoder
@torch.no_grad()
def test_each_row_is_read_by_its_own_subject(name: str) -> None:
    encoder = encoder_of(name).eval()
    eeg = eeg_of(encoder, 1).expand(4, -1, -1)
    rows = encoder(eeg, torch.tensor([0, 1, -1, 0]))
    distance = torch.cdist(rows, rows)
    assert distance[0, 3] < 1e-4
    assert min(distance[0, 1], distance[0, 2], distance[1, 2]) > 100 * distance[0, 3] + 1e-3


@every_encoder
def test_gradients_reach_every_parameter(name: str) -> None:
    encoder = encoder_of(name).eval()  # no dropout; batch norm would hide the biases before it
    subject = torch.tensor([0, 1, 2, -1, 0, 1])
    targets = {modality: torch.randn(6, 32) for modality in NAMES}
    embedding = encoder(eeg_of(encoder, 6), subject)
    contrastive_total(
        embedding, targets, encoder.similarity_scale, Contrast(text_contrast=0.01), None
    ).backward()
    dead = [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@every_encoder
@torch.no_grad()
@pytest.mark.parametrize(("channels", "samples"), [(63, 250), (128, 300)])
def test_other_signals_and_widths(name: str, channels: int, samples: int) -> None:
    encoder = encoder_of(name, n_channels=channels, n_times=samples, embed_dim=48).eval()
    embedding = encoder(eeg_of(encoder, 2), torch.tensor([0, -1]))
    assert embedding.shape == (2, encoder.embed_dim) == (2, 48)
    assert embedding.isfinite().all() and (embedding[0] - embedding[1]).norm() > 1e-3


@every_encoder
@pytest.mark.parametrize("shape", [(17, 100), (2, 1, 17, 100), (2, 18, 100), (2, 17, 99)])
def test_wrong_eeg_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 17, 100\]"):
        encoder_of(name)(torch.zeros(shape), torch.zeros(2, dtype=torch.int64))


@every_encoder
def test_wrong_subject_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"subject has shape \(3,\), expected \[2\]"):
        encoder_of(name)(torch.zeros(2, 17, 100), torch.zeros(3, dtype=torch.int64))


@every_encoder
def test_the_scale_of_the_cosines_is_bounded(name: str) -> None:
    encoder = encoder_of(name)
    assert encoder.similarity_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    encoder.logit_scale.data.fill_(10.0)
    assert encoder.similarity_scale.item() == pytest.approx(100.0, rel=1e-5)


@every_encoder
def test_config_rebuilds_the_encoder_and_its_state_fits(name: str) -> None:
    encoder = encoder_of(name).eval()
    torch.manual_seed(9)
    other = type(encoder).from_config(json.loads(json.dumps(encoder.config))).eval()
    assert (other.name, other.config) == (encoder.name, encoder.config) and encoder.name == name
    eeg, subject = eeg_of(encoder, 2), torch.tensor([1, -1])
    assert not torch.equal(other(eeg, subject), encoder(eeg, subject))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(eeg, subject), encoder(eeg, subject))


# --- each of them -----------------------------------------------------------------------------


def size(encoder: Encoder) -> int:
    """Parameters without our subject layer, which no published encoder has."""
    of_subjects = sum(p.numel() for p in encoder.subject_layer.parameters())
    return sum(p.numel() for p in encoder.parameters()) - of_subjects


def test_nice_has_as_many_parameters_as_published() -> None:
    published = {"n_channels": 63, "n_times": 250, "n_subjects": 1, "embed_dim": 1024}
    assert size(make_encoder("NICE", published)) == 2_630_913


def test_eegproject_is_its_formula() -> None:
    encoder = encoder_of("EEGProject").eval()
    eeg = eeg_of(encoder, 3)
    first, residual, norm = encoder.proj_eeg
    with torch.no_grad():
        hidden = encoder.subject_layer(eeg, torch.zeros(3, dtype=torch.int64)).reshape(3, -1)
        hidden = hidden @ first.weight.T + first.bias
        inner = torch.nn.functional.gelu(hidden) @ residual.fn[1].weight.T + residual.fn[1].bias
        expected = torch.nn.functional.layer_norm(hidden + inner, (32,), norm.weight, norm.bias)
        found = encoder(eeg, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found, expected)


def test_too_few_samples_for_nice_are_named() -> None:
    with pytest.raises(ValueError, match="NICE needs at least 75 samples, found 74"):
        make_encoder("NICE", SIZES | {"n_times": 74})


def test_a_braindecode_model_that_cannot_take_the_signal_says_so() -> None:
    pytest.importorskip("braindecode", reason="optional; its models are tried where it is")
    with pytest.raises(ValueError, match="Labram does not take 17 channels x 100 samples"):
        make_encoder("Labram", SIZES)


# --- names ------------------------------------------------------------------------------------


def test_the_flag_knows_the_encoders_that_there_are() -> None:
    assert tuple(OWN) == ENCODERS
    flags = ["--data_path", "D", "--clip_feature_path", "F", "--output_dir", "O"]
    for stage in ("train", "retrieval"):
        options = args.resolve(stage, flags)
        assert options.values.encoder == "ATMS" and "encoder" in options.fixed


@pytest.mark.parametrize("typed", ["EEGproject", "EEGProjekt", "eegproject"])
def test_a_misspelt_encoder_gets_a_suggestion(typed: str) -> None:
    with pytest.raises(util.UserError, match="did you mean EEGProject"):
        check_encoder(EncoderChoice(typed))


def test_without_braindecode_its_models_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "braindecode", None)  # what an absent package looks like
    with pytest.raises(util.UserError, match="pip install braindecode"):
        check_encoder(EncoderChoice("ShallowFBCSPNet"))
    with pytest.raises(UnknownEncoder, match="not installed"):
        Braindecode(**SIZES, model="ShallowFBCSPNet")


def test_braindecode_names() -> None:
    pytest.importorskip("braindecode", reason="optional; its models are tried where it is")
    check_name("EEGNet")
    with pytest.raises(UnknownEncoder, match="ShallowFBCSPNet"):
        check_name("ShallowFBCSPNetv4")
    with pytest.raises(UnknownEncoder, match="n_chans"):
        check_name("InterpolatedBENDR")  # needs electrode positions


# --- files and stages -------------------------------------------------------------------------


def write_model(run, made: Encoder, **header: object) -> None:
    signal = {"channels": ["Oz"], "times": [0.0], "subjects": ["sub-01"]}
    decoder = Decoder(made, None, signal, {"model": "M"})
    path = run / "checkpoints" / "best" / "model.safetensors"
    kept = {key: value for key, value in (decoder.header() | header).items() if value != "absent"}
    save_tensors(path, decoder.state_dict(), kept)


@every_encoder
def test_a_checkpoint_names_its_encoder(name: str, tmp_path) -> None:
    encoder = encoder_of(name).eval()
    write_model(tmp_path, encoder)
    loaded = Decoder.load(tmp_path, "best").encoder
    assert type(loaded) is type(encoder) and loaded.name == name
    eeg, subject = eeg_of(encoder, 2), torch.tensor([2, -1])
    assert torch.equal(loaded(eeg, subject), encoder(eeg, subject))


def test_a_header_without_a_name_is_of_atms(tmp_path) -> None:
    write_model(tmp_path, encoder_of("ATMS"), encoder_name="absent")
    assert Decoder.load(tmp_path, "best").encoder.name == "ATMS"


def test_a_header_with_an_unknown_encoder_is_refused(tmp_path) -> None:
    write_model(tmp_path, encoder_of("NICE"), encoder_name="NICER")
    with pytest.raises(util.DataError, match="encoder NICER") as refused:
        Decoder.load(tmp_path, "best")
    assert "did you mean NICE" in str(refused.value)


def test_a_header_with_unknown_options_is_refused(tmp_path) -> None:
    encoder = encoder_of("EEGProject")
    write_model(tmp_path, encoder, encoder=encoder.config | {"depth": 3})
    with pytest.raises(util.DataError, match="depth"):
        Decoder.load(tmp_path, "best")


def test_from_training_to_the_report(features: Chain, tmp_path) -> None:
    """Every stage takes what the checkpoint names."""
    model, images, scores = (tmp_path / name for name in ("model", "images", "scores"))
    run = ["--encoder", "EEGProject", "--epochs", "1"]
    assert train.main([*features.train_flags(model), *run]) == 0
    _, header = load_tensors(model / "checkpoints" / "best" / "model.safetensors")
    assert header["encoder_name"] == "EEGProject"
    flags = ["--model_path", str(model), "--mode", "fused", "--max_stimuli", "1"]
    assert generate.main([*features.generate_flags(images), *flags]) == 0
    assert len(list(images.glob("*/fused.png"))) == 1
    flags = ["--model_path", str(model), "--occlusion", "time", "--permutations", "20"]
    assert evaluate.main([*features.evaluate_flags(scores), *flags]) == 0
    assert report.main(["--runs", str(model), str(images), str(scores)]) == 0
    assert "EEGProject" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_unknown_name_costs_nothing(
    features: Chain, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = features.train_flags(tmp_path / "model", "--encoder", "ATM", "--data_path", "nowhere")
    assert train.main(flags) == 2
    told = capsys.readouterr().err
    assert "--encoder" in told and "did you mean ATMS" in told


def test_an_encoder_is_not_continued_as_another(
    features: Chain, chain: Chain, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = features.train_flags(tmp_path / "run", "--init_from", chain.model)
    assert train.main([*flags, "--encoder", "EEGProject"]) == 2
    told = capsys.readouterr().err
    assert "--init_from" in told and "ATMS for" in told and "EEGProject for" in told
    assert train.main(features.train_flags(chain.model, "--encoder", "NICE")) == 2
    assert "'ATMS' then, 'NICE' now" in capsys.readouterr().err
