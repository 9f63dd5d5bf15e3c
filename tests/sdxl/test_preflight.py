"""What a flag names is opened before anything is computed, and told what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Chain
from safetensors.torch import save_file

import generate
import util
from rundirs.tensors import load_tensors, what_lies_there
from sdxl.loading import check_drawing, check_sdxl, load_sdxl
from sdxl.schedulers import set_scheduler
from sdxl.vae import check_vae, load_vae, overflows_half

SDXL = (4, 0.13025)  # latent channels and scaling factor of SDXL-base


def rewritten(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is no weights at all ------------------------------------------------------------------

IMPOSTORS = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a git-annex pointer": b"/annex/objects/MD5E-s1--0.safetensors\n",
    "a web page": b"\n<!DOCTYPE html><html><title>Sign in</title></html>",
    "JSON": b'{"error": "Access denied"}',
    "a pickle": b"PK\x03\x04" + bytes(40),
    "a GGUF file": b"GGUF" + bytes(40),
    "an empty file": b"",
}


@pytest.mark.parametrize("what", IMPOSTORS)
def test_what_lies_in_the_place_of_weights_is_named(tmp_path, what):
    file = tmp_path / "model.safetensors"
    file.write_bytes(IMPOSTORS[what])
    assert what_lies_there(file).startswith(what)
    for check in (lambda: check_sdxl(file), lambda: check_vae(file, *SDXL)):
        with pytest.raises(util.DataError, match=what):
            check()


@pytest.mark.parametrize(
    ("keys", "kind", "cure"),
    [
        (["lora_unet_down_blocks_1.lora_up.weight"], "a LoRA", "fuse_lora"),
        (["unet.down_blocks.1.attn2.to_k.lora_A.weight"], "a LoRA", "fuse_lora"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a diffusers U-Net alone", "unet/"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "without its text encoders", "unet/"),
    ],
)
def test_parts_of_a_model_get_their_name_and_cure(tmp_path, keys, kind, cure):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "part.safetensors")
    with pytest.raises(util.DataError, match=kind) as refused:
        check_sdxl(tmp_path / "part.safetensors")
    assert cure in str(refused.value)


# --- folders ------------------------------------------------------------------------------------

LACKS: dict[str, Callable[[Path], object]] = {
    "no config.json": lambda at: (at / "unet" / "config.json").unlink(),
    "no vocabulary": lambda at: shutil.rmtree(at / "tokenizer_2"),
    "no scheduler_config.json": lambda at: shutil.rmtree(at / "scheduler"),
    "no .safetensors": lambda at: next((at / "text_encoder").glob("*.safetensors")).unlink(),
    "no shard-2.safetensors": lambda at: (
        at / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    ).write_text('{"weight_map": {"a": "shard-2.safetensors"}}'),
    "time_cond_proj_dim 256, of an LCM": lambda at: rewritten(
        at / "unet" / "config.json", time_cond_proj_dim=256
    ),
    "cross_attention_dim 768": lambda at: rewritten(
        at / "unet" / "config.json", cross_attention_dim=768
    ),
    "FlowMatchEulerDiscreteScheduler": lambda at: rewritten(
        at / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
    ),
}


@pytest.mark.parametrize("told", LACKS)
def test_all_parts_of_a_folder_are_looked_at(models, tmp_path, told):
    shutil.copytree(models.sdxl, tmp_path / "sdxl")
    check_drawing(tmp_path / "sdxl", None, None)
    LACKS[told](tmp_path / "sdxl")
    with pytest.raises(util.StageError, match=told):
        check_drawing(tmp_path / "sdxl", None, None)


def test_a_named_scheduler_replaces_one_that_cannot_draw(models, tmp_path):
    """Many folders are saved with PNDM: that matters only where nothing else is named."""
    shutil.copytree(models.sdxl, tmp_path / "sdxl")
    rewritten(
        tmp_path / "sdxl" / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler"
    )
    rewritten(tmp_path / "sdxl" / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    with pytest.raises(util.UserError, match="PNDMScheduler"):
        check_drawing(tmp_path / "sdxl", None, None)
    check_drawing(tmp_path / "sdxl", None, "DDIMScheduler")
    pipe = load_sdxl(tmp_path / "sdxl", torch.float32, "cpu")
    set_scheduler(pipe, "DDIMScheduler", None)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_scaled_float8_is_refused(models, tmp_path, part):
    """Read as it is, attention came out thousands of times too large."""
    shutil.copytree(models.sdxl, tmp_path / "sdxl")
    (file,) = (tmp_path / "sdxl" / part).glob("*.safetensors")
    tensors, _ = load_tensors(file)
    key = next(name for name in tensors if name.endswith(".weight"))
    scale = {key.removesuffix("weight") + "scale_weight": torch.ones(())}
    save_file(tensors | scale, file)
    with pytest.raises(util.DataError, match="scaled to float8"):
        check_sdxl(tmp_path / "sdxl")


# --- single files: what stands beside the weights -----------------------------------------------


def beside(checkpoint, tmp_path: Path, *keys: str) -> Path:
    path = tmp_path / "marked.safetensors"
    whole = {key: tensor.contiguous() for key, tensor in checkpoint[2].items()}
    save_file(whole | {key: torch.ones(1) for key in keys}, path)
    return path


@pytest.mark.parametrize(
    ("key", "told"),
    [("edm_mean", "EDM"), ("edm_vpred.sigma_max", "EDM"), ("scaled_fp8", "float8"),
     ("model.diffusion_model.time_embed.cond_proj.weight", "LCM")],
)  # fmt: skip
def test_markers_without_an_answer_are_refused(checkpoint, tmp_path, key, told):
    with pytest.raises(util.DataError, match=told):
        check_sdxl(beside(checkpoint, tmp_path, key), checkpoint[1])


def test_markers_of_the_prediction_are_honoured(checkpoint, tmp_path):
    config = checkpoint[1]
    plain = load_sdxl(checkpoint[0], torch.float32, "cpu", config=config).scheduler.config
    assert plain.prediction_type == "epsilon"
    file = beside(checkpoint, tmp_path, "v_pred")
    found = load_sdxl(file, torch.float32, "cpu", config=config).scheduler.config
    assert found.prediction_type == "v_prediction" and not found.rescale_betas_zero_snr
    file = beside(checkpoint, tmp_path, "v_pred", "ztsnr")
    found = load_sdxl(file, torch.float32, "cpu", config=config).scheduler.config
    assert found.rescale_betas_zero_snr and found.timestep_spacing == "trailing"


# --- VAEs ---------------------------------------------------------------------------------------


def test_another_vae_has_to_fit_the_latents(models, tmp_path):
    own = json.loads((models.sdxl / "vae" / "config.json").read_text())
    fits = own["latent_channels"], own["scaling_factor"]
    check_vae(models.sdxl / "vae", *fits)
    check_vae(models.sdxl, *fits)
    for change, told in (
        ({"latent_channels": 16}, "16 latent channels, as of Stable Diffusion 3"),
        ({"scaling_factor": 0.18215}, "as of Stable Diffusion 1 and 2"),
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
    ):
        shutil.rmtree(tmp_path / "vae", ignore_errors=True)
        shutil.copytree(models.sdxl / "vae", tmp_path / "vae")
        rewritten(tmp_path / "vae" / "config.json", **change)
        with pytest.raises(util.DataError, match=told):
            check_vae(tmp_path / "vae", 4, 0.13025)


def test_a_vae_file_of_other_latents_is_named(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}, file)
    with pytest.raises(util.DataError, match="16 latent channels"):
        check_vae(file, *SDXL)
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(8, 8)}, file)
    with pytest.raises(util.DataError, match="an IP-Adapter"):
        check_vae(file, *SDXL)
    with pytest.raises(util.DataError, match="nothing is downloaded"):
        check_vae(tmp_path / "none.safetensors", *SDXL)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--vae_path", "nowhere.safetensors", "no such file"),
        ("--scheduler", "PNDMScheduler", "PNDMScheduler"),
        ("--device", "cuda:7", "CUDA device"),
        ("--device", "xpu", "auto, cpu, cuda"),
    ],
)
def test_a_dry_run_sees_it(chain: Chain, tmp_path, capsys, flag, value, told):
    command = chain.generate_flags(tmp_path / "run", "--dry_run", flag, value)
    assert generate.main(command) in (1, 2)
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_vae_file_is_upcast_if_it_overflows_and_only_then(checkpoint, plain, tmp_path):
    """SDXL's own config asks for it, whatever the file: that of the repaired one, too."""
    prefix, config = "first_stage_model.", tmp_path / "config"
    shutil.copytree(checkpoint[1], config)
    rewritten(config / "vae" / "config.json", force_upcast=True)
    own = {k.removeprefix(prefix): v for k, v in checkpoint[2].items() if k.startswith(prefix)}
    for factor, upcast in ((1.0, False), (1e6, True)):
        large = {"decoder.conv_in.weight": factor * own["decoder.conv_in.weight"]}
        whole = {key: tensor.contiguous() for key, tensor in (own | large).items()}
        save_file(whole, tmp_path / "vae.safetensors")
        vae = load_vae(tmp_path / "vae.safetensors", torch.float16, config)
        assert vae.dtype == torch.float16 and vae.config.force_upcast == upcast
        assert overflows_half(vae) == upcast


# --- identity -----------------------------------------------------------------------------------


def test_pictures_belong_to_the_content_of_all_weights(models, tmp_path):
    """Configs and the VAE's weights included: a folder is more than its safetensors files."""
    shutil.copytree(models.sdxl, tmp_path / "sdxl")
    seen = {generate.weights_identity(tmp_path / "sdxl")}
    assert seen == {generate.weights_identity(models.sdxl)}, "content, not place or time"
    rewritten(tmp_path / "sdxl" / "scheduler" / "scheduler_config.json", beta_end=0.013)
    seen.add(generate.weights_identity(tmp_path / "sdxl"))
    (file,) = (tmp_path / "sdxl" / "vae").glob("*.safetensors")
    tensors, _ = load_tensors(file)
    save_file(tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"] + 1}, file)
    seen |= {generate.weights_identity(tmp_path / "sdxl"), generate.weights_identity(file)}
    assert len(seen) == 4 and generate.weights_identity(None) == ""
