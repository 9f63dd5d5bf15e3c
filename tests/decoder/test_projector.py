"""CLIP's layers as targets of the contrast: extraction, training, retrieval, refusals."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from conftest import Chain
from PIL import Image

import ATMS_retrieval
import clip_feature_extractor as stage
import dataset
import evaluate
import train
import util
from datafiles.eeg_files import eeg_file
from datafiles.feature_bank import open_bank
from datafiles.stimuli import list_stimuli
from decoder.aligners import Alignment
from decoder.decoder import Decoder, new_encoder
from decoder.projector import LayerMixture, Projector, new_projector, projector_from
from features.clip import Clip, check_layers, load_clip
from loss import Contrast
from metrics import cosine_similarity
from miniworld.models import CLIP_NAME
from modalities import NAMES
from rundirs.files import read_json
from rundirs.tensors import load_tensors
from training.starting import new_decoder

LAYER = "image_layer_2"  # conftest.py keeps it


@pytest.fixture(scope="module")
def projected(features: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layers") / "model"
    words = ("--contrast_layer", 2, "--noise_draws", 1, "--epochs", 1)
    assert train.main(features.train_flags(out, *words)) == 0
    return out


# --- extraction ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_block_of_a_transformer_is_the_mean_over_its_patches(features: Chain):
    clip = load_clip(
        str(features.models / f"{CLIP_NAME}.json"),
        str(features.models / f"{CLIP_NAME}.safetensors"),
        torch.device("cpu"),
    )
    seen: list[torch.Tensor] = []
    block = clip.model.visual.transformer.resblocks[1]
    block.register_forward_hook(lambda _m, _i, out: seen.append(out))
    stimuli = list_stimuli(features.data, "test")
    for stimulus in stimuli:
        clip.encode_pictures(clip.transform(Image.open(stimulus.path).convert("RGB"))[None])
    bank = open_bank(features.features, "test", [LAYER])
    expected = torch.cat([tokens[:, 1:].mean(dim=1) for tokens in seen])  # class token first
    torch.testing.assert_close(bank.rows_for(stimuli)[LAYER], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stage_of_a_resnet_is_the_mean_over_its_map():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(16, {**vision, "patch_size": None}, text).eval()
    crops, seen = torch.randn(2, 3, 32, 32), {}
    parts = ("stem", "layer1", "layer2", "layer3", "layer4")
    for number, name in enumerate(parts, start=1):
        part = model.visual.get_submodule(name) if name != "stem" else model.visual.avgpool
        part.register_forward_hook(lambda _m, _i, out, n=number: seen.update({n: out}))
    model.encode_image(crops)
    found = Clip(model, None, None, {}).encode_layers(crops, [4, 1])
    assert list(found) == ["image_layer_1", "image_layer_4"]
    for number in (1, 4):
        torch.testing.assert_close(found[f"image_layer_{number}"], seen[number].mean(dim=(2, 3)))


def test_layers_beyond_the_last_are_refused(features: Chain, tmp_path: Path, capsys):
    words = [
        "--data_path", features.data, "--output_path", tmp_path / "bank", "--device", "cpu",
        "--clip_model", features.models / f"{CLIP_NAME}.json",
        "--clip_pretrained", features.models / f"{CLIP_NAME}.safetensors", "--image_layers", 6,
    ]  # fmt: skip
    assert stage.main([str(word) for word in words]) == 2
    assert "1 to 3" in capsys.readouterr().err and not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("name", "deepest"), [("ViT-H-14", 32), ("ViT-L-14", 24), ("RN50", 5), ("convnext_base", 0)]
)
def test_how_deep_the_official_models_are(name: str, deepest: int):
    check_layers(name, range(1, deepest + 1))
    with pytest.raises(util.UserError, match="--image_layers"):
        check_layers(name, [deepest + 1])


# --- training -----------------------------------------------------------------------------------


def test_the_projection_is_trained_and_the_priors_keep_the_final_layer(
    features: Chain, projected: Path
):
    data = dataset.open_training(
        dataset.DataChoice(features.data, features.features, "random", 0.2, 0), [LAYER]
    )
    decoder = Decoder.load(projected, "best")
    fresh = new_projector([LAYER], data.targets, data.train_rows, 2, 0)
    assert decoder.layers == (LAYER,) and torch.equal(decoder.projector.mean, fresh.mean)
    assert not torch.equal(decoder.projector.linear.weight, fresh.linear.weight)
    for name in NAMES:
        mean = data.targets[name][data.train_rows].mean(0)
        torch.testing.assert_close(getattr(decoder.bank, f"{name}_mean"), mean)


def test_the_contrast_sees_the_layer_and_nothing_else_of_the_picture(features: Chain):
    """Gradients of the contrast: another layer's features change it, other image targets do not."""
    data = dataset.open_training(
        dataset.DataChoice(features.data, features.features, "random", 0.2, 0), [LAYER]
    )
    encoder = new_encoder(data, 0)
    projector = new_projector([LAYER], data.targets, data.train_rows, 2, 0)
    decoder = Decoder(encoder, None, data.signal, data.clip, projector).eval()
    objective = ATMS_retrieval.ContrastiveObjective(decoder, data, Contrast(text_contrast=0.0))
    batch = next(data.batches(0, 8))

    def contrast(**changed: torch.Tensor) -> float:
        given = dataset.Batch(batch.eeg, batch.subject, batch.stimulus, batch.targets | changed)
        return float(objective.losses(given, torch.Generator())["contrast"].detach())

    flipped = {name: rows.flip(0) for name, rows in batch.targets.items()}
    assert contrast(image=flipped["image"]) == contrast()
    assert contrast(**{LAYER: flipped[LAYER]}) != contrast()


def test_retrieval_compares_with_the_projected_layer(
    features: Chain, projected: Path, tmp_path: Path
):
    flags = features.evaluate_flags(tmp_path / "scores", "--model_path", projected)
    assert evaluate.main(flags) == 0
    results = read_json(tmp_path / "scores" / "results.json")
    assert LAYER in results["protocol"]["encoder"]
    decoder = Decoder.load(projected, "best")
    stimuli = list_stimuli(features.data, "test")
    tensors, _ = load_tensors(features.features / "test.safetensors")
    with torch.no_grad():
        gallery = decoder.projector(tensors[LAYER])
    for subject in ("sub-01", "sub-02"):
        test = dataset.open_test(
            eeg_file(features.data, subject, "test"), subject, features.data, None,
            decoder.reading(subject),
        )  # fmt: skip
        similarity = cosine_similarity(decoder.condition(test, range(len(stimuli))), gallery)
        rank = (similarity >= similarity.diagonal()[:, None]).sum(1)
        (row,) = (
            row
            for row in results["retrieval"]
            if row["subject"] == subject and row["query"] == "encoder -> image"
        )
        assert row["top5"] == pytest.approx(float((rank <= 5).float().mean()))
        assert row["top1"] == pytest.approx(float((rank <= 1).float().mean()))


def test_pre_training_hands_its_projection_on(features: Chain, tmp_path: Path, capsys):
    encoder = tmp_path / "encoder"
    words = features.train_flags(encoder, "--contrast_layer", 2)
    assert ATMS_retrieval.main(words) == 0
    donor = Decoder.load(encoder, "best")
    data = dataset.open_training(
        dataset.DataChoice(features.data, features.features, "random", 0.2, 0), [LAYER]
    )
    decoder = new_decoder(
        data, 1, Alignment("none", False, 0.1, "velocity", None), donor,
        layers=[LAYER],
    )  # fmt: skip
    assert torch.equal(decoder.projector.linear.weight, donor.projector.linear.weight)
    assert train.main(features.train_flags(tmp_path / "other", "--init_from", encoder)) == 2
    assert "--contrast_layer" in capsys.readouterr().err


# --- mixtures -----------------------------------------------------------------------------------


def a_mixture(people: int = 2) -> tuple[LayerMixture, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    features = {name: torch.randn(5, width, generator=draw) for name, width in WIDTHS.items()}
    return new_projector([*WIDTHS], features, torch.arange(5), people, 0), features


WIDTHS = {"image": 4, LAYER: 6, "image_dinov2": 3}


@torch.no_grad()
@pytest.mark.parametrize("place", range(3))
def test_all_weight_on_one_layer_is_that_layer_alone_to_the_bit(place: int):
    mixture, features = a_mixture()
    layer = [*WIDTHS][place]
    alone = new_projector([layer], features, torch.arange(5), 2, 0)
    mixture.logits.copy_(torch.full((2, 3), -torch.inf).index_fill(1, torch.tensor(place), 0.0))
    for person in (0, 1, -1):
        assert torch.equal(
            mixture.seen_by(features, torch.full((5,), person)), alone(features[layer])
        )


@torch.no_grad()
def test_each_person_has_weights_of_their_own_and_a_stranger_the_mean():
    mixture, features = a_mixture()
    mixture.logits.copy_(torch.randn(2, 3))
    own = mixture.logits.softmax(dim=1)
    parts = [one(features[name]) for name, one in zip(WIDTHS, mixture.projectors, strict=True)]
    subject = torch.tensor([0, 1, -1, 1, 0])
    weights = torch.stack([own[0], own[1], own.mean(0), own[1], own[0]])
    expected = sum(weights[:, [i]] * part for i, part in enumerate(parts))
    torch.testing.assert_close(mixture.seen_by(features, subject), expected)
    before = mixture.seen_by(features, torch.full((5,), -1))
    mixture.add_subjects(1)
    torch.testing.assert_close(mixture.seen_by(features, torch.full((5,), 2)), before)
    torch.testing.assert_close(mixture.seen_by(features, subject), expected)


def test_a_mixture_is_trained_kept_and_retrieved_with_each_person_s_weights(
    features: Chain, tmp_path: Path
):
    run = tmp_path / "model"
    words = ("--contrast_layer", 2, "final", "--noise_draws", 1, "--epochs", 1)
    assert train.main(features.train_flags(run, *words)) == 0
    decoder = Decoder.load(run, "best")
    assert decoder.layers == (LAYER, "image") and (decoder.projector.logits != 0).all()
    flags = features.evaluate_flags(tmp_path / "scores", "--model_path", run)
    assert evaluate.main(flags) == 0
    results = read_json(tmp_path / "scores" / "results.json")
    assert f"image, {LAYER}" in results["protocol"]["encoder"]
    assert "person" in results["protocol"]["encoder"]
    tensors, _ = load_tensors(features.features / "test.safetensors")
    with torch.no_grad():  # so far apart that the other person's gallery ranks otherwise
        decoder.projector.logits.copy_(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
    galleries = [decoder.gallery(tensors, decoder.subject_index(f"sub-0{n}")) for n in (1, 2)]
    for gallery, one in zip(galleries, decoder.projector.projectors, strict=True):
        with torch.no_grad():
            alone = one(tensors[one.layer])
        torch.testing.assert_close(gallery, alone, rtol=1e-4, atol=1e-4)


def test_new_people_begin_with_everybody_s_mixture():
    mixture, _ = a_mixture(people=1)
    rebuilt = projector_from(mixture.config)
    rebuilt.load_state_dict(mixture.state_dict())
    rebuilt.add_subjects(2)
    assert rebuilt.config["n_subjects"] == 3 and rebuilt.subject_parameters()[0].shape == (3, 3)
    assert isinstance(projector_from(Projector("image", 4, 4).config), Projector)


# --- refusals -----------------------------------------------------------------------------------


def test_a_bank_without_the_layer_says_how_to_get_it(features: Chain, tmp_path: Path, capsys):
    assert train.main(features.train_flags(tmp_path / "run", "--contrast_layer", 1)) == 1
    error = capsys.readouterr().err
    assert "image_layer_1" in error and "--image_layers" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--contrast_layer", "2", "--target_mse", "0.1"), "--target_mse"),
        (("--contrast_layer", "0"), "--contrast_layer"),
        (("--contrast_layer", "2", "2"), "--contrast_layer 2 2: one of them twice"),
        (("--adapt_from", "RUN", "--subjects", "sub-03", "--aligner", "mlp"), "--aligner"),
        (("--adapt_from", "RUN", "--subjects", "sub-03", "--contrast_layer", "2"), "--contrast"),
    ],
)
def test_flags_that_contradict_each_other(features: Chain, tmp_path: Path, capsys, words, named):
    assert train.main(features.train_flags(tmp_path / "run", *words)) == 2
    assert named in capsys.readouterr().err


def test_a_name_that_the_bank_does_not_know_is_refused(features: Chain, tmp_path: Path, capsys):
    assert train.main(features.train_flags(tmp_path / "run", "--contrast_layer", "dinov2")) == 1
    error = capsys.readouterr().err
    assert "image_dinov2" in error and "--join_features" in error


def test_features_that_do_not_vary_are_refused():
    targets = {"image": torch.randn(4, 3), LAYER: torch.ones(4, 5)}
    with pytest.raises(ValueError, match=LAYER):
        new_projector([LAYER], targets, torch.arange(4), 1, 0)
