"""The original single-file layout of SDXL, written from diffusers modules, on meta tensors too."""

from __future__ import annotations

import re

import torch
from torch import nn

_UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".conv_shortcut.": ".skip_connection.",
}
_VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "downsamplers.0.conv.": "downsample.conv.",
    "upsamplers.0.conv.": "upsample.conv.",
    "conv_shortcut.": "nin_shortcut.",
}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "final_layer_norm.": "ln_final.",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def _renamed(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        key = key.replace(old, new)
    return key


def unet_keys(unet: nn.Module) -> dict[str, torch.Tensor]:
    """``model.diffusion_model.*`` of a diffusers U-Net."""
    per_block = unet.config.layers_per_block + 1

    def place(match: re.Match[str]) -> str:
        way, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        first = block * per_block
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.op."
        if kind == "upsamplers":
            after = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            return f"output_blocks.{first + per_block - 1}.{after}.conv."
        number = first + layer + (way == "down")
        return (
            f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}."
        )

    made = {}
    for key, tensor in unet.state_dict().items():
        new = re.sub(
            r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(?:conv\.(?=\w+$))?",
            place,
            _renamed(key, _UNET),
        )
        if ".resnets." in key:
            new = _renamed(new, _RESNET)
        made[f"model.diffusion_model.{new}"] = tensor
    return made


def vae_keys(vae: nn.Module) -> dict[str, torch.Tensor]:
    """``first_stage_model.*`` of a diffusers AutoencoderKL; attention as 1x1 convolutions."""
    top = len(vae.config.block_out_channels) - 1
    made = {}
    for key, tensor in vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{top - int(m[1])}.block.", key)
        new = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{top - int(m[1])}.", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", new)
        new = _renamed(new, _VAE)
        linear = ".attn_1." in new and tensor.ndim == 2
        made[f"first_stage_model.{new}"] = tensor[:, :, None, None] if linear else tensor
    return made


def text_keys(first: nn.Module, second: nn.Module) -> dict[str, torch.Tensor]:
    """``conditioner.embedders.*``: CLIP-L in transformers' own layout, bigG in open_clip's."""
    made = {}
    for key, tensor in first.state_dict().items():
        made[
            f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"
        ] = tensor
    made["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(
        77
    )[None]
    prefix, state = "conditioner.embedders.1.model.", second.state_dict()
    made[f"{prefix}text_projection"] = state["text_projection.weight"].T.contiguous()
    made[f"{prefix}logit_scale"] = torch.tensor(4.6)
    for key, tensor in state.items():
        new = _renamed(key.removeprefix("text_model."), _OPEN_CLIP)
        if key.endswith(("q_proj.weight", "q_proj.bias")):
            kind = key.rsplit(".", 1)[1]
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[prefix + re.sub(r"self_attn.*", f"attn.in_proj_{kind}", new)] = torch.cat(parts)
        elif not re.search(r"[kv]_proj\.|text_projection", key):
            made[prefix + new] = tensor
    return made


def single_file(
    unet: nn.Module, vae: nn.Module, first: nn.Module, second: nn.Module
) -> dict[str, torch.Tensor]:
    """All tensors of an ``sd_xl_base_1.0.safetensors`` of these modules."""
    return {**unet_keys(unet), **vae_keys(vae), **text_keys(first, second)}
