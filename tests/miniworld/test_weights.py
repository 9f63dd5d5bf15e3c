"""The shipped miniatures do what the demo needs: floors far below what was measured, on N = 40.

The concepts are of the validation split; the figures of the 200 test concepts are printed by
``benchmarks/quality.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from features.clip import load_clip
from features.views import Views, picture_versions
from miniworld import judge, models, pictures, pretrain, quality, renders
from modalities import MODALITIES, NAMES, Recipe, recipes
from sdxl import injection_map, sampler
from sdxl.adapter_file import check_ip_adapter, read_ip_adapter
from sdxl.attention import Injector
from sdxl.loading import check_sdxl, load_sdxl

N = 40
WEIGHTS = models.Models(models.SHIPPED)


@pytest.fixture(scope="module")
def scenes() -> list[pictures.Scene]:
    return renders.unseen_scenes("validation", N, seed=0)


@pytest.fixture(scope="module")
def embeddings(scenes) -> torch.Tensor:
    """True embeddings [N, M, D] as stage 1 makes them, superpixels at 128 px."""
    from PIL import Image

    clip = load_clip(str(WEIGHTS.clip_config), str(WEIGHTS.clip_checkpoint), torch.device("cpu"))
    rows = []
    for scene in scenes:
        shown = picture_versions(Image.fromarray(pictures.render(scene)), Views(128))
        crops = torch.stack([clip.transform(picture) for picture in shown.values()])
        made = dict(zip(shown, clip.encode_pictures(crops), strict=True))
        made |= dict.fromkeys(
            (m.name for m in MODALITIES if m.source == "text"),
            clip.encode_texts([pictures.scene_caption(scene)])[0],
        )
        rows.append(torch.stack([made[name] for name in NAMES]))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def painter():
    pipe = load_sdxl(WEIGHTS.sdxl, torch.float32, "cpu")
    injector = Injector.install(pipe.unet, read_ip_adapter(WEIGHTS.ip_adapter))
    prompt = sampler.encode_prompt(pipe, "best quality, high quality", "lowres, worst quality")

    def paint(embeddings: torch.Tensor, recipe: Recipe) -> np.ndarray:
        """uint8 [n, 128, 128, 3]."""
        scales = injection_map.scales(recipe, layers=injector.layers)
        table = scales.expand(len(embeddings), -1, -1)
        seeds = list(range(len(embeddings)))
        how = sampler.Denoising(8, 2.0, 128)
        latents = sampler.denoise(pipe, injector, embeddings, table, seeds, prompt, how)
        return sampler.pictures_of(pipe, latents)

    return paint


def test_files_are_small_and_complete() -> None:
    files = list(models.SHIPPED.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 40e6
    card = (models.SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "miniworld.pretrain" in card
    check_sdxl(WEIGHTS.sdxl)
    check_ip_adapter(WEIGHTS.ip_adapter, models.TRAINED.clip["embed_dim"])


def test_the_vae_reconstructs_unseen_pictures(scenes) -> None:
    vae = load_sdxl(WEIGHTS.sdxl, torch.float32, "cpu").vae
    assert quality.vae_psnr(vae, scenes).mean() >= 27


def test_the_judge_is_right_about_unseen_pictures(scenes) -> None:
    found = quality.judge_accuracy(judge.load(WEIGHTS.judge), scenes)
    assert min(hits.mean() for hits in found.values()) >= 0.9
    swapped = quality.judge_accuracy(judge.load(WEIGHTS.judge), scenes[1:] + scenes[:1])
    assert all(np.array_equal(np.roll(found[name], -1), swapped[name]) for name in found)


def test_every_embedding_finds_its_caption(scenes, embeddings) -> None:
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    captions = unit[:, NAMES.index("text")]
    for column, name in enumerate(NAMES):
        best = (unit[:, column] @ captions.T).argmax(dim=1)
        assert (best == torch.arange(N)).float().mean() >= 0.9, name


def test_pictures_and_superpixels_tell_the_place(scenes, embeddings) -> None:
    places = pretrain.poses(scenes)[:, :2]
    for column, name in enumerate(NAMES):
        told = (embeddings[:, column] @ pretrain.pose_axes())[:, :2]
        alike = torch.corrcoef(torch.stack([told.flatten(), places.flatten()]))[0, 1]
        if MODALITIES[column].source == "text":
            assert abs(alike) < 0.3  # no caption tells it
        else:
            assert alike > 0.8, name


def test_pictures_show_what_the_embeddings_say(scenes, embeddings, painter) -> None:
    """Fused, without words: far above chance, and gone with another stimulus' embeddings."""
    model = judge.load(WEIGHTS.judge)
    drawn = painter(embeddings, recipes("fused")[0])
    right = judge.verdicts(model, drawn, scenes)
    wrong = judge.verdicts(model, drawn, scenes[1:] + scenes[:1])
    floors = {"shape": 0.85, "colour": 0.9, "background": 0.95, "pattern": 0.95}
    for name, floor in floors.items():
        assert right[name].mean() >= floor, name
        assert wrong[name].mean() < right[name].mean() - 0.1, name


@pytest.mark.parametrize("recipe", recipes("separate"), ids=lambda recipe: recipe.name)
def test_each_modality_alone_reaches_the_picture(embeddings, painter, recipe) -> None:
    """Another stimulus' embedding of this modality gives another picture, of others the same."""
    column, rows = NAMES.index(recipe.active[0]), embeddings[:12]
    own, others = rows.clone(), rows.roll(1, dims=0)
    own[:, column] = rows[:, column].roll(1, dims=0)
    others[:, column] = rows[:, column]
    plain = painter(rows, recipe).astype(int)
    assert np.abs(painter(own, recipe) - plain).mean() > 20
    assert np.abs(painter(others, recipe) - plain).max() <= 1
