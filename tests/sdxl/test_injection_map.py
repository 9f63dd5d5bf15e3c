"""Layer-wise injection on miniatures of the real classes, against diffusers' own IP-Adapter."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_drawing import (
    FUSED,
    GUIDANCE,
    NAMES,
    SIZE,
    STEPS,
    adapter_processors,
    difference,
    drawn,
    embeddings,
    predict,
    unet_inputs,
)  # fmt: skip
from helpers_models import single_file, text_keys, unet_keys, vae_keys
from safetensors.torch import save_file

import modalities
import util
from miniworld import models as miniature
from rundirs.tensors import load_tensors
from sdxl import injection_map, sampler
from sdxl.adapter_file import check_ip_adapter, read_ip_adapter
from sdxl.attention import InjectedAttention, Injector, layers_of
from sdxl.loading import check_sdxl, check_sdxl_file, clip_tokenizer, load_sdxl
from sdxl.vae import load_vae
from sdxl.weight_files import SDXL_CONFIG

RECIPES = modalities.recipes("all")


# ---------------------------------------------------------------- sites and layers


@pytest.fixture(scope="module")
def full_unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(SDXL_CONFIG, subfolder="unet")
        )


def test_full_size_unet_has_the_registered_sites_in_official_order(full_unet):
    layers = layers_of(full_unet)
    assert layers == injection_map.sdxl_layers()
    assert Counter(layer.site for layer in layers) == {
        s: a * b for s, (a, b) in modalities.SITES.items()
    }
    names = [name for name in full_unet.attn_processors if "attn2" in name]
    # Key ip_adapter.N counts all processors, self-attention included: 1, 3, ..., 139.
    assert [list(full_unet.attn_processors).index(name) for name in names] == list(range(1, 140, 2))
    hidden = [
        full_unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names
    ]
    assert hidden == [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10
    # ip-adapter_sdxl_vit-h.safetensors: 698 MB in float16.
    projection = 1024 * 8192 + 8192 + 2 * 2048
    assert 2 * (projection + sum(2 * 2048 * width for width in hidden)) == pytest.approx(
        698.4e6, rel=1e-3
    )


def test_other_unets_are_named():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=8)
    with pytest.raises(
        util.UserError, match=r"down\.0, down\.1, down\.2, up\.1, up\.2, up\.3, mid"
    ):
        layers_of(unet)


# ---------------------------------------------------------------- presets and scales


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("preset", ["intent", "uniform", "content_style"])
def test_every_active_modality_is_alive(recipe, preset):
    table = injection_map.scales(recipe, preset)
    assert table.shape == (5, 70) and table.dtype == torch.float32
    for name, row in zip(NAMES, table, strict=True):
        assert bool(row.any()) == (name in recipe.active)
    if recipe.apply_gain:
        total = table.sum(0)
        torch.testing.assert_close(total[total > 0], torch.ones(int((total > 0).sum())))


def test_fused_intent_fills_every_layer_by_gain():
    table = injection_map.scales(FUSED, strength=0.7)
    torch.testing.assert_close(table.sum(0), torch.full((70,), 0.7))
    up1 = [layer.site for layer in injection_map.sdxl_layers()].index("up.1")
    text, image = 0.3 * 0.25, 0.3
    torch.testing.assert_close(
        table[:, up1], 0.7 * torch.tensor([0, 0, 0, text, image]) / (text + image)
    )


def test_separate_takes_the_scales_of_the_map():
    table = injection_map.scales(modalities.recipes("separate")[3], strength=2.0)
    torch.testing.assert_close(table[3], torch.full((70,), 0.5))
    assert not table[[0, 1, 2, 4]].any()


def test_gains_per_row_replace_the_registered_ones():
    gains = torch.tensor([[0.1, 0.1, 0.2, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0, 1.0]])
    table = injection_map.scales(FUSED, gains=gains)
    torch.testing.assert_close(table[0], injection_map.scales(FUSED))
    assert not table[1, :4].any() and set(table[1, 4].tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="gains"):
        injection_map.scales(FUSED, gains=torch.ones(4))


def test_published_preset_shows_its_two_defects():
    table = injection_map.scales(FUSED, "published")
    assert not table[NAMES.index("image")].any()
    assert table.sum(0).max() <= 0.3
    assert not injection_map.scales(modalities.recipes("separate")[4], "published").any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gain": "relative", "sites": {"imagee": {"up.1": 1}}}, "did you mean 'image'"),
        ({"gain": "relative", "sites": {"image": {"up.01": 1}}}, "did you mean 'up.0"),
        ({"gain": "relative", "sites": {"image": {"up.2": 1}}}, "did you mean"),
        ({"gain": "relative", "sites": {"image": {"down.2.1.10": 1}}}, "did you mean 'down.2.1.1'"),
        ({"gain": "both", "sites": {}}, "relative or absolute"),
        ({"gian": "relative", "sites": {}}, "did you mean 'gain'"),
        ({"gain": "relative", "sites": {"image": {"up.1": -1}}}, "a scale >= 0"),
        ({"gain": "relative", "sites": {"image": {"up.1": True}}}, "a scale >= 0"),
        (
            {"gain": "relative", "sites": {"image": {"up.1": 1}}},
            "superpixel_few is injected nowhere",
        ),
        ({"gain": "relative", "sites": ["image"]}, "a mapping"),
        (["image"], "a mapping"),
    ],
)
def test_wrong_presets_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(util.UserError, match=message):
        injection_map.load_injection(str(path))


def test_unknown_presets_and_broken_yaml(tmp_path):
    with pytest.raises(util.UserError, match="did you mean 'uniform'"):
        injection_map.load_injection("unifrom")
    (tmp_path / "broken.yaml").write_text("sites: [", encoding="utf-8")
    with pytest.raises(util.UserError, match="not YAML"):
        injection_map.load_injection(str(tmp_path / "broken.yaml"))


def test_most_specific_key_wins(tmp_path):
    path = tmp_path / "mine.yaml"
    sites = {name: {"mid": 1.0} for name in NAMES}
    sites["image"] = {"down.2": 0.1, "down.2.1": 0.2, "down.2.1.3": 0.3}
    path.write_text(yaml.safe_dump({"gain": "absolute", "sites": sites}), encoding="utf-8")
    made = injection_map.load_injection(str(path))
    found = [
        made.scale("image", injection_map.Layer("down.2", *place))
        for place in ((0, 3), (1, 0), (1, 3))
    ]
    assert found == [0.1, 0.2, 0.3]
    assert made.scale("image", injection_map.Layer("mid", 0, 0)) == 0.0


def test_a_list_gives_every_layer_its_own_scale(tmp_path):
    numbers = [round(0.01 * k, 2) for k in range(70)]
    everywhere = dict.fromkeys(modalities.SITES, 1.0)
    sites = dict.fromkeys(NAMES, everywhere) | {"image": numbers}
    path = tmp_path / "layers.yaml"
    path.write_text(yaml.safe_dump({"gain": "relative", "sites": sites}))
    (recipe,) = (item for item in RECIPES if item.active == ("image",))
    table = injection_map.scales(recipe, injection_map.load_injection(str(path)))
    torch.testing.assert_close(table[NAMES.index("image")], torch.tensor(numbers))
    path.write_text(yaml.safe_dump({"gain": "relative", "sites": sites | {"image": [1.0] * 69}}))
    with pytest.raises(util.UserError, match="69 numbers"):
        injection_map.load_injection(str(path))


def test_a_modality_on_layers_that_a_unet_lacks_is_an_error(tmp_path, injected):
    path = tmp_path / "mine.yaml"
    sites = {name: {"mid": 1.0} for name in NAMES} | {"image": {"mid.0.9": 1.0}}
    path.write_text(yaml.safe_dump({"gain": "relative", "sites": sites}), encoding="utf-8")
    injection_map.scales(FUSED, str(path))
    with pytest.raises(util.UserError, match="image is injected nowhere"):
        injection_map.scales(FUSED, str(path), layers=injected[1].layers)


def diffusers_form(name: str) -> dict:
    """The registry's sites of a modality as diffusers' nested dictionary."""
    form: dict = {"down": {}, "up": {}, "mid": 0.0}
    for site, scale in modalities.get(name).sites.items():
        if site == "mid":
            form["mid"] = scale
        else:
            way, block = site.split(".")
            form[way][f"block_{block}"] = scale
    return form


def test_intent_equals_diffusers_own_expansion(reference, injected):
    reference.set_ip_adapter_scale([diffusers_form(name) for name in NAMES])
    theirs = torch.tensor([processor.scale for processor in adapter_processors(reference)]).T
    separate = modalities.recipes("separate")
    ours = sum(injection_map.scales(recipe, layers=injected[1].layers) for recipe in separate)
    torch.testing.assert_close(ours, theirs)


def test_block_names_of_the_first_implementation_reach_nothing(reference):
    """The bug: diffusers takes names that own no attention without a word."""
    dead = {
        "down": {"block_0": 1.0, "block_3": 1.0},
        "up": {"block_2": 1.0, "block_3": 1.0},
        "mid": 0.0,
    }
    reference.set_ip_adapter_scale([dead] * len(NAMES))
    assert all(
        scale == 0 for processor in adapter_processors(reference) for scale in processor.scale
    )


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("recipe", RECIPES[3:8], ids=lambda recipe: recipe.name)
def test_unet_equals_diffusers_with_five_copies(reference, injected, recipe):
    scale, vectors = injection_map.scales(recipe, layers=injected[1].layers), embeddings(2)
    for layer, processor in enumerate(adapter_processors(reference)):
        processor.scale = scale[:, layer].tolist()
    inputs = unet_inputs(reference.unet, 2)
    added = {
        **inputs["added_cond_kwargs"],
        "image_embeds": [vectors[:, [m]] for m in range(len(NAMES))],
    }
    with torch.no_grad():
        theirs = reference.unet(**{**inputs, "added_cond_kwargs": added}).sample
    ours = predict(injected, vectors, scale.expand(2, -1, -1), inputs)
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0},
        {"cross_attention_norm": "layer_norm", "bias": True, "out_bias": False},
    ],
)
@torch.no_grad()
def test_processor_equals_diffusers(dtype, tolerance, options):
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8, **options).to(dtype)
    theirs = IPAdapterAttnProcessor2_0(32, 24, num_tokens=(4, 4, 4), scale=[0.5, 0.0, 2.0]).to(
        dtype
    )
    ours = InjectedAttention(theirs.to_k_ip[0].weight, theirs.to_v_ip[0].weight, heads=4)
    for index in (1, 2):
        theirs.to_k_ip[index], theirs.to_v_ip[index] = theirs.to_k_ip[0], theirs.to_v_ip[0]
    text, tokens = torch.randn(2, 7, 24).to(dtype), torch.randn(2, 3, 4, 24).to(dtype)
    mask = torch.zeros(2, 1, 7).masked_fill(torch.arange(7) > 4, -1e4).to(dtype)
    ours.set_tokens(tokens, torch.tensor([0.5, 0.0, 2.0]).expand(2, 3))
    for image in (torch.randn(2, 9, 32), torch.randn(2, 32, 3, 3)):
        if image.ndim == 4 and "residual_connection" not in options:
            continue
        image = image.to(dtype)
        wanted = theirs(
            attn, image, (text, [tokens[:, [m]] for m in range(3)]), attention_mask=mask
        )
        found = ours(attn, image, text, attention_mask=mask)
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_without_injection_it_is_the_plain_unet(plain, injected):
    inputs = unet_inputs(plain.unet, 2)
    with torch.no_grad():
        wanted = plain.unet(**inputs).sample
    found = predict(injected, embeddings(2), torch.zeros(2, 5, len(injected[1].layers)), inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_rows_of_a_mixed_batch_equal_single_rows(injected):
    scale = torch.stack(
        [injection_map.scales(recipe, layers=injected[1].layers) for recipe in RECIPES[:6]]
    )
    inputs, vectors = unet_inputs(injected[0].unet, 6), embeddings(6)
    together = predict(injected, vectors, scale, inputs)
    for row in range(6):
        alone = {
            key: value[[row]] if key != "timestep" else value
            for key, value in inputs.items()
            if key != "added_cond_kwargs"
        }
        alone["added_cond_kwargs"] = {k: v[[row]] for k, v in inputs["added_cond_kwargs"].items()}
        single = predict(injected, vectors[[row]], scale[[row]], alone)
        torch.testing.assert_close(single, together[[row]], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("modality", range(5), ids=NAMES)
def test_modality_acts_when_active_and_only_then(injected, modality):
    layers = injected[1].layers
    scale = torch.stack([injection_map.scales(recipe, layers=layers) for recipe in RECIPES[:6]])
    inputs, vectors = unet_inputs(injected[0].unet, 6), embeddings(6)
    changed = vectors.clone()
    changed[:, modality] += 1.0
    before, after = (predict(injected, each, scale, inputs) for each in (vectors, changed))
    moved = (after - before).abs().amax(dim=(1, 2, 3))
    for row, recipe in enumerate(RECIPES[:6]):
        if NAMES[modality] in recipe.active:
            assert moved[row] > 1e-2, recipe.name
        else:
            assert moved[row] == 0, recipe.name


@torch.no_grad()
def test_negative_rows_read_the_projection_of_a_zero_embedding(injected):
    pipe, injector = injected
    scale = injection_map.scales(FUSED, layers=injector.layers).expand(2, -1, -1)
    vectors, inputs = embeddings(2), unet_inputs(pipe.unet, 4)
    injector.set(vectors, scale, guidance=True)
    guided = pipe.unet(**inputs).sample
    explicit = torch.cat([torch.zeros_like(vectors), vectors])
    found = predict(injected, explicit, torch.cat([scale, scale]), inputs)
    torch.testing.assert_close(guided, found)
    assert injector.projection(torch.zeros(1, 5, miniature.CLIP_DIM)).abs().max() > 0.1


def test_one_copy_of_the_adapter(injected, weights, plain):
    pipe = injected[0]
    in_file = sum(tensor.numel() for pair in weights.layers for tensor in pair)
    added = sum(p.numel() for p in pipe.unet.parameters()) - sum(
        p.numel() for p in plain.unet.parameters()
    )
    assert added == in_file
    others = [p for name, p in pipe.unet.attn_processors.items() if "attn1" in name]
    assert not any(isinstance(processor, InjectedAttention) for processor in others)


def test_forgotten_or_mismatched_tokens_are_errors(injected):
    pipe, injector = injected
    injector.clear()
    with pytest.raises(RuntimeError, match="set_tokens was not called, the U-Net has 2"):
        pipe.unet(**unet_inputs(pipe.unet, 2))
    scale = injection_map.scales(FUSED, layers=injector.layers)[None]
    injector.set(embeddings(1), scale, guidance=False)
    with pytest.raises(RuntimeError, match="for 1 rows, the U-Net has 2"):
        pipe.unet(**unet_inputs(pipe.unet, 2))
    for vectors, table in (
        (embeddings(1)[0], scale),
        (embeddings(1), scale[:, :, :3]),
        (embeddings(2), scale),
        (embeddings(1)[..., :5], scale),
    ):
        with pytest.raises(ValueError, match="expected"):
            injector.set(vectors, table, guidance=False)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_picture_does_not_depend_on_its_batch(injected, prompt, scheduler, monkeypatch):
    import diffusers

    pipe = injected[0]
    made = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "scheduler", made)
    state = torch.get_rng_state()
    vectors = embeddings(4)
    together = drawn(injected, prompt, 4, [5, 6, 7, 8], vectors)
    alone = drawn(injected, prompt, 1, [7], vectors[[2]])
    assert together.shape == (4, SIZE, SIZE, 3) and together.dtype == np.uint8
    assert difference(together[2], alone[0]).max() <= 1
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_vary_with_embedding_and_noise_and_only_with_them(injected, prompt):
    same = embeddings(1).expand(2, -1, -1)
    pictures = drawn(injected, prompt, 2, [1, 1], same)
    assert difference(pictures[0], pictures[1]).max() <= 1 and pictures.std() > 10
    other_noise = drawn(injected, prompt, 2, [1, 2], same)
    assert difference(other_noise[0], other_noise[1]).mean() > 1
    for modality in range(len(NAMES)):
        changed = same.clone()
        changed[1, modality] = embeddings(1, seed=1)[0, modality]
        pictures = drawn(injected, prompt, 2, [1, 1], changed)
        assert difference(pictures[0], pictures[1]).mean() > 1, NAMES[modality]


@pytest.mark.parametrize("moments", [False, True])
def test_picture_equals_diffusers_own_pipeline(injected, reference, prompt, moments, monkeypatch):
    """With guidance, so that the negative rows are compared as well; VAEs without and with moments
    of the latents in their config."""
    vae = injected[0].vae
    assert vae is reference.vae
    if moments:
        config = {"latents_mean": [0.5, -1, 0, 2.0], "latents_std": [1, 2, 3, 0.5]}
        frozen = type(vae.config)(dict(vae.config) | config)
        monkeypatch.setattr(vae, "_internal_dict", frozen)
    vectors, scale = embeddings(1), injection_map.scales(FUSED, layers=injected[1].layers)
    for layer, processor in enumerate(adapter_processors(reference)):
        processor.scale = scale[:, layer].tolist()
    latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(3))
    pairs = torch.stack([torch.zeros_like(vectors[0]), vectors[0]])
    theirs = reference(
        prompt_embeds=prompt.text,
        pooled_prompt_embeds=prompt.pooled,
        negative_prompt_embeds=prompt.negative,
        negative_pooled_prompt_embeds=prompt.negative_pooled,
        ip_adapter_image_embeds=[pairs[:, [m]] for m in range(len(NAMES))],
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=SIZE,
        width=SIZE,
        output_type="np",
    ).images
    ours = drawn(injected, prompt, 1, [3], vectors)
    assert difference(ours, (theirs * 255).round()).max() <= 1


def test_without_guidance_rows_are_not_doubled(injected, prompt):
    pipe, rows = injected[0], []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    drawn(injected, prompt, 2, [1, 2], guidance=1.0)
    drawn(injected, prompt, 2, [1, 2])
    hook.remove()
    assert rows == [2] * STEPS + [4] * STEPS


def test_prompts_per_row(injected, plain, prompt):
    two = sampler.encode_prompt(plain, ["a photo", "a red circle"])
    same = embeddings(1).expand(2, -1, -1)
    pictures = drawn(injected, two, 2, [1, 1], same)
    assert difference(pictures[0], drawn(injected, prompt, 2, [1, 1], same)[0]).max() <= 1
    assert difference(pictures[0], pictures[1]).mean() > 1
    assert not two.negative.any()
    assert sampler.encode_prompt(plain, "a photo", "blurry").negative.any()
    with pytest.raises(ValueError, match="2 prompts for 3 rows"):
        drawn(injected, two, 3, [1, 2, 3])
    with pytest.raises(ValueError, match="noise seeds"):
        drawn(injected, prompt, 2, [1])


def test_not_a_number_is_not_drawn(injected, prompt):
    vectors = embeddings(1)
    vectors[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        drawn(injected, prompt, 1, [1], vectors)


# ---------------------------------------------------------------- adapter files


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
        with pytest.raises(util.DataError, match="unreadable"):
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


# ---------------------------------------------------------------- SDXL files


@pytest.fixture(scope="module")
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
    with pytest.raises(util.DataError, match="do not fit"):
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


# ---------------------------------------------------------------- miniatures


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
