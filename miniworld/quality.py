"""How good the miniatures are, on pictures they were not trained on, and what the judge sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import metrics
from datafiles import superpixel
from datafiles.pictures import read_picture
from features.clip import load_clip
from miniworld import judge, models, pictures
from modalities import recipes
from rundirs.files import read_json
from rundirs.journal import read_run

Verdicts = Mapping[str, Mapping[str, np.ndarray]]  # {recipe or control: {attribute: bool [n]}}
PLACE_TOLERANCE = 0.1  # picture widths: a fifth of an object


def vae_psnr(vae: Any, scenes: Sequence[pictures.Scene]) -> np.ndarray:
    """PSNR in dB of each scene at 128 px, decoded from the posterior's mode: [n]."""
    found = []
    with torch.no_grad():
        for scene in scenes:
            picture = torch.from_numpy(pictures.render(scene, models.SIZE_PX)).permute(2, 0, 1)
            pixels = picture[None].float() / 127.5 - 1
            made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
            found.append(metrics.psnr((pixels + 1) / 2, (made + 1) / 2))
    return np.concatenate(found)


def clip_retrieval(
    weights: models.Models, scenes: Sequence[pictures.Scene]
) -> dict[str, np.ndarray]:
    """Whether picture -> caption finds its own among all scenes': {CLIP's input: bool [n]}.

    Inputs are the whole picture and each level of superpixels.
    """
    from PIL import Image

    clip = load_clip(str(weights.clip_config), str(weights.clip_checkpoint), torch.device("cpu"))
    gallery = F.normalize(
        clip.encode_texts([pictures.scene_caption(scene) for scene in scenes]), dim=1
    )
    crops: dict[str, list[torch.Tensor]] = {}
    for scene in scenes:
        picture = pictures.render(scene)
        for name, view in {"image": picture, **superpixel.superpixels(picture)}.items():
            crops.setdefault(name, []).append(clip.transform(Image.fromarray(view)))
    found = {}
    for name, rows in crops.items():
        query = F.normalize(clip.encode_pictures(torch.stack(rows)), dim=1)
        found[name] = ((query @ gallery.T).argmax(dim=1) == torch.arange(len(rows))).numpy()
    return found


def judge_accuracy(model: judge.Judge, scenes: Sequence[pictures.Scene]) -> dict[str, np.ndarray]:
    """Whether the judge is right about renders themselves: {attribute: bool [n]}."""
    images = np.stack([pictures.render(scene, models.SIZE_PX) for scene in scenes])
    return judge.verdicts(model, images, scenes)


def judged_run(
    model: judge.Judge, images: Path, data_path: Path
) -> dict[str, dict[str, np.ndarray]]:
    """What the pictures of a generate.py run show: {recipe: {attribute or place: bool [n]}}."""
    records = read_run(images)
    truth = read_json(data_path / "scenes.json")["scenes"]
    of_folder = {Path(key).parent.name: pictures.Scene(**scene) for key, scene in truth.items()}
    found = {}
    drawn_recipes = {record["recipe"] for record in records}
    for recipe in (item.name for item in recipes("all") if item.name in drawn_recipes):
        chosen = [record for record in records if record["recipe"] == recipe]
        drawn = np.stack([np.asarray(read_picture(images / record["file"])) for record in chosen])
        scenes = [of_folder[record["folder"]] for record in chosen]
        verdicts = judge.verdicts(model, drawn, scenes)
        found[recipe] = verdicts | {"place": place_errors(drawn, scenes) < PLACE_TOLERANCE}
    return found


def place_errors(drawn: np.ndarray, scenes: Sequence[pictures.Scene]) -> np.ndarray:
    """How far the object's centroid is from where it was, in picture widths: [n].

    ``drawn``: uint8 [n, W, W, 3]. The object is where pixels are nearer to its colour than to
    either tone of the background; NaN where nothing is.
    """
    found = np.full(len(scenes), np.nan)
    for row, (picture, scene) in enumerate(zip(drawn.astype(float), scenes, strict=True)):
        tones = (
            pictures.COLOURS[scene.colour],
            pictures.COLOURS[scene.background],
            pictures.second_tone(scene.background),
        )
        distance = np.stack([np.square(picture - tone).sum(axis=-1) for tone in tones])
        rows, columns = np.nonzero(distance.argmin(axis=0) == 0)
        truth = np.nonzero(pictures.object_coverage(scene, len(picture)) > 0.5)
        if len(rows):
            apart = (rows.mean() - truth[0].mean(), columns.mean() - truth[1].mean())
            found[row] = np.hypot(*apart) / len(picture)
    return found


def mean_and_interval(values: np.ndarray, seed: int) -> str:
    """``0.83 [0.75, 0.90]``: mean and 95 % bootstrap interval over stimuli."""
    low, high = metrics.bootstrap_interval(values.astype(float), seed)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def judge_table(found: Verdicts, seed: int) -> str:
    """Markdown: a row per recipe or control, a column per attribute, and chance.

    place: the object's centre is within PLACE_TOLERANCE of the stimulus'.
    """
    chance = " | ".join(f"{1 / len(values):.2f}" for values in pictures.ATTRIBUTES.values())
    return score_table(found, seed) + f"| chance | | {chance} | - |\n"


def above_table(found: Verdicts, control: Verdicts, seed: int) -> str:
    """Markdown: how much more of each attribute the pictures show than the control's.

    Paired by stimulus: with an interval above 0, the difference is significant.
    """
    differences = {
        recipe: {name: hits - 1.0 * control[recipe][name] for name, hits in verdicts.items()}
        for recipe, verdicts in found.items()
    }
    return score_table(differences, seed)


def progress_table(found: Verdicts, seed: int) -> str:
    """Markdown: change of the mean over the attributes with each modality that is added."""
    means = [
        np.mean([found[recipe.name][name] for name in pictures.ATTRIBUTES], axis=0)
        for recipe in recipes("progressive")
    ]
    added = [recipe.active[-1] for recipe in recipes("progressive")]
    changes = {
        f"+ {name}": {"mean of the attributes": after - before}
        for name, before, after in zip(added[1:], means[:-1], means[1:], strict=True)
    }
    return score_table(changes, seed)


def score_table(found: Verdicts, seed: int) -> str:
    """Markdown: a row per recipe or setting, a column per score, mean [95 % bootstrap]."""
    names = list(next(iter(found.values())))
    lines = ["| recipe | N | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for recipe, verdicts in found.items():
        cells = " | ".join(mean_and_interval(verdicts[name], seed) for name in names)
        lines.append(f"| {recipe} | {len(verdicts[names[0]])} | {cells} |")
    return "\n".join(lines) + "\n"
