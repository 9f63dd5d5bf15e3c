"""Networks that score pictures: official files found and checked, features as published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import metrics
from datafiles.pictures import read_pixels
from evaluation import networks, picture_scores
from rundirs.files import sha256
from util import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Four photographs that scikit-image brings, 160 px."""
    from skimage import data

    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        paths.append(folder / f"{name}.png")
        Image.fromarray(getattr(data, name)()).resize((160, 160)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights under the official names and with the official keys, in torch.hub's layout."""
    from torchvision import models

    root = tmp_path_factory.mktemp("weights")
    folder = root / "checkpoints"
    folder.mkdir()
    torch.manual_seed(0)
    modules = {
        "alexnet": models.alexnet(weights=None),
        "inception": models.inception_v3(weights=None, init_weights=False),
        "efficientnet_b1_v2": models.efficientnet_b1(weights=None),
        "efficientnet_b1_v1": models.efficientnet_b1(weights=None),
    }
    for name, module in modules.items():
        torch.save(module.state_dict(), folder / networks.NETWORKS[name].file)
    torch.save(swav_state(), folder / networks.NETWORKS["swav"].file)
    tiny_clip().save(str(folder / networks.NETWORKS["clip"].file))
    torch.save(fid_state(), folder / networks.NETWORKS["fid_inception"].file)
    return root


def swav_state() -> dict[str, torch.Tensor]:
    """SwAV's file: a ResNet-50 trunk below ``module.``, its head and prototypes, no fc."""
    from torchvision.models import resnet50

    trunk = {k: v for k, v in resnet50(weights=None).state_dict().items() if k[:3] != "fc."}
    heads = {
        "projection_head.0.weight": torch.zeros(2048, 2048),
        "projection_head.3.bias": torch.zeros(128),
        "prototypes.weight": torch.zeros(3000, 128),
    }
    return {f"module.{key}": value for key, value in (trunk | heads).items()}


def fid_state() -> dict[str, torch.Tensor]:
    """Random tensors with the keys and shapes of torch-fidelity's Inception."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity

    with pytest.MonkeyPatch.context() as patch:  # read its own keys without its 91 MB download
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        module = fidelity.FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"])
    assert len(module.state_dict()) == 566
    for name, layer in module.named_modules():
        if name.endswith("bn"):
            layer.running_var.fill_(0.1)  # else random layers shrink everything to a constant
    return module.state_dict()


def tiny_clip_model() -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(1)
    vision = CLIPVisionCfg(layers=2, width=64, patch_size=32, image_size=224)
    text = CLIPTextCfg(context_length=8, vocab_size=32, width=64, heads=1, layers=1)
    return CLIP(48, vision, text, quick_gelu=True).eval()


class _Holder(nn.Module):
    """A node of the archive's module tree."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            head, _, rest = key.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_buffer(head, value.detach().clone())
        for name, inner in children.items():
            self.add_module(name, _Holder(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def tiny_clip() -> torch.jit.ScriptModule:
    """A CLIP archive as OpenAI published them, small."""
    return torch.jit.script(_Holder(dict(tiny_clip_model().state_dict())))


@pytest.fixture
def without_hashes(monkeypatch) -> None:
    """Random weights cannot have the published hashes; everything else stays as it is."""
    smaller = {
        name: dataclasses.replace(network, sha256="") if network.file else network
        for name, network in networks.NETWORKS.items()
    }
    monkeypatch.setattr(networks, "NETWORKS", smaller)


def eye_of(name: str, weights: Path | None, protocol: str = "mindeye") -> networks.Eye:
    path = networks.find_weights(name, weights)
    return networks.Eye.load(name, path, protocol, CPU, batch_size=3)


# --- files --------------------------------------------------------------------------------------


def test_official_hashes_are_those_in_the_official_names():
    for network in networks.NETWORKS.values():
        if network.file and network.file not in ("ViT-L-14.pt", "swav_800ep_pretrain.pth.tar"):
            assert len(network.sha256) == 8 and f"-{network.sha256}.pth" in network.file
    assert len(networks.NETWORKS["clip"].sha256) == 64, "an archive of code needs the whole hash"


def test_a_file_with_another_hash_is_refused(weights):
    for name in ("alexnet", "clip"):
        with pytest.raises(DataError) as raised:
            networks.find_weights(name, weights)
        message = str(raised.value)
        assert networks.NETWORKS[name].file in message
        assert networks.NETWORKS[name].source in message and "download it again" in message


def test_the_packaged_network_has_its_published_hash():
    path = networks.find_weights("lite0", None)
    assert sha256(path).startswith(networks.NETWORKS["lite0"].sha256) and len(
        networks.NETWORKS["lite0"].sha256) == 8  # fmt: skip


def test_missing_files_leave_their_scores_out_by_name(tmp_path, weights, without_hashes):
    found, skipped = picture_scores.available("mindeye", None)
    assert set(found) == {"lite0"}
    assert {item["metric"] for item in skipped} == {
        score.label for score in picture_scores.SCORES.values()
        if score.network and score.network["mindeye"] != "lite0"
    }  # fmt: skip
    for item in skipped:
        assert item["file"] and item["source"].startswith("https://")
    # one file is there: only the others are missing
    name = networks.NETWORKS["inception"].file
    (tmp_path / name).write_bytes((weights / "checkpoints" / name).read_bytes())
    found, skipped = picture_scores.available("mindeye", tmp_path)
    assert set(found) == {"lite0", "inception"}
    assert "Inception" not in {item["metric"] for item in skipped}


def test_each_protocol_takes_its_own_efficientnet(weights, without_hashes):
    for protocol, wanted in (("mindeye", "c27df63c"), ("braindiffuser", "bac287d4")):
        found, skipped = picture_scores.available(protocol, weights)
        assert skipped == []
        files = {path.name for name, path in found.items() if name.startswith("efficientnet")}
        assert len(files) == 1 and wanted in files.pop()


def test_torch_fidelity_s_name_of_the_inception_serves_too(tmp_path, weights, without_hashes):
    source = weights / "checkpoints" / networks.NETWORKS["fid_inception"].file
    other = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    other.write_bytes(source.read_bytes())
    assert networks.find_weights("fid_inception", tmp_path) == other


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
@pytest.mark.parametrize("name", ["alexnet", "lpips", "inception", "swav", "fid_inception"])
def test_damaged_and_hostile_files_are_named_not_run(tmp_path, name, content, without_hashes):
    (tmp_path / networks.NETWORKS[name].file).write_bytes(content)
    with pytest.raises(DataError, match="unreadable"):
        eye_of(name, tmp_path)


def test_weights_of_another_network_are_refused(tmp_path, weights, without_hashes):
    other = weights / "checkpoints" / networks.NETWORKS["efficientnet_b1_v2"].file
    for name in ("inception", "swav", "fid_inception"):
        (tmp_path / networks.NETWORKS[name].file).write_bytes(other.read_bytes())
        with pytest.raises(DataError, match="another network"):
            eye_of(name, tmp_path)


# --- features -----------------------------------------------------------------------------------


def normalised(paths: list[Path], px: int, mean, std) -> torch.Tensor:
    tensors = [metrics.prepared(read_pixels(path), px, "mindeye") for path in paths]
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return torch.stack([(tensor - mean) / std for tensor in tensors])


@pytest.mark.parametrize(
    ("name", "px", "layers"),
    [
        ("alexnet", 256, {"2": "features.4", "5": "features.11"}),
        ("inception", 342, {"avgpool": "avgpool"}),
        ("efficientnet_b1_v2", 255, {"avgpool": "avgpool"}),
        ("swav", 224, {"avgpool": "avgpool"}),
    ],
)
def test_torchvision_s_layers_at_the_published_sizes(
    name, px, layers, pictures, weights, without_hashes
):
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    build = {
        "alexnet": models.alexnet,
        "inception": lambda **_: models.inception_v3(
            weights=None, transform_input=True, init_weights=False
        ),
        "efficientnet_b1_v2": models.efficientnet_b1,
        "swav": models.resnet50,
    }[name](weights=None)
    state = torch.load(weights / "checkpoints" / networks.NETWORKS[name].file, weights_only=True)
    missing = build.load_state_dict(
        {key.removeprefix("module."): value for key, value in state.items()}, strict=False
    ).missing_keys
    assert all(key.startswith("fc.") for key in missing)
    extract = create_feature_extractor(build.eval(), list(layers.values()))
    with torch.no_grad():
        expected = extract(normalised(pictures, px, *networks.IMAGENET))
    found = eye_of(name, weights).features(pictures)
    assert set(found) == set(layers)
    for layer, node in layers.items():
        torch.testing.assert_close(found[layer], expected[node].flatten(1), rtol=1e-4, atol=1e-5)


def test_inception_transforms_its_input(pictures, weights, without_hashes):
    """Without transform_input, torchvision's default, the same weights give other features."""
    from torchvision.models import inception_v3

    path = weights / "checkpoints" / networks.NETWORKS["inception"].file
    plain = inception_v3(weights=None, init_weights=False)
    plain.load_state_dict(torch.load(path, weights_only=True))
    plain.fc = nn.Identity()
    with torch.no_grad():
        wrong = plain.eval()(normalised(pictures, 342, *networks.IMAGENET))
    found = eye_of("inception", weights).features(pictures)["avgpool"]
    assert (found - wrong).abs().max() > 1e-3 * wrong.abs().max()


def test_clip_is_read_with_quick_gelu(pictures, weights, without_hashes):
    model = tiny_clip_model().float()
    eye = eye_of("clip", weights)
    with torch.no_grad():
        expected = model.encode_image(normalised(pictures, 224, *networks.CLIP_NORM))
    found = eye.features(pictures)["embedding"]
    # the archive is stored in half precision, as OpenAI's is
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9999
    assert "QuickGELU" in repr(eye.module.module.visual)


def test_fid_s_inception_sees_8_bits_of_the_picture_itself(pictures, weights, without_hashes):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = weights / "checkpoints" / networks.NETWORKS["fid_inception"].file
    theirs = FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], str(path))
    pixels = torch.stack(
        [torch.from_numpy(read_pixels(path).copy()).permute(2, 0, 1) for path in pictures]
    )
    found = eye_of("fid_inception", weights).features(pictures)
    for name, expected in zip(("2048", "logits_unbiased"), theirs(pixels), strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
        assert found[name].std(0).max() > 0, "the pictures are told apart"


def test_lpips_equals_the_libraries(pictures, weights, without_hashes):
    """lpips and torchmetrics read the same trunk from torch.hub's folder, on their own."""
    import lpips
    from torchmetrics.functional.image.lpips import _LPIPS

    eye = eye_of("lpips", weights)
    truth, drawn = pictures, pictures[1:] + pictures[:1]
    found = eye.distances(truth, drawn)
    np.testing.assert_allclose(eye.distances(truth, truth), 0, atol=1e-7)
    np.testing.assert_allclose(found, eye.distances(drawn, truth), rtol=1e-5)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(weights))
    try:
        theirs = {
            "lpips": lpips.LPIPS(net="alex", verbose=False),
            "torchmetrics": _LPIPS(net="alex"),
        }
    finally:
        torch.hub.set_dir(before)
    a, b = (
        torch.stack([metrics.prepared(read_pixels(p), 256, "mindeye") for p in paths])
        for paths in (truth, drawn)
    )
    for module in theirs.values():
        with torch.no_grad():
            expected = module(a, b, normalize=True).flatten()
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def noisy(folder: Path, paths: list[Path], sigma: float) -> list[Path]:
    rng = np.random.default_rng(0)
    made = []
    for path in paths:
        pixels = read_pixels(path) / 255
        pixels = np.clip(pixels + sigma * rng.standard_normal(pixels.shape), 0, 1)
        made.append(folder / f"{sigma}_{path.name}")
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(made[-1])
    return made


def test_the_offline_judge_falls_with_noise(tmp_path):
    """Real ImageNet weights: 48 crops of four photographs, at growing noise."""
    from skimage import data

    crops = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        picture = getattr(data, name)()
        for k in range(12):
            row, column = 40 * (k // 4), 60 * (k % 4)
            crops.append(tmp_path / f"{name}_{k}.png")
            Image.fromarray(picture[row : row + 128, column : column + 128]).save(crops[-1])
    eye = eye_of("lite0", None)
    truth = eye.features(crops)["avgpool"]
    two_way, distance = [], []
    for sigma in (0, 0.05, 0.15, 0.4):
        drawn = eye.features(noisy(tmp_path, crops, sigma))["avgpool"]
        two_way.append(metrics.two_way(truth, drawn).mean())
        distance.append(metrics.correlation_distance(truth, drawn).mean())
    assert two_way == sorted(two_way, reverse=True) and two_way[0] == 1
    assert distance == sorted(distance) and distance[0] == pytest.approx(0, abs=1e-6)
    assert two_way[-1] < 0.9 and distance[-1] > 0.6


# --- the cache of the stimuli's features --------------------------------------------------------


class Counting(nn.Module):
    """A network that counts what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(pixels)
        return {"avgpool": pixels.mean(dim=(2, 3))}


def counting_eye(weights: str = "a", protocol: str = "mindeye") -> networks.Eye:
    return networks.Eye("lite0", weights, protocol, Counting(), CPU, 2)


def test_features_are_computed_once_per_weights_protocol_and_pictures(tmp_path, pictures):
    def computed(eye: networks.Eye, paths: list[Path]) -> int:
        found = networks.cached_features(eye, paths, tmp_path / "cache")["avgpool"]
        torch.testing.assert_close(found, eye.features(paths)["avgpool"])
        return eye.module.seen - len(paths)

    assert computed(counting_eye(), pictures) == 4
    assert computed(counting_eye(), pictures) == 0
    assert computed(counting_eye(weights="b"), pictures) == 4
    assert computed(counting_eye(protocol="braindiffuser"), pictures) == 4
    assert computed(counting_eye(), pictures[::-1]) == 4, "another order is another list"
    changed = tmp_path / pictures[0].name  # the same name, other bytes
    Image.new("RGB", (160, 160), "red").save(changed)
    assert computed(counting_eye(), [changed, *pictures[1:]]) == 4


def test_a_damaged_cache_is_made_again(tmp_path, pictures):
    networks.cached_features(counting_eye(), pictures, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    eye = counting_eye()
    networks.cached_features(eye, pictures, tmp_path)
    assert eye.module.seen == 4
