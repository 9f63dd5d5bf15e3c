"""The injector: what each modality adds to attention, and to what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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

import modalities
import util
from miniworld import models as miniature
from sdxl import injection_map, sampler
from sdxl.attention import InjectedAttention

RECIPES = modalities.recipes("all")


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
    with pytest.raises(util.UserError, match=r"--precision\n.*NaN"):
        drawn(injected, prompt, 1, [1], vectors)
