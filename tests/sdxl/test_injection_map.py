"""Injection maps: sites, layers, presets and scales."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
import yaml
from helpers_drawing import FUSED, NAMES, adapter_processors  # fmt: skip

import modalities
import util
from sdxl import injection_map
from sdxl.attention import layers_of

RECIPES = modalities.recipes("all")


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


SHARED = ("intent", "uniform", "content_style")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("preset", [*SHARED, "redistributed"])
def test_every_active_modality_is_alive(recipe, preset):
    table = injection_map.scales(recipe, preset)
    assert table.shape == (5, 70) and table.dtype == torch.float32
    for name, row in zip(NAMES, table, strict=True):
        assert bool(row.any()) == (name in recipe.active)
    assert table.sum(0).max() <= 1 + 1e-6


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("preset", SHARED)
def test_a_modality_s_scale_is_the_same_in_every_recipe(preset, per_row):
    """Alone, step by step or with all: what it adds to the fused picture."""
    gains = torch.tensor([[0.1, 0.1, 0.2, 0.3, 0.3], [0.3, 0.0, 0.1, 0.2, 0.9]])
    how = {"preset": preset, "strength": 0.8, "gains": gains if per_row else None}
    fused = injection_map.scales(FUSED, **how)
    total = fused.sum(-2)
    torch.testing.assert_close(total[total > 0], torch.full((int((total > 0).sum()),), 0.8))
    for recipe in RECIPES:
        active = torch.tensor([name in recipe.active for name in NAMES])[:, None]
        torch.testing.assert_close(injection_map.scales(recipe, **how), fused * active)


def test_redistributed_is_fused_alike_and_gives_what_is_left_more():
    alike = [injection_map.scales(FUSED, name) for name in ("intent", "redistributed")]
    torch.testing.assert_close(*alike)
    layers = injection_map.sdxl_layers()
    up1 = [layer.site for layer in layers].index("up.1")
    alone = injection_map.scales(modalities.recipes("separate")[4], "redistributed")
    assert alone[4, up1] == 1.0
    assert injection_map.scales(modalities.recipes("separate")[4])[4, up1] == pytest.approx(0.8)
    fourth, fifth = (
        injection_map.scales(recipe, "redistributed")
        for recipe in modalities.recipes("progressive")[3:]
    )
    assert fourth[3, up1] == 1.0 and fifth[3, up1] == pytest.approx(0.2), (
        "text falls as image joins"
    )


def test_fused_intent_fills_every_layer_by_gain():
    table = injection_map.scales(FUSED, strength=0.7)
    torch.testing.assert_close(table.sum(0), torch.full((70,), 0.7))
    up1 = [layer.site for layer in injection_map.sdxl_layers()].index("up.1")
    text, image = 0.3 * 0.25, 0.3
    torch.testing.assert_close(
        table[:, up1], 0.7 * torch.tensor([0, 0, 0, text, image]) / (text + image)
    )


def test_separate_takes_the_scales_of_a_map_that_redistributes():
    table = injection_map.scales(modalities.recipes("separate")[3], "redistributed", strength=2.0)
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
        ({"gain": "both", "sites": {}}, "share, relative, absolute"),
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
    layers = injected[1].layers
    ours = sum(injection_map.scales(recipe, "redistributed", layers) for recipe in separate)
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


def test_the_readme_shows_the_scales_that_are_used():
    table = injection_map.scales(FUSED)
    sites = [layer.site for layer in injection_map.sdxl_layers()]
    lines = (util.CHECKOUT / "README.md").read_text(encoding="utf-8").splitlines()
    for name, row in zip(NAMES, table, strict=True):
        line = next(line for line in lines if line.startswith(f"| `{name}` |"))
        said = {site: float(scale) for site, scale in re.findall(r"`([a-z.0-9]+)` ([.\d]+)", line)}
        used = {site: float(row[sites.index(site)]) for site in sites if row[sites.index(site)]}
        assert said == pytest.approx(used, abs=0.005)
