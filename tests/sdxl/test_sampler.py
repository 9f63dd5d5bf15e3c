"""Denoising: guidance intervals, starts, schedulers, compiled and offloaded U-Nets, batch sizes."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers_drawing import (
    FUSED,
    NAMES,
    SIZE,
    adapter_processors,
    difference,
    drawn,
    embeddings,
    five_copies,
)  # fmt: skip

import modalities
import util
from generation import renderer as renderer_module
from generation.renderer import Renderer, fitting_batch
from sdxl import injection_map, memory, sampler
from sdxl.adapter_file import IPAdapterWeights
from sdxl.attention import Injector, _cross_attention
from sdxl.memory import largest_batch, memory_limit, peak_memory
from sdxl.schedulers import (
    SCHEDULERS,
    _training_levels,
    check_not_finite,
    noise_levels,
    set_scheduler,
)
from sdxl.weight_files import SDXL_CONFIG

STEPS = 4


# --- guidance in an interval --------------------------------------------------------------------


def rows_seen(injected, prompt, **how) -> tuple[list[int], np.ndarray]:
    """(rows that the U-Net got at each step, the picture)."""
    rows = []
    hook = injected[0].unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    picture = drawn(injected, prompt, 1, [1], steps=STEPS, **how)
    hook.remove()
    return rows, picture


def test_guidance_acts_in_its_interval_only_and_saves_the_negative_rows(injected, prompt):
    everywhere, full = rows_seen(injected, prompt)
    assert everywhere == [2] * STEPS
    late, picture = rows_seen(injected, prompt, guidance_interval=(0.0, 0.6))
    assert late == [1, 2, 2, 2], "of noise levels .75, .5, .25 and 0"
    early, _ = rows_seen(injected, prompt, guidance_interval=(0.6, 1.0))
    assert early == [2, 1, 1, 1]
    assert difference(full, picture).mean() > 0.5
    nowhere, unguided = rows_seen(injected, prompt, guidance_interval=(1.1, 1.2))
    assert nowhere == [1] * STEPS
    off, plain = rows_seen(injected, prompt, guidance=1.0)
    assert off == [1] * STEPS and difference(unguided, plain).max() <= 1


def test_unguided_steps_read_the_positive_rows(injected, prompt):
    """Where the halves swapped, every picture would be that of the zero embedding."""
    vectors = embeddings(2)
    pictures = drawn(injected, prompt, 2, [1, 1], vectors, guidance_interval=(1.1, 1.2))
    assert difference(pictures[0], pictures[1]).mean() > 1
    for row in range(2):
        alone = drawn(injected, prompt, 1, [1], vectors[[row]], guidance=0.0)
        assert difference(pictures[row], alone[0]).max() <= 1


# --- starts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(injected) -> torch.Tensor:
    picture = torch.zeros(1, 3, SIZE, SIZE)
    picture[:, 0, :, : SIZE // 2] = 1
    return sampler.picture_latents(injected[0], picture)


class _Still(torch.nn.Module):
    """A U-Net that finds no noise, so that latents stay what they were when denoising began."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (torch.zeros_like(sample),)


def test_a_start_is_kept_the_more_the_less_is_left_to_go(injected, prompt, start, monkeypatch):
    pipe, injector = injected
    without = drawn(injected, prompt, 1, [1], steps=8)
    forgotten = drawn(injected, prompt, 1, [1], start=start, steps=8, strength=1.0)
    assert difference(without, forgotten).max() == 0
    monkeypatch.setattr(pipe, "unet", _Still(pipe.unet))
    likeness = []
    for strength in (0.125, 0.5, 0.75, 1.0):
        how = sampler.Denoising(8, 1.0, SIZE, strength=strength)
        noise = [util.generator_for(1, "noise")]
        latents = sampler._denoise(pipe, injector, prompt, noise, how, start)
        pair = torch.stack([latents.flatten(), start.flatten()])
        likeness.append(float(torch.corrcoef(pair)[0, 1]))
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[0] > 0.4 and abs(likeness[-1]) < 0.3


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_started_rows_do_not_depend_on_their_batch(injected, prompt, start, scheduler, monkeypatch):
    import diffusers

    pipe = injected[0]
    made = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "scheduler", made)
    starts = torch.cat([start, -start, start * 0.5])
    vectors = embeddings(3)
    more = {"steps": 4, "strength": 0.5}
    together = drawn(injected, prompt, 3, [1, 2, 3], vectors, start=starts, **more)
    alone = drawn(injected, prompt, 1, [2], vectors[[1]], start=starts[[1]], **more)
    assert difference(together[1], alone[0]).max() <= 1
    assert difference(together[0], together[1]).mean() > 1


def test_pictures_come_back_from_their_latents(injected, monkeypatch):
    """Also with a VAE whose config has latents' moments, which diffusers' pipelines undo."""
    vae = injected[0].vae
    picture = torch.rand(2, 3, SIZE, SIZE, generator=util.generator_for(0, "picture"))
    plain = sampler.picture_latents(injected[0], picture)
    back = sampler.decode_latents(injected[0], plain)
    config = dict(vae.config) | {"latents_mean": [0.5, -1, 0, 2.0], "latents_std": [1, 2, 3, 0.5]}
    monkeypatch.setattr(vae, "_internal_dict", type(vae.config)(config))
    moved = sampler.picture_latents(injected[0], picture)
    assert (moved - plain).abs().max() > 0.1
    torch.testing.assert_close(sampler.decode_latents(injected[0], moved), back, atol=1e-4, rtol=0)


# --- schedulers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler",
     "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler"],
)  # fmt: skip
def test_any_scheduler_draws_each_row_alike(injected, prompt, name, monkeypatch):
    pipe = injected[0]
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="that scheduler needs torchsde")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_scheduler(pipe, name, None)
    assert type(pipe.scheduler).__name__ == name
    vectors = embeddings(3)
    together = drawn(injected, prompt, 3, [1, 2, 3], vectors, steps=3)
    again = drawn(injected, prompt, 3, [1, 2, 3], vectors, steps=3)
    alone = drawn(injected, prompt, 1, [3], vectors[[2]], steps=3)
    assert difference(together, again).max() == 0, "bit-equal when repeated"
    assert difference(together[2], alone[0]).max() <= 1


def test_trailing_spacing_starts_at_pure_noise(injected, monkeypatch):
    pipe = injected[0]
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)
    first = {}
    for spacing in ("leading", "trailing"):
        set_scheduler(pipe, None, spacing)
        pipe.scheduler.set_timesteps(4)
        first[spacing] = float(pipe.scheduler.timesteps[0])
    assert first["trailing"] == 999 > first["leading"]


@pytest.mark.parametrize("name", ["EulerScheduler", "UNet2DConditionModel", "load_image"])
def test_what_is_no_scheduler_is_refused(injected, name):
    with pytest.raises(util.UserError, match="EulerDiscreteScheduler"):
        set_scheduler(injected[0], name, None)


# --- how it is computed -------------------------------------------------------------------------


def test_a_compiled_unet_draws_the_same(injected, prompt, monkeypatch):
    """Traced by dynamo as on a GPU; the code it makes is run as it is."""
    pipe = injected[0]
    expected = drawn(injected, prompt, 2, [1, 2])
    torch._dynamo.reset()
    monkeypatch.setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager"))
    assert difference(drawn(injected, prompt, 2, [1, 2]), expected).max() <= 1
    # other embeddings and scales go through what was compiled
    vectors = embeddings(2, seed=5)
    other = drawn(injected, prompt, 2, [1, 2], vectors)
    monkeypatch.undo()
    assert difference(other, drawn(injected, prompt, 2, [1, 2], vectors)).max() <= 1
    torch._dynamo.reset()


def test_an_offloaded_unet_draws_the_same(plain, weights, prompt):
    """accelerate's hooks hold the weights elsewhere and bring them in only while computing."""
    import copy

    from accelerate import cpu_offload

    unet = copy.deepcopy(plain.unet)
    pipe = type(plain)(**{**plain.components, "unet": unet}, add_watermarker=False)
    pair = pipe, Injector.install(unet, weights)
    expected = drawn(pair, prompt, 2, [1, 2])
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert next(unet.parameters()).is_meta
    assert difference(drawn(pair, prompt, 2, [1, 2]), expected).max() <= 1


def test_keys_and_values_go_where_an_offloaded_unet_computes(plain, weights):
    """Weights that wait on the CPU: "meta" stands for the GPU that they are brought to."""
    import copy

    injector = Injector.install(copy.deepcopy(plain.unet), weights)
    scales = torch.ones(1, len(modalities.NAMES), len(injector.layers))
    injector.set(embeddings(1), scales, guidance=True, device=torch.device("meta"))
    first = injector.processors[0]
    assert first.to_k_ip.weight.device.type == "cpu"
    query = torch.empty(2, first.heads, 6, len(first.to_k_ip.weight) // first.heads, device="meta")
    assert first.injected(query).shape == query.shape


def test_half_precision_draws_nearly_the_same(plain, weights, prompt):
    import copy

    expected = None
    for dtype in (torch.float32, torch.bfloat16):
        unet = copy.deepcopy(plain.unet).to(dtype)
        pipe = type(plain)(**{**plain.components, "unet": unet}, add_watermarker=False)
        pair = pipe, Injector.install(unet, weights)
        picture = drawn(pair, prompt, 1, [1])
        expected = picture if expected is None else expected
        assert difference(picture, expected).mean() < 6


def test_latents_after_four_steps_equal_five_copies_in_a_mixed_batch(injected, reference, prompt):
    """max |difference| <= 1e-4 in float32, every recipe in one batch, against diffusers' own."""
    pipe, injector = injected
    recipes = modalities.recipes("all")
    table = torch.stack([injection_map.scales(item, layers=injector.layers) for item in recipes])
    vectors = embeddings(1).expand(len(recipes), -1, -1)
    generators = [torch.Generator().manual_seed(7) for _ in recipes]
    how = sampler.Denoising(4, 5.0, SIZE)
    injector.set(vectors, table, guidance=True)
    with torch.no_grad():
        ours = sampler._denoise(pipe, injector, prompt, generators, how, None)
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(7))
    pair = torch.stack([torch.zeros_like(vectors[0]), vectors[0]])
    for row, scales in enumerate(table):
        for layer, processor in enumerate(adapter_processors(reference)):
            processor.scale = scales[:, layer].tolist()
        theirs = reference(
            prompt_embeds=prompt.text, pooled_prompt_embeds=prompt.pooled,
            negative_prompt_embeds=prompt.negative,
            negative_pooled_prompt_embeds=prompt.negative_pooled,
            ip_adapter_image_embeds=[pair[:, [m]] for m in range(len(NAMES))],
            latents=noise, num_inference_steps=4, guidance_scale=5.0, height=SIZE, width=SIZE,
            output_type="latent",
        ).images  # fmt: skip
        assert (ours[row] - theirs[0]).abs().max() <= 1e-4, recipes[row].name


def test_seventy_layers_equal_five_copies(weights):
    """SDXL-base's own depths at reduced width: one forward pass, a mixed batch, float32."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(SDXL_CONFIG, subfolder="unet")
    config |= {"block_out_channels": [16, 32, 64], "attention_head_dim": [1, 2, 4],
               "cross_attention_dim": 24, "norm_num_groups": 8, "addition_time_embed_dim": 8,
               "projection_class_embeddings_input_dim": 6 * 8 + 16}  # fmt: skip
    torch.manual_seed(0)
    ours, theirs = (UNet2DConditionModel.from_config(config).eval() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adapter = _adapter_for(ours, width=24, clip_dim=20)
    injector = Injector.install(ours, adapter)
    assert len(injector.layers) == 70 and injector.layers == injection_map.sdxl_layers()
    theirs._load_ip_adapter_weights(five_copies(adapter), low_cpu_mem_usage=False)
    recipes = (FUSED, *modalities.recipes("separate"))
    table = torch.stack([injection_map.scales(item) for item in recipes])
    random = util.generator_for(0, "seventy layers")
    vectors = torch.randn(1, len(NAMES), 20, generator=random).expand(len(recipes), -1, -1)
    one = {
        "sample": torch.randn(1, 4, 8, 8, generator=random),
        "encoder_hidden_states": torch.randn(1, 7, 24, generator=random),
    }
    extra = {"text_embeds": torch.randn(1, 16, generator=random), "time_ids": torch.ones(1, 6)}
    injector.set(vectors, table, guidance=False)
    with torch.no_grad():
        n = len(recipes)
        found = ours(
            **{name: part.expand(n, *part.shape[1:]) for name, part in one.items()},
            timestep=500, added_cond_kwargs={k: v.expand(n, -1) for k, v in extra.items()},
        ).sample  # fmt: skip
        images = [vectors[:1, [m]] for m in range(len(NAMES))]
        plain = None
        for row, scales in enumerate(table):
            processors = [p for name, p in theirs.attn_processors.items() if "attn2" in name]
            for layer, processor in enumerate(processors):
                processor.scale = scales[:, layer].tolist()
            expected = theirs(
                **one, timestep=500, added_cond_kwargs=extra | {"image_embeds": images}
            ).sample
            assert (found[row] - expected[0]).abs().max() <= 1e-4, recipes[row].name
            plain = expected if plain is None else plain
            assert row == 0 or (expected - plain).abs().max() > 1e-3, "recipes differ"


def _adapter_for(unet, width: int, clip_dim: int) -> IPAdapterWeights:
    """An adapter with the official layout and random weights for this U-Net."""
    random = util.generator_for(0, "adapter")

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    projection = {"proj.weight": tensor(4 * width, clip_dim), "proj.bias": tensor(4 * width),
                  "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
    hidden = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for name in _cross_attention(unet)
    ]
    layers = tuple((tensor(size, width), tensor(size, width)) for size in hidden)
    return IPAdapterWeights("memory", projection, layers)


# --- prompts ------------------------------------------------------------------------------------


def test_a_prompt_per_row_draws_what_one_for_all_draws(injected, prompt):
    parts = (prompt.text, prompt.negative, prompt.pooled, prompt.negative_pooled)
    each = sampler.PromptEmbeds(*(part.repeat_interleave(3, dim=0) for part in parts))
    once, thrice = (drawn(injected, given, 3, [1, 2, 3]) for given in (prompt, each))
    assert difference(once, thrice).max() <= 1


def test_rows_read_their_own_prompt(injected, prompt):
    """In another order the same pictures, each with its prompt."""
    pipe, _ = injected
    pair = sampler.encode_prompt(pipe, ["a red cross", "a sea of stars"], ["", ""])
    vectors = embeddings(2)
    straight = drawn(injected, pair, 2, [1, 1], vectors)
    swapped = drawn(injected, pair.chosen([1, 0]), 2, [1, 1], vectors.flip(0))
    assert difference(straight, swapped[::-1]).max() <= 1
    same = drawn(injected, pair.chosen([0, 0]), 2, [1, 1], vectors)
    assert difference(straight, same)[1].max() > 1


def test_prompts_that_do_not_divide_the_rows_are_refused(injected, prompt):
    parts = (prompt.text, prompt.negative, prompt.pooled, prompt.negative_pooled)
    two = sampler.PromptEmbeds(*(part.repeat_interleave(2, dim=0) for part in parts))
    with pytest.raises(ValueError, match="2 prompts for 3 rows"):
        drawn(injected, two, 3, [1, 2, 3])


# --- how many at once ---------------------------------------------------------------------------


def test_the_largest_batch_follows_from_the_memory_of_one_and_two(monkeypatch):
    cpu, asked = torch.device("cpu"), []

    def peak(_device: torch.device) -> int:
        return 1_000_000_000 + 100_000_000 * asked[-1]

    monkeypatch.setattr(memory, "peak_memory", peak)
    monkeypatch.setattr(memory, "memory_limit", lambda _: 2_200_000_000)
    # 1.2 GB are in use with two rows and 1.0 GB are left, 0.9 of it is spent: nine more
    assert largest_batch(asked.append, 100, cpu) == 11
    assert largest_batch(asked.append, 5, cpu) == 5
    assert largest_batch(asked.append, 1, cpu) == 1
    monkeypatch.setattr(memory, "memory_limit", lambda _: 1_000_000_000)
    assert largest_batch(asked.append, 100, cpu) == 1


def test_memory_is_read_in_bytes():
    cpu = torch.device("cpu")
    assert 50e6 < peak_memory(cpu) < 1e12
    assert memory_limit(cpu) > peak_memory(cpu)


def test_decoding_is_set_aside_and_not_counted_for_each_picture(injected, prompt, monkeypatch):
    """Small pictures are decoded in turn: only denoising grows with their number."""
    asked: list[tuple[str, int]] = []
    renderer = Renderer(injected[0], injected[1], prompt, sampler.Denoising(4, 3.0, SIZE), 0)

    def latents(by: Renderer, rows: int) -> torch.Tensor:
        assert by.how.steps == 1
        asked.append(("denoise", rows))
        return torch.zeros(rows, 4, 8, 8)

    def decode(_pipe, one: torch.Tensor) -> torch.Tensor:
        asked.append(("decode", len(one)))
        return one

    def peak(_device: torch.device) -> int:
        what, rows = asked[-1]
        return 10_000 if what == "decode" else 1_000 * rows  # in units of 2 MiB

    unit = 2 << 20
    for module in (renderer_module, memory):
        monkeypatch.setattr(module, "peak_memory", lambda device: unit * peak(device))
    monkeypatch.setattr(memory, "memory_limit", lambda _: unit * 111_000)
    monkeypatch.setattr(sampler, "decode_latents", decode)
    monkeypatch.setattr(renderer_module, "MOST_ON_CPU", 10_000)
    # 111 are there, 2 in use with two rows, 9 set aside: 90 more
    assert fitting_batch(renderer, latents, 500) == 2 + 90
    assert ("decode", 1) in asked and ("decode", 2) not in asked


# --- schedulers ---------------------------------------------------------------------------------


def trained_shares(timestep: float) -> tuple[float, float]:
    """sqrt(a_t), sqrt(1 - a_t) of SDXL's training, between timesteps by log sigma."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    odds = np.interp(timestep, np.arange(1000), np.log((1 - kept) / kept))
    share = 1 / (1 + np.exp(odds))
    return share**0.5, (1 - share) ** 0.5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_offered_scheduler_finds_a_known_picture(name):
    """With a U-Net that predicts the noise perfectly, read as SDXL's is."""
    own = json.loads((SDXL_CONFIG / "scheduler" / "scheduler_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = SimpleNamespace(scheduler=diffusers.EulerDiscreteScheduler.from_config(own))
        set_scheduler(pipe, name, None)
    scheduler, clean = pipe.scheduler, torch.randn(2, 4, 8, 8)
    scheduler.set_timesteps(12)
    latents = torch.randn(2, 4, 8, 8) * scheduler.init_noise_sigma
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) and levels[0] > 0.85 and levels[-1] < 0.2
    assert levels == pytest.approx((scheduler.timesteps / 1000).tolist(), abs=0.06)
    for timestep in scheduler.timesteps:
        kept, lost = trained_shares(float(timestep))
        rows = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step((rows - kept * clean) / lost, timestep, latents).prev_sample
    assert (latents - clean).abs().mean() < 0.2


def test_edm_schedulers_are_guided_at_every_step(injected, prompt, monkeypatch, caplog):
    """They count in 0.25 log(sigma), which is negative for the last steps."""
    pipe = injected[0]
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)
    monkeypatch.setattr(util.LOG, "propagate", True)
    set_scheduler(pipe, "EDMEulerScheduler", None)
    assert "Playground" in caplog.text
    rows, _ = rows_seen(injected, prompt)
    assert rows == [2] * STEPS
    pipe.scheduler.set_timesteps(8)
    levels = noise_levels(pipe.scheduler)
    assert levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(0.999)
    sigma = 2.0  # sqrt((1 - a) / a) of some timestep: its place in training
    kept, lost = trained_shares(1000 * np.interp(np.log(sigma), *_training_levels({})))
    assert lost / kept == pytest.approx(sigma, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "told"),
    [("FlowMatchEulerDiscreteScheduler", "flow matching"), ("PNDMScheduler", "repeats its first"),
     ("IPNDMScheduler", "PNDM|repeats"), ("DDIMInverseScheduler", "other models"),
     ("NoScheduler", "no scheduler of the installed")],
)  # fmt: skip
def test_schedulers_that_cannot_draw_here_are_refused(injected, name, told):
    with pytest.raises(util.UserError, match=told) as refused:
        set_scheduler(injected[0], name, None)
    offered = str(refused.value).split("expected:")[1]
    assert all(item in offered for item in SCHEDULERS) and name not in offered


def test_the_text_of_a_nan_names_what_overflowed():
    fine, broken = torch.zeros(1), torch.full((1,), float("nan"))
    with pytest.raises(util.UserError, match="--vae_path"):
        check_not_finite(fine, broken, torch.float16)
    with pytest.raises(util.UserError, match="--precision"):
        check_not_finite(broken, broken, torch.float16)
    check_not_finite(fine, fine, torch.float16)
