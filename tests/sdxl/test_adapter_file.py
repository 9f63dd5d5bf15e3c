"""IP-Adapter files: official names and shapes, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import util
from miniworld import models as miniature
from rundirs.tensors import load_tensors
from sdxl.adapter_file import check_ip_adapter, read_ip_adapter
from sdxl.attention import Injector


def adapter_tensors(models) -> dict[str, torch.Tensor]:
    return load_tensors(models.ip_adapter)[0]


def test_bin_layout_gives_the_same_weights(models, weights, tmp_path):
    nested: dict = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter_tensors(models).items():
        part, rest = key.split(".", 1)
        nested[part][rest] = tensor
    torch.save(nested, tmp_path / "ip.bin")
    read = read_ip_adapter(tmp_path / "ip.bin", clip_dim=miniature.CLIP_DIM)
    assert (
        (read.clip_dim, read.width, read.tokens)
        == (64, 96, 4)
        == (weights.clip_dim, weights.width, 4)
    )
    for ours, theirs in zip(read.layers, weights.layers, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_proj.latents": (1, 16, 8)}, "IP-Adapter Plus"),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, "FaceID Plus"),
        ({"image_proj.proj.3.weight": (8,)}, "Full Face"),
        ({"image_proj.proj.0.weight": (8, 512)}, "FaceID"),
        ({"image_proj.proj.weight": (384, 1280)}, "ViT-bigG"),
        ({"image_proj.proj.weight": (384, 32)}, "for 32-d CLIP vectors"),
        (
            {"image_proj.proj.weight": (3072, 1024), "image_proj.norm.weight": (768,)},
            "Diffusion 1.5",
        ),
        ({"image_proj.norm.bias": None}, "without image_proj.norm.bias"),
        ({"ip_adapter.3.to_v_ip.weight": None}, "ip_adapter.3.to_v_ip.weight"),
        ({"ip_adapter.5.to_k_ip.weight": (64, 95)}, "does not read 96"),
    ],
)
def test_other_adapters_are_named(models, tmp_path, changes, message):
    tensors = adapter_tensors(models)
    for key, shape in changes.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.zeros(shape)
    save_file(tensors, tmp_path / "ip.safetensors")
    with pytest.raises(util.DataError, match=message):
        read_ip_adapter(tmp_path / "ip.safetensors", clip_dim=miniature.CLIP_DIM)


def test_damaged_and_foreign_files_as_adapter(models, tmp_path):
    whole = models.ip_adapter.read_bytes()
    broken = {
        "cut.safetensors": whole[:-1000],
        "short.safetensors": whole[:50],
        "empty.safetensors": b"",
        "cut.bin": whole[:999],
        "empty.bin": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(util.DataError, match=r"unreadable|an empty file"):
            check_ip_adapter(tmp_path / name)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8"
    )
    with pytest.raises(util.DataError, match="git-lfs pointer"):
        check_ip_adapter(pointer)
    with pytest.raises(util.DataError, match="an open_clip model"):
        check_ip_adapter(models.clip_checkpoint)
    for name in ("none.safetensors", "none.bin"):
        with pytest.raises(util.DataError, match="no such file"):
            check_ip_adapter(tmp_path / name)


def test_adapter_of_another_unet_is_refused(models, plain, tmp_path):
    tensors = {key: tensor for key, tensor in adapter_tensors(models).items() if ".33." not in key}
    save_file(tensors, tmp_path / "ip.safetensors")
    with pytest.raises(util.DataError, match="16 layers, number 16"):
        Injector.install(copy.deepcopy(plain.unet), read_ip_adapter(tmp_path / "ip.safetensors"))


# --- other layouts of the same weights ----------------------------------------------------------


def as_trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As accelerate saves IP-Adapter's training: the frozen U-Net is in it, too."""
    names = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    trained = {
        key.replace(old, new): tensor
        for key, tensor in tensors.items()
        for old, new in names.items()
        if key.startswith(old)
    }
    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight"
    return trained | {unet: torch.zeros(4, 4)}


def as_one_process_of_many(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": tensor for key, tensor in as_trained(tensors).items()}


LAYOUTS = {"flat": dict, "trained": as_trained, "wrapped": as_one_process_of_many}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["a.bin", "a.pt", "a.safetensors", "run/pytorch_model.bin",
                                   "run/model.safetensors"])  # fmt: skip
def test_flat_and_trained_layouts_load(models, weights, tmp_path, layout, place):
    tensors = LAYOUTS[layout](adapter_tensors(models))
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    named = file.parent if file.parent.name == "run" else file
    check_ip_adapter(named, miniature.CLIP_DIM)
    read = read_ip_adapter(named, miniature.CLIP_DIM)
    assert len(read.layers) == len(weights.layers) and read.path == file
    for ours, theirs in zip(read.layers, weights.layers, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.equal(read.projection["proj.weight"], weights.projection["proj.weight"])


def test_a_folder_of_several_or_none_is_refused(models, tmp_path):
    with pytest.raises(util.DataError, match="no file of weights"):
        check_ip_adapter(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(adapter_tensors(models), tmp_path / name)
    with pytest.raises(util.DataError, match=r"a\.safetensors, b\.safetensors"):
        check_ip_adapter(tmp_path)
