"""A tiny embedded world, taken once through the first two stages by the public commands."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_drawing import five_copies
from helpers_models import single_file
from safetensors.torch import save_file

import clip_feature_extractor
import train
from miniworld import models as miniature
from miniworld.__main__ import main as build_world
from sdxl import sampler
from sdxl.adapter_file import read_ip_adapter
from sdxl.attention import Injector
from sdxl.loading import load_sdxl
from sdxl.weight_files import SDXL_CONFIG


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=100, metavar="N", help="inputs for each reader in test_fuzz.py"
    )


LONG_FILES = (  # minutes each: first, so that no process is left alone with one at the end
    "test_demo.py", "test_slurm.py", "test_flags.py", "test_evaluate.py", "test_browser.py",
    "test_processes.py", "test_fuzz.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@dataclass(frozen=True)
class Chain:
    """Where the stages of the tiny chain left their output."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "world" / "data"

    @property
    def models(self) -> Path:
        return self.root / "world" / "models"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def train_flags(self, out: Path, *extra: object) -> list[str]:
        """A training command on this world; later flags win."""
        flags = [
            "--data_path",
            self.data,
            "--clip_feature_path",
            self.features,
            "--output_dir",
            out,
            "--epochs",
            2,
            "--batch_size",
            16,
            "--val_fraction",
            0.2,
            "--device",
            "cpu",
            *extra,
        ]
        return [str(flag) for flag in flags]

    def generate_flags(self, out: Path, *extra: object) -> list[str]:
        """A drawing command on this world: 64 px, 2 steps."""
        flags = [
            "--eeg_data",
            self.data / "Preprocessed_data_250Hz" / "sub-01",
            "--model_path",
            self.model,
            "--sd_model_path",
            self.models / "sdxl",
            "--output_dir",
            out,
            "--ip_adapter_path",
            self.models / "ip_adapter.safetensors",
            "--mode",
            "all",
            "--size",
            64,
            "--steps",
            2,
            "--max_stimuli",
            2,
            "--prior_steps",
            3,
            "--device",
            "cpu",
            *extra,
        ]
        return [str(flag) for flag in flags]

    def evaluate_flags(self, out: Path, *extra: object) -> list[str]:
        flags = [
            "--data_path",
            self.data,
            "--clip_feature_path",
            self.features,
            "--output_dir",
            out,
            "--prior_steps",
            3,
            "--device",
            "cpu",
            *extra,
        ]
        return [str(flag) for flag in flags]


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The world and its feature bank: 16 x 2 training and 6 test pictures, two simulated people."""
    chain = Chain(tmp_path_factory.mktemp("chain"))
    assert (
        build_world(
            [
                "--output_path",
                str(chain.root / "world"),
                "--training_concepts",
                "16",
                "--images_per_concept",
                "2",
                "--test_concepts",
                "6",
                "--training_repetitions",
                "2",
                "--test_repetitions",
                "3",
                "--weights",
                "random",
            ]
        )
        == 0
    )
    assert (
        clip_feature_extractor.main(
            [
                "--data_path",
                str(chain.data),
                "--output_path",
                str(chain.features),
                "--device",
                "cpu",
                "--clip_model",
                str(chain.models / "miniature-clip.json"),
                "--num_workers",
                "2",
                "--batch_size",
                "8",
                "--clip_pretrained",
                str(chain.models / "miniature-clip.safetensors"),
                "--image_layers",
                "2",
            ]
        )
        == 0
    )
    return chain


@pytest.fixture(scope="session")
def chain(features: Chain) -> Chain:
    """The same with a model trained for two epochs."""
    assert train.main(features.train_flags(features.model)) == 0
    return features


# --- miniatures with random weights, to draw with ----------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return miniature.random_models(tmp_path_factory.mktemp("miniature") / "models", seed=0)


@pytest.fixture(scope="session")
def weights(models):
    return read_ip_adapter(models.ip_adapter, clip_dim=miniature.CLIP_DIM)


@pytest.fixture(scope="session")
def plain(models):
    """The miniature pipeline as loaded."""
    return load_sdxl(models.sdxl, torch.float32, "cpu")


@pytest.fixture(scope="session")
def injected(plain, weights):
    """(pipeline, injector) with our processors."""
    pipe = type(plain)(
        **{**plain.components, "unet": copy.deepcopy(plain.unet)}, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, Injector.install(pipe.unet, weights)


@pytest.fixture(scope="session")
def reference(plain, weights):
    """The pipeline with diffusers' own processors and five copies of the adapter."""
    pipe = type(plain)(
        **{**plain.components, "unet": copy.deepcopy(plain.unet)}, add_watermarker=False
    )
    pipe.unet._load_ip_adapter_weights(five_copies(weights), low_cpu_mem_usage=False)
    return pipe


@pytest.fixture(scope="session")
def prompt(plain):
    return sampler.encode_prompt(plain, "a photo")


@pytest.fixture(scope="session")
def full_unet():
    """SDXL's U-Net without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(SDXL_CONFIG, subfolder="unet")
        )


@pytest.fixture(scope="session")
def checkpoint(plain, models, tmp_path_factory):
    """The miniature as one file in the original layout, and the folder of its configs."""
    folder = tmp_path_factory.mktemp("single")
    tensors = single_file(plain.unet, plain.vae, plain.text_encoder, plain.text_encoder_2)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "mini.safetensors"
    )
    weightless = shutil.ignore_patterns("*.safetensors", "tokenizer*")
    shutil.copytree(models.sdxl, folder / "config", ignore=weightless)
    return folder / "mini.safetensors", folder / "config", tensors
