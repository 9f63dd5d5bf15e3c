"""Pre-training of the miniatures: never a test concept, resumable, exported in the real layouts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import modalities
import util
from features.clip import load_clip
from miniworld import generator, judge, models, pictures, pretrain, renders
from miniworld.clip_losses import grouped_contrast
from miniworld.fitting import fit_part
from miniworld.generator import GeneratorPart
from miniworld.latents import whitened_latents
from rundirs.tensors import load_tensors
from sdxl.adapter_file import read_ip_adapter
from sdxl.attention import Injector
from sdxl.loading import load_sdxl

TINY = ("--pictures", "24", "--batch_size", "8")
STEPS = {"vae": 2, "clip": 2, "judge": 2, "generator": 2}


def run(out: Path, *more: object, **steps: int) -> int:
    counts = [f"--{name}_steps={value}" for name, value in (STEPS | steps).items()]
    return pretrain.main([str(word) for word in ("--output_path", out, *TINY, *counts, *more)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert run(out) == 0
    return out


def test_no_split_s_concept_is_ever_trained_on() -> None:
    shown = {pictures.split_of(concept) for concept in renders.training_concepts()}
    assert shown == {"training"}
    scenes = renders.training_scenes(60, seed=0)
    random = np.random.default_rng(0)
    missed = [renders.near_miss(scene, random) for scene in scenes]
    assert {pictures.split_of(concept) for concept in [*scenes, *missed]} == {"training"}
    for scene, miss in zip(scenes, missed, strict=True):
        names = pictures.ATTRIBUTES
        assert sum(getattr(scene, name) != getattr(miss, name) for name in names) == 1


def test_a_rival_differs_in_one_thing_and_stays_inside() -> None:
    scenes, random = renders.training_scenes(200, seed=0), np.random.default_rng(0)
    kinds = set()
    for scene in scenes:
        rival = renders.rival(scene, random)
        assert pictures.split_of(rival) == "training"
        assert rival.size / 2 <= min(rival.x, rival.y)
        assert max(rival.x, rival.y) <= 1 - rival.size / 2
        changed = frozenset(k for k, v in asdict(scene).items() if getattr(rival, k) != v)
        kinds.add(changed - {"x", "y"} or frozenset("xy"))  # a larger one may have to move
    names = (*pictures.ATTRIBUTES, "size", "rotation")
    assert kinds == {frozenset({name}) for name in names} | {frozenset("xy")}


def test_poses_are_standardised_and_round_shapes_have_no_rotation() -> None:
    scenes = renders.training_scenes(4000, seed=0)
    poses = pretrain.poses(scenes)
    turned = ~poses[:, -1].isnan()
    assert turned.tolist() == [scene.shape not in ("circle", "ring") for scene in scenes]
    for column in (*poses[:, :-1].T, poses[turned, -1]):
        assert abs(column.mean()) < 0.1 and abs(column.std() - 1) < 0.1
    star = next(scene for scene in scenes if scene.shape == "star")
    for place, name in enumerate(pretrain.POSE):
        moved = replace(star, **{name: getattr(star, name) + 0.1})
        changed = pretrain.poses([moved])[0] != pretrain.poses([star])[0]
        assert changed.nonzero().flatten().tolist() == [place]


def test_clip_learns_the_pose_of_pictures_rivals_and_superpixels(trained: Path) -> None:
    """Each third of the batch is held to the pose of what it shows."""
    part = pretrain.ClipPart(renders.Renders(trained / "cache", 24, 0), 8)
    axes = pretrain.pose_axes()
    torch.testing.assert_close(axes.T @ axes, torch.eye(4))

    def raised_by(name: str) -> float:
        """How much the pose loss grows where the poses of that name are far off."""
        kept, losses = getattr(part, name), []
        for moved in (0, 100):
            setattr(part, name, kept + moved)
            torch.manual_seed(0)
            losses.append(part.losses(0, np.random.default_rng(0))["pose"].item())
        setattr(part, name, kept)
        return losses[1] - losses[0]

    rival, own = raised_by("rival_pose"), raised_by("pose")  # a third of the rows, two thirds
    assert rival > 1000 and own == pytest.approx(2 * rival, rel=0.3)


@pytest.mark.parametrize("split", list(pictures.HELD_OUT_FOLDS))
def test_unseen_scenes_are_of_their_split(split: str) -> None:
    scenes = renders.unseen_scenes(split, 40, seed=0)
    assert {pictures.split_of(scene) for scene in scenes} == {split}
    assert len({pictures.concept_name(scene) for scene in scenes}) == 40


def test_cached_pictures_belong_to_their_scenes(tmp_path: Path) -> None:
    """Other scenes in the same folder must not find the first ones' pictures."""
    for seed in (0, 1):
        data = renders.Renders(tmp_path, 4, seed)
        for scene, picture in zip(data.scenes, data.whole, strict=True):
            np.testing.assert_array_equal(picture, pictures.render(scene, models.SIZE_PX))


def test_all_parts_load_where_the_real_ones_do(trained: Path) -> None:
    weights = models.Models(trained / "weights")
    pipe = load_sdxl(weights.sdxl, torch.float32, "cpu")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.vae.config.latents_mean and pipe.vae.config.latents_std
    adapter = read_ip_adapter(weights.ip_adapter, models.TRAINED.clip["embed_dim"])
    Injector.install(pipe.unet, adapter)
    clip = load_clip(str(weights.clip_config), str(weights.clip_checkpoint), torch.device("cpu"))
    assert clip.encode_texts(["a red star"]).shape == (1, models.TRAINED.clip["embed_dim"])
    judge.load(weights.judge)
    unet, _ = load_tensors(weights.sdxl / "unet" / models.WEIGHTS_FILE)
    assert set(unet) == set(models.build_unet(models.TRAINED).state_dict())
    files = list(weights.folder.rglob("*.safetensors"))
    assert len(files) == 7 and sum(file.stat().st_size for file in files) < 40e6


def test_latents_come_out_with_mean_0_and_variance_1(trained: Path) -> None:
    vae = load_sdxl(trained / "weights" / "sdxl", torch.float32, "cpu").vae
    data = renders.Renders(trained / "cache", 24, 0)
    latents = whitened_latents(vae, data.whole)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


def test_the_generator_learns_every_part_of_the_adapter(trained: Path) -> None:
    state = torch.load(trained / "generator" / "state.pt", weights_only=True)["model"]
    start = models.build_unet(models.TRAINED)
    fresh = generator.set_adapter(start, models.TRAINED.clip["embed_dim"])
    names = [name for name in state if "_ip." in name or name.startswith("projection.proj")]
    assert len(names) == 2 * len(fresh.layers) + 2
    before = torch.nn.ModuleDict({"unet": start, "projection": fresh.projection}).state_dict()
    assert all(not torch.equal(state[name], before[name]) for name in names)


@pytest.mark.parametrize(
    ("step", "names"), [(0, ("down.2", "mid", "up.0")), (60, tuple(modalities.SITES))]
)
def test_a_share_of_the_rows_is_injected_at_some_sites_only(
    trained: Path, step: int, names: tuple[str, ...]
) -> None:
    data = renders.Renders(trained / "cache", 24, 0)
    part = GeneratorPart(data, models.Models(trained / "weights"), 200, 4000, torch.device("cpu"))
    both = part.scales(step, np.random.default_rng(0))
    rows = both.sum(dim=1)
    of_layer = [layer.site for layer in part.injector.layers]
    sites = torch.stack([rows[:, of_layer.index(name)] for name in names], dim=1)
    for layer, name in enumerate(of_layer):  # a site's layers act together; others not at all
        expected = sites[:, names.index(name)] if name in names else torch.zeros(len(rows))
        assert torch.equal(rows[:, layer], expected)
    counts = sites.sum(dim=1)
    assert counts.min() == 1  # nowhere: that is what the dropout of embeddings is for
    few = counts < len(names)
    share = part.few_sites_share
    assert 0.7 * share < few.float().mean() < share  # a draw of some sites may be all of them
    told = both[:, 1] / rows.clamp(min=1e-9)  # the caption's share where anything is injected
    mixed = (told > 0).any(dim=1).float().mean()
    assert 0.7 * part.mixed_share < mixed < 1.05 * part.mixed_share
    assert both.min() == 0 and 0.2 < told[told > 0].lt(1).float().mean() < 0.9
    alone = sites[counts == 1]
    assert len(alone) > 0.4 * few.sum() and alone.mean(dim=0).min() > 0.7 / len(names)


def test_the_object_weighs_more_than_the_ground() -> None:
    scenes = renders.training_scenes(8, seed=0)
    weights = generator.importance(scenes, 4.0)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert torch.allclose(weights.max() / weights.min(), torch.tensor(4.0))
    for scene, row in zip(scenes, weights[:, 0], strict=True):
        covered = torch.from_numpy(pictures.object_coverage(scene, 16)) > 0
        assert (row[covered] == row.max()).all()
        assert (row == row.min()).float().mean() > 0.3


def test_a_finished_run_trains_nothing(trained: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in (trained / "weights").rglob("*.safetensors")
    }
    assert run(trained) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stopped_part_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Bit for bit: draws depend on the step alone."""
    data = renders.Renders(tmp_path / "cache", 24, 0)
    finals = []
    for name, stops in (("whole", []), ("cut", ["SIGTERM"])):
        folder, torch_seed = tmp_path / name, 5
        torch.manual_seed(torch_seed)
        if stops:
            with pytest.raises(util.Preempted):
                fit_part(pretrain.JudgePart(data, 8), 3, folder, 0, stops)
            assert torch.load(folder / "judge" / "state.pt", weights_only=True)["step"] == 1
            torch.manual_seed(99)  # other initial weights, replaced by the saved ones
        part = pretrain.JudgePart(data, 8)
        fit_part(part, 3, folder, 0, [])
        finals.append(part.model.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_grouped_contrast_is_clip_s_loss_without_groups() -> None:
    import loss

    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 8, generator=random), torch.randn(6, 8, generator=random)
    scale = torch.tensor(10.0)
    torch.testing.assert_close(grouped_contrast(a, b, 1, scale), loss.clip_loss(a, b, scale))


def test_wrong_captions_raise_the_loss_and_swapped_groups_too() -> None:
    random = torch.Generator().manual_seed(0)
    text = torch.randn(3, 8, generator=random)
    shown = text.repeat_interleave(2, dim=0)
    scale = torch.tensor(20.0)
    right = grouped_contrast(shown, text, 2, scale)
    near = torch.cat([text, text[:1] + 0.1])
    assert grouped_contrast(shown, near, 2, scale) > right
    assert grouped_contrast(shown.roll(2, dims=0), text, 2, scale) > right + 1
