"""SDXL files: official names and shapes, every published form, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers_drawing import drawn  # fmt: skip
from helpers_models import text_keys, unet_keys, vae_keys
from safetensors.torch import save_file

import util
from miniworld import models as miniature
from sdxl import sampler
from sdxl.adapter_file import read_ip_adapter
from sdxl.attention import Injector
from sdxl.loading import check_sdxl, check_sdxl_file, clip_tokenizer, load_sdxl
from sdxl.vae import load_vae
from sdxl.weight_files import SDXL_CONFIG


def test_single_file_equals_folder(checkpoint, plain):
    path, config, _ = checkpoint
    pipe = load_sdxl(path, torch.float32, "cpu", config=config)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, folder = getattr(pipe, part).state_dict(), getattr(plain, part).state_dict()
        assert ours.keys() == folder.keys()
        assert all(torch.equal(tensor, folder[key]) for key, tensor in ours.items())
    assert pipe.scheduler.config == plain.scheduler.config
    found, wanted = (sampler.encode_prompt(each, "a photo of a cat") for each in (pipe, plain))
    assert torch.equal(found.text, wanted.text) and torch.equal(found.pooled, wanted.pooled)


def test_two_files_are_enough_with_the_network_cut_off(checkpoint, models, monkeypatch, tmp_path):
    """The single file and the adapter; tokenizers and configs are the project's own."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    path, config, _ = checkpoint
    pipe = load_sdxl(path, torch.float32, "cpu", config=config)
    adapter = read_ip_adapter(models.ip_adapter)
    pair = pipe, Injector.install(pipe.unet, adapter)
    picture = drawn(pair, sampler.encode_prompt(pipe, "a photo"), 1, [1])
    assert picture.std() > 5


def test_a_tiny_vae_loads_from_all_its_layouts(tmp_path):
    """diffusers' folder and file, and TAESDXL's own pair, whose decoder counts one layer more."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny()
    vae.save_pretrained(tmp_path / "folder")
    state = vae.state_dict()
    pair = tmp_path / "pair"
    pair.mkdir()
    for part, shift in (("encoder", 0), ("decoder", 1)):
        moved = {}
        for key, tensor in state.items():
            if key.startswith(part):
                index, rest = key.removeprefix(f"{part}.layers.").split(".", 1)
                moved[f"{int(index) + shift}.{rest}"] = tensor.contiguous()
        save_file(moved, pair / f"taesdxl_{part}.safetensors")
    single = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "folder", pair, single):
        found = load_vae(path, torch.float32).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items()), path
    (pair / "taesdxl_decoder.safetensors").write_bytes(
        (pair / "taesdxl_encoder.safetensors").read_bytes()
    )
    with pytest.raises(util.DataError, match="another tiny autoencoder"):
        load_vae(pair, torch.float32)


def test_folder_of_halves_only(plain, tmp_path):
    plain.save_pretrained(tmp_path, variant="fp16")
    pipe = load_sdxl(tmp_path, torch.bfloat16, "cpu")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(util.DataError, match="no scheduler_config"):
        load_sdxl(tmp_path, torch.bfloat16, "cpu")


def test_vae_from_folder_and_file(checkpoint, models, plain, tmp_path):
    _, config, tensors = checkpoint
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): 2 * v for k, v in tensors.items() if k.startswith(prefix)}
    whole = {key: tensor.contiguous() for key, tensor in vae.items()}
    save_file(whole, tmp_path / "vae.safetensors")
    loaded = load_sdxl(models.sdxl, torch.float32, "cpu", tmp_path / "vae.safetensors", config)
    torch.testing.assert_close(
        loaded.vae.decoder.conv_out.weight, 2 * plain.vae.decoder.conv_out.weight
    )
    loaded = load_sdxl(models.sdxl, torch.bfloat16, "cpu", models.sdxl / "vae")
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.bfloat16}
    with pytest.raises(util.DataError, match="an IP-Adapter"):
        load_sdxl(models.sdxl, torch.float32, "cpu", models.ip_adapter)


def altered(checkpoint, tmp_path: Path, **changes: torch.Tensor | str | None) -> Path:
    tensors = dict(checkpoint[2])
    for prefix, new in changes.items():
        for key in [key for key in tensors if key.startswith(prefix)]:
            value = tensors.pop(key)
            if new is not None:
                tensors[key.replace(prefix, new)] = value
    path = tmp_path / "altered.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "conditioner.embedders.0.transformer.": "cond_stage_model.transformer.",
                "conditioner.embedders.1.": None,
            },
            "Stable Diffusion 1.x",
        ),
        (
            {
                "conditioner.embedders.0.": None,
                "conditioner.embedders.1.model.": "cond_stage_model.model.",
            },
            "Stable Diffusion 2.x",
        ),
        (
            {
                "conditioner.embedders.0.": None,
                "conditioner.embedders.1.": "conditioner.embedders.0.",
            },
            "refiner",
        ),
        ({"conditioner.": None}, "a U-Net without its text encoders"),
        ({"first_stage_model.": None}, "no VAE"),
        ({"model.diffusion_model.middle_block.1.": None}, "15 cross-attention layers"),
    ],
)
def test_other_checkpoints_are_named(checkpoint, tmp_path, changes, message):
    with pytest.raises(util.DataError, match=message):
        check_sdxl_file(altered(checkpoint, tmp_path, **changes), checkpoint[1])


def test_files_that_are_no_sdxl(checkpoint, models, tmp_path):
    path, config, _ = checkpoint
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:100_000])
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "cut.safetensors": "unreadable",
        tmp_path / "model.ckpt": "can run code",
        tmp_path / "empty": "without model_index",
        tmp_path / "none": "nothing is downloaded",
        models.ip_adapter: "an IP-Adapter",
        models.clip_checkpoint: "an open_clip model",
    }
    for each, message in cases.items():
        with pytest.raises(util.DataError, match=message):
            check_sdxl(each, config)
    with pytest.raises(util.DataError, match="70 layers of 2048 columns"):
        check_sdxl(path)  # the miniature is not SDXL-base
    check_sdxl(path, config)
    check_sdxl(models.sdxl)


def test_incomplete_models_are_refused(checkpoint, models, tmp_path):
    lacks = {
        "model.diffusion_model.out.2.": "do not fit",
        "conditioner.embedders.1.model.ln_final.": "no text_encoder_2 weights",
    }
    for prefix, message in lacks.items():
        lacking = altered(checkpoint, tmp_path, **{prefix: None})
        with pytest.raises(util.DataError, match=message):
            load_sdxl(lacking, torch.float32, "cpu", config=checkpoint[1])
    folder = tmp_path / "folder"
    shutil.copytree(models.sdxl, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(util.DataError, match=r"no \.safetensors"):
        check_sdxl(folder)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8"
    )
    with pytest.raises(util.DataError, match="a FluxPipeline"):
        check_sdxl(folder)


def test_full_size_checkpoint_converts_key_by_key(full_unet):
    """Every tensor of a full-size file is used, and every parameter filled."""
    from diffusers import AutoencoderKL
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIG, subfolder="vae"))
        first, second = (
            kind(CLIPTextConfig.from_pretrained(SDXL_CONFIG, subfolder=folder))
            for kind, folder in (
                (CLIPTextModel, "text_encoder"),
                (CLIPTextModelWithProjection, "text_encoder_2"),
            )
        )
    sizes = [
        sum(p.numel() for p in module.parameters()) for module in (full_unet, vae, first, second)
    ]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]  # as published
    unet, autoencoder, text = unet_keys(full_unet), vae_keys(vae), text_keys(first, second)
    assert len(unet) == 1680 and len(autoencoder) == 248
    assert unet["model.diffusion_model.output_blocks.5.2.conv.weight"].shape == (640, 640, 3, 3)
    assert text[
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"
    ].shape == (3840, 1280)

    def same(module, made):
        wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert {key: tensor.shape for key, tensor in made.items()} == wanted

    same(full_unet, convert.convert_ldm_unet_checkpoint(unet, dict(full_unet.config)))
    same(vae, convert.convert_ldm_vae_checkpoint(autoencoder, dict(vae.config)))
    same(
        second,
        convert.convert_open_clip_checkpoint(second, text, prefix="conditioner.embedders.1.model."),
    )
    made = convert.convert_ldm_clip_checkpoint(text)
    made.pop("text_model.embeddings.position_ids")
    same(first, {key.removeprefix("text_model."): tensor for key, tensor in made.items()})


CAPTIONS = [
    "",
    "a photo of a cat",
    "An aardvark, standing in the grass - it's 12 years old (or 13).",
    "  two   spaces\nand a line ",
    "café naïve Über",
    "aircraft_carrier",
]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokenizers_equal_open_clips(pad):
    import open_clip

    tokens = clip_tokenizer(pad)(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    )
    wanted = open_clip.tokenizer.tokenize(CAPTIONS)
    after = torch.cummax((wanted == 49407).int(), dim=1).values.roll(1, dims=1)
    after[:, 0] = 0
    wanted = torch.where(after.bool(), 0 if pad == "!" else 49407, wanted)
    assert torch.equal(tokens.input_ids, wanted)
    long = clip_tokenizer(pad)("word " * 100, padding="max_length", truncation=True).input_ids
    assert long == open_clip.tokenizer.tokenize("word " * 100)[0].tolist()


def test_miniature_clip_loads_as_a_named_model(models):
    import open_clip

    open_clip.add_model_config(models.clip_config)
    model, _, transform = open_clip.create_model_and_transforms(
        miniature.CLIP_NAME, pretrained=str(models.clip_checkpoint)
    )
    from PIL import Image

    picture = transform(Image.new("RGB", (128, 128), (200, 30, 30)))[None]
    assert model.encode_image(picture).shape == (1, miniature.CLIP_DIM)
    assert model.encode_text(open_clip.tokenizer.tokenize(["a red square"])).shape == (
        1,
        miniature.CLIP_DIM,
    )


def test_miniatures_are_made_once_and_from_the_seed(models, tmp_path, plain):
    made = models.ip_adapter.stat().st_mtime_ns
    assert miniature.random_models(models.sdxl.parent, seed=0) == models
    assert models.ip_adapter.stat().st_mtime_ns == made
    again = miniature.random_models(tmp_path / "again", seed=0)
    unet = load_sdxl(again.sdxl, torch.float32, "cpu").unet
    assert all(torch.equal(t, unet.state_dict()[k]) for k, t in plain.unet.state_dict().items())
    sizes = [sum(p.numel() for p in part.parameters()) for part in (plain.unet, plain.vae)]
    assert sizes[0] < 8e6 and sizes[1] < 1.5e6
