"""Train the miniatures: VAE, CLIP, judge, then SDXL's U-Net and the IP-Adapter together.

Every part resumes where it was saved; no random state is stored, each step's draws are recomputed
from (seed, part, step). What is trained is exported to ``RUN/weights`` by the same command.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("pretrain")

import numpy as np
import torch
from torch.nn import functional as F

import util
from cli.miniature import PRETRAIN_STEPS
from miniworld import judge, models, pictures, renders
from miniworld.clip_losses import grouped_contrast, spread_penalties
from miniworld.fitting import Pretrained, fit_part
from miniworld.generator import GeneratorPart
from miniworld.latents import as_pixels, halved, set_latent_statistics
from rundirs.directory import open_run
from rundirs.environment import commit
from rundirs.files import read_json, write_json
from rundirs.tensors import save_tensors
from training import loop

L1_WEIGHT = 0.125  # beside the squared error: edges a little sharper
NEAR_MISSES = 6  # wrong captions for each picture of a CLIP batch
STATISTICS_OF = 512  # pictures that give the latents' mean and standard deviation


# ---------------------------------------------------------------- VAE


class VaePart:
    """Autoencoder: MSE, a little L1, very little KL; on crops at first, at last on whole ones."""

    name, learning_rate, weight_decay, ema_decay = "vae", 1.5e-3, 0.01, 0.998
    batch_size, crop_px, crops_until = 8, 64, 0.88
    kl_weight = 1e-4

    def __init__(self, data: renders.Renders, steps: int, batch_size: int | None) -> None:
        self.data, self.steps = data, steps
        self.batch_size = batch_size or self.batch_size
        self.model = models.build_vae(models.TRAINED)

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        crops = step < self.crops_until * self.steps
        size = self.batch_size if crops else max(1, self.batch_size // 2)
        shown = self.data.whole[np.sort(random.integers(len(self.data), size=size))]
        if crops:
            # multiples of 8 px: patterns are fixed in the picture, and so are they in the latents
            top, left = 8 * random.integers((models.SIZE_PX - self.crop_px) // 8 + 1, size=2)
            shown = shown[:, top : top + self.crop_px, left : left + self.crop_px]
        pixels = as_pixels(shown)
        posterior = self.model.encode(pixels).latent_dist
        made = self.model.decode(posterior.sample()).sample
        l1, mse = F.l1_loss(made, pixels), F.mse_loss(made, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": L1_WEIGHT * l1 + mse + self.kl_weight * kl, "l1": l1, "mse": mse, "kl": kl}

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        """Write the whole pipeline; its U-Net is not trained yet."""
        set_latent_statistics(self.model, self.data.whole[:STATISTICS_OF])
        torch.manual_seed(util.seed_for(0, "text encoders"))
        pipe = models.assemble(
            models.TRAINED,
            models.build_unet(models.TRAINED),
            self.model,
            models.trained_scheduler(),
        )
        pipe.to(torch.float16).save_pretrained(weights.sdxl, safe_serialization=True)


# ---------------------------------------------------------------- CLIP


POSE = {  # of a scene: (mean, standard deviation) over the training scenes
    "x": (0.5, 0.143),
    "y": (0.5, 0.143),
    "size": (sum(pictures.SIZE_RANGE) / 2, 0.064),
    "rotation": (0.0, 0.26),
}


def poses(scenes: Sequence[pictures.Scene]) -> torch.Tensor:
    """Place, size and rotation [n, 4], of mean 0 and variance 1; NaN: it looks the same turned."""
    rows = torch.tensor(
        [[(getattr(scene, name) - mean) / std for name, (mean, std) in POSE.items()]
         for scene in scenes]
    )  # fmt: skip
    round_ones = torch.tensor([scene.shape in ("circle", "ring") for scene in scenes])
    rows[round_ones, list(POSE).index("rotation")] = math.nan
    return rows


def pose_axes() -> torch.Tensor:
    """Orthonormal columns [D, 4]: the directions of the CLIP vector that hold the pose."""
    shape = (len(POSE), models.TRAINED.clip["embed_dim"])
    return torch.linalg.qr(torch.randn(shape, generator=torch.Generator().manual_seed(0)).T).Q


class ClipPart:
    """Picture ~ caption; superpixels (or a noisy picture) ~ caption; superpixels ~ own picture.

    Wrong answers to the last are the batch's other pictures and their rivals, which differ in
    place, size, rotation or one attribute: they keep place and shape. Captions that differ from a
    shown one in a single word are wrong answers, too: they keep every attribute.
    ``pose`` has the vector hold place, size and rotation along ``pose_axes``: no caption tells
    them, and without them a generator cannot but blur what it draws.
    ``gap`` pulls un-normalised pictures to their captions, since one adapter has to read both;
    ``spread`` fills the vector evenly.
    """

    name, learning_rate, weight_decay, ema_decay = "clip", 1e-3, 0.01, 0.998
    batch_size = 64
    weights: Mapping[str, float] = MappingProxyType(
        {"picture": 1.0, "view": 0.5, "own": 1.0, "gap": 0.5, "moments": 1.0, "overlap": 0.05,
         "pose": 1.0}
    )  # fmt: skip
    pose_gain = 2.0  # standard deviations of the embedding along a pose's axis

    def __init__(self, data: renders.Renders, batch_size: int | None) -> None:
        import open_clip

        self.data, self.batch_size = data, batch_size or self.batch_size
        self.model = models.build_clip(models.TRAINED)
        self.tokenizer = open_clip.get_tokenizer(models.CLIP_NAME)
        self.axes = pose_axes()
        self.pose = poses(data.scenes) * self.pose_gain
        self.rival_pose = poses(data.rival_scenes) * self.pose_gain
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]

    def pixels(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 [B, 64, 64, 3] -> as open_clip's transform makes them."""
        return ((as_pixels(pictures) + 1) / 2 - self.mean) / self.std

    def views(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Another version of each picture: a superpixel level where there is one, else noisy."""
        made = np.empty((len(rows), models.CLIP_PX, models.CLIP_PX, 3), np.uint8)
        for place, row in enumerate(rows):
            if row < len(self.data.superpixels):
                made[place] = self.data.superpixels[row, random.integers(3)]
            else:
                noise = random.normal(0, random.uniform(4, 24), made[place].shape)
                made[place] = np.clip(self.data.small[row] + noise, 0, 255)
        return made

    def texts(self, shown: Sequence[pictures.Concept], random: np.random.Generator) -> torch.Tensor:
        """Embedded captions [>= c, D] of the shown concepts, then of their near misses."""
        missed = [
            renders.near_miss(concept, random) for concept in shown for _ in range(NEAR_MISSES)
        ]
        return self.model.encode_text(
            self.tokenizer([pictures.scene_caption(concept) for concept in [*shown, *missed]])
        )

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        half = max(1, self.batch_size // renders.SCENES // 2)  # with superpixels, and others
        known = len(self.data.superpixels) // renders.SCENES
        others = known + random.permutation(len(self.data) // renders.SCENES - known)[:half]
        chosen = np.concatenate([random.permutation(known)[:half], others])
        rows = (chosen[:, None] * renders.SCENES + np.arange(renders.SCENES)).ravel()
        shown = [self.data.small[rows], self.data.rivals[rows], self.views(rows, random)]
        seen = self.model.encode_image(self.pixels(np.concatenate(shown)))
        picture, _, view = seen.chunk(3)
        text = self.texts([self.data.scenes[row] for row in rows[:: renders.SCENES]], random)
        scale = self.model.logit_scale.exp().clamp(max=100)
        pose = torch.cat([self.pose[rows], self.rival_pose[rows], self.pose[rows]])
        average = picture.unflatten(0, (-1, renders.SCENES)).mean(dim=1)
        parts = {
            "picture": grouped_contrast(picture, text, renders.SCENES, scale),
            "view": grouped_contrast(view, text, renders.SCENES, scale),
            "own": grouped_contrast(view, seen[: 2 * len(rows)], 1, scale),
            "gap": F.mse_loss(average, text[: len(average)]),
            "pose": (seen @ self.axes - pose).nan_to_num().square().mean(),
            **spread_penalties(text),
        }
        return {"loss": sum(self.weights[name] * part for name, part in parts.items()), **parts}

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        write_json(weights.clip_config, dict(models.TRAINED.clip))
        save_tensors(weights.clip_checkpoint, halved(self.model.state_dict()), about)


# ---------------------------------------------------------------- judge


class JudgePart:
    """Attributes of renders, with noise, blur and tints so that drawn pictures are in reach."""

    name, learning_rate, weight_decay, ema_decay = "judge", 1.5e-3, 0.01, 0.998
    batch_size = 64

    def __init__(self, data: renders.Renders, batch_size: int | None) -> None:
        self.data, self.batch_size = data, batch_size or self.batch_size
        self.model = judge.Judge()
        self.labels = judge.labels(data.scenes)

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = random.integers(len(self.data), size=self.batch_size)
        pixels = as_pixels(self.data.small[np.sort(rows)])
        if random.random() < 0.5:
            pixels = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = pixels + 0.1 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
        pixels = pixels + 0.03 * torch.randn(len(pixels), 3, 1, 1)
        answers = self.model(pixels)
        parts = {
            name: F.cross_entropy(logits, self.labels[name][np.sort(rows)])
            for name, logits in answers.items()
        }
        return {"loss": sum(parts.values()), **parts}

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        save_tensors(weights.judge, halved(self.model.state_dict()), about)


# ---------------------------------------------------------------- the stage


def make_part(
    name: str,
    data: renders.Renders,
    weights: models.Models,
    steps: int,
    batch_size: int | None,
    device: torch.device,
) -> Pretrained:
    """A part with its data; the generator reads the exported VAE and CLIP.

    ``device``: the generator's; the others are small and trained on the CPU.
    """
    if name == "vae":
        return VaePart(data, steps, batch_size)
    if name == "generator":
        return GeneratorPart(data, weights, steps, batch_size, device)
    return {"clip": ClipPart, "judge": JudgePart}[name](data, batch_size)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, in turn, and export each part as soon as it is trained."""
    options = args.resolve("pretrain", argv)
    values = options.values
    device = util.pick_device(values.device)
    names = PRETRAIN_STEPS if values.part == "all" else (values.part,)
    plan = [f"train {name} to step {getattr(values, f'{name}_steps')}" for name in names]
    run = open_run(options, values.output_path, {}, plan)
    data = renders.Renders(run.path / "cache", values.pictures, values.seed)
    weights = models.Models(run.path / "weights")
    if values.part == "generator" and not weights.folder.exists():
        util.LOG.info("the VAE and CLIP are the shipped ones, from %s", models.SHIPPED)
        shutil.copytree(models.SHIPPED, weights.folder)
    with loop.stop_requests() as stops:
        for name in names:
            steps = getattr(values, f"{name}_steps")
            trained = run.path / name / "trained.json"
            if trained.exists() and read_json(trained)["steps"] == steps:
                util.LOG.info("%s: already trained to step %d", name, steps)
                continue
            torch.manual_seed(util.seed_for(values.seed, name, "weights"))
            part = make_part(name, data, weights, steps, values.batch_size, device)
            fit_part(part, steps, run.path, values.seed, stops)
            about = {"steps": steps, "seed": values.seed, "pictures": len(data)}
            part.export(weights, about | {"commit": commit()})
            write_json(trained, about)
    print(f"weights: {weights.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
