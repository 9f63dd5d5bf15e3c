"""Train the miniatures: VAE, CLIP, judge, then SDXL's U-Net and the IP-Adapter together.

Every part resumes where it was saved; no random state is stored, each step's draws are recomputed
from (seed, part, step). What is trained is exported to ``RUN/weights`` by the same command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("pretrain")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import modalities
import util
from cli.miniature import PRETRAIN_STEPS
from features.clip import load_clip
from miniworld import judge, models, pictures, renders
from miniworld.clip_losses import grouped_contrast, spread_penalties
from miniworld.fitting import Pretrained, fit_part
from rundirs.directory import open_run
from rundirs.environment import commit
from rundirs.files import file_hash, read_json, write_json
from rundirs.tensors import load_tensors, save_tensors
from sdxl import sampler
from sdxl.adapter_file import IPAdapterWeights
from sdxl.attention import Injector
from sdxl.loading import load_sdxl
from training import loop

L1_WEIGHT = 0.125  # beside the squared error: edges a little sharper
NEAR_MISSES = 6  # wrong captions for each picture of a CLIP batch
STATISTICS_OF = 512  # pictures that give the latents' mean and standard deviation
TIME_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)  # original size, crop, target size
NEUTRAL = ("", "best quality, high quality",
           "monochrome, lowres, bad anatomy, worst quality, low quality")  # fmt: skip


# ---------------------------------------------------------------- as stored


def halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As shipped: float16, which halves the files; whole numbers stay."""
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


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


@torch.no_grad()
def encode_latents(vae: Any, pictures: np.ndarray) -> torch.Tensor:
    """Posterior means float32 [n, 4, 16, 16] of uint8 [n, 128, 128, 3]."""
    from tqdm import tqdm

    starts = tqdm(range(0, len(pictures), 32), desc="latents", unit="batch")
    parts = [vae.encode(as_pixels(pictures[i : i + 32])).latent_dist.mean for i in starts]
    return torch.cat(parts)


def set_latent_statistics(vae: Any, pictures: np.ndarray) -> None:
    """Measure what diffusers divides latents by: mean and std of each channel."""
    latents = encode_latents(vae, pictures)
    vae.register_to_config(
        scaling_factor=1.0,
        latents_mean=latents.mean(dim=(0, 2, 3)).tolist(),
        latents_std=latents.std(dim=(0, 2, 3)).tolist(),
    )


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


# ---------------------------------------------------------------- SDXL's U-Net and the IP-Adapter


def set_adapter(unet: Any, clip_dim: int) -> Injector:
    """The very modules that draw, made trainable; starts with little effect."""
    tensors = models.adapter_tensors(unet, clip_dim, seed=0, value_gain=0.5)
    weights = IPAdapterWeights.from_tensors(Path("in training"), tensors)
    injector = Injector.install(unet, weights)
    for module in (injector.projection, *injector.processors):
        module.requires_grad_(True)
    return injector


class GeneratorPart:
    """v-prediction with zero terminal SNR; the adapter at scale 1 in all layers, as the real one.

    Most rows have a neutral prompt and the picture's own un-normalised CLIP embedding. Unlike the
    real adapter's, a share of the rows is injected at some sites only: SDXL's sites act alone, too
    (InstantStyle, arXiv:2404.02733), and miniature ones have to be made to. The object counts more
    than the ground, ten times its size and soon learned; so do the noise levels that decide on it.
    """

    # Adam moves weights whose gradient is mostly noise as far as all others: without decay kernels
    # quadrupled and the deep levels' input grew to a deviation of 30.
    name, learning_rate, weight_decay, ema_decay = "generator", 8e-4, 0.1, 0.999
    batch_size = 16
    caption_share, embedding_dropout = 0.1, 0.08
    few_sites_share = 0.3
    # At first the embedding enters at the 4 x 4 level only. Where all sites learn at once, the
    # 8 x 8 level is quicker, and then leaves nothing to learn for those below.
    deep_sites, deep_until = ("down.2", "mid", "up.0"), 0.3
    snr_limit = 5.0  # of SNR + 1: what is nearly clean counts less
    early_times = 0.6  # times are 1000 u^0.6: at 78 % of them the condition still matters
    object_weight = 4.0  # of latent cells within one of the object's

    def __init__(
        self, data: renders.Renders, weights: models.Models, steps: int, batch_size: int | None
    ) -> None:
        self.steps, self.batch_size = steps, batch_size or self.batch_size
        # 3 x 3 convolutions of few channels are faster on CPU with channels last
        self.unet = models.build_unet(models.TRAINED).to(memory_format=torch.channels_last)
        self.injector = set_adapter(self.unet, models.TRAINED.clip["embed_dim"])
        self.model = nn.ModuleDict({"unet": self.unet, "projection": self.injector.projection})
        self.scheduler = models.trained_scheduler()
        pipe = load_sdxl(weights.sdxl, torch.float32, "cpu")
        self.latents = kept(
            data.folder, "latents", weights.sdxl / "vae" / models.WEIGHTS_FILE,
            lambda: whitened_latents(pipe.vae, data.whole),
        )  # fmt: skip
        self.embeddings = kept(
            data.folder, "embeddings", weights.clip_checkpoint,
            lambda: embed_pictures(weights, data.small),
        )  # fmt: skip
        self.importance = importance(data.scenes, self.object_weight)
        unique = sorted(set(data.captions))
        self.caption_of = torch.tensor([unique.index(text) for text in data.captions])
        self.captions, self.neutral = encode_texts(pipe, unique), encode_texts(pipe, NEUTRAL)

    def texts(self, rows: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Hidden states [B, 77, W] and pooled [B, E]: a caption, or one of the neutral prompts."""
        plain = torch.from_numpy(random.integers(len(NEUTRAL), size=len(rows)))
        told = torch.from_numpy(random.random(len(rows)) < self.caption_share)
        return tuple(
            torch.where(
                told.view(-1, *[1] * (part.ndim - 1)), part[self.caption_of[rows]], other[plain]
            ).float()
            for part, other in zip(self.captions, self.neutral, strict=True)
        )

    def scales(self, step: int, random: np.random.Generator) -> torch.Tensor:
        """Injection scales [B, 1, L]: 1 at all sites, or in some rows at one site and perhaps more.

        Squaring the chance of the others makes a site alone the most frequent case. Only
        ``deep_sites`` count as sites in the first ``deep_until`` of the steps.
        """
        early = step < self.deep_until * self.steps
        names = self.deep_sites if early else tuple(modalities.SITES)
        shape = (self.batch_size, len(names))
        more = random.random(shape) < random.random((shape[0], 1)) ** 2
        alone = random.integers(shape[1], size=(shape[0], 1)) == np.arange(shape[1])
        everywhere = random.random((shape[0], 1)) >= self.few_sites_share
        chosen = dict(zip(names, (more | alone | everywhere).T, strict=True))
        nowhere = np.zeros(shape[0], bool)
        columns = [chosen.get(layer.site, nowhere) for layer in self.injector.layers]
        return torch.from_numpy(np.stack(columns, axis=1)).float()[:, None]

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        size = self.batch_size
        rows = torch.from_numpy(random.integers(len(self.latents), size=size))
        text, pooled = self.texts(rows, random)
        kept = torch.from_numpy(random.random(size) >= self.embedding_dropout)
        embeddings = self.embeddings[rows] * kept[:, None]
        self.injector.set(embeddings[:, None], self.scales(step, random), guidance=False)
        # spread over all times within a batch: less variance than independent draws
        even = (np.arange(size) + random.random()) / size
        times = torch.from_numpy(1000 * even**self.early_times).long()
        clean = self.latents[rows]
        noise = torch.randn_like(clean)
        found = self.unet(
            self.scheduler.add_noise(clean, noise, times),
            times,
            encoder_hidden_states=text,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor(TIME_IDS).expand(size, -1),
            },
        ).sample
        wanted = self.scheduler.get_velocity(clean, noise, times)
        squares = (found - wanted).square() * self.importance[rows]
        error = squares.mean(dim=(1, 2, 3))
        signal = 1 / (1 - self.scheduler.alphas_cumprod[times])  # SNR + 1
        weight = signal.clamp(max=self.snr_limit) / signal
        self.injector.clear()
        return {"loss": (weight * error).mean(), "error": error.mean()}

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        save_tensors(weights.ip_adapter, halved(self.injector.state()), about)
        self.unet.set_attn_processor(AttnProcessor2_0())  # the adapter has a file of its own
        plain = self.unet.half().to(memory_format=torch.contiguous_format)
        plain.save_pretrained(weights.sdxl / "unet", safe_serialization=True)


def importance(scenes: Sequence[pictures.Scene], object_weight: float) -> torch.Tensor:
    """Weights [n, 1, 16, 16] of mean 1: at the object ``object_weight`` times the ground's."""
    cells = models.SIZE_PX // 8
    masks = [pictures.object_coverage(scene, cells) for scene in scenes]
    near = F.max_pool2d(torch.from_numpy(np.stack(masks))[:, None], 3, stride=1, padding=1)
    weights = torch.where(near > 0, object_weight, 1.0)
    return weights / weights.mean()


def kept(folder: Path, what: str, encoder: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``make()``, or what it gave before with the same weights in ``encoder``."""
    path = folder / f"{what}-{file_hash(encoder)[:12]}.safetensors"
    if not path.exists():
        save_tensors(path, {what: make()}, {})
    return load_tensors(path)[0][what]


@torch.no_grad()
def whitened_latents(vae: Any, whole: np.ndarray) -> torch.Tensor:
    """What the U-Net sees of uint8 [n, 128, 128, 3]: float32 [n, 4, 16, 16]."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (encode_latents(vae, whole) - mean) / std


@torch.no_grad()
def embed_pictures(weights: models.Models, small: np.ndarray) -> torch.Tensor:
    """Un-normalised CLIP embeddings float32 [n, D] of uint8 [n, 64, 64, 3]."""
    from PIL import Image
    from tqdm import tqdm

    clip = load_clip(str(weights.clip_config), str(weights.clip_checkpoint), torch.device("cpu"))
    parts = []
    for start in tqdm(range(0, len(small), 128), desc="embeddings", unit="batch"):
        crops = [clip.transform(Image.fromarray(row)) for row in small[start : start + 128]]
        parts.append(clip.encode_pictures(torch.stack(crops)))
    return torch.cat(parts)


@torch.no_grad()
def encode_texts(pipe: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL reads of each text: float16 [n, 77, W] and [n, E]."""
    parts = [
        sampler.encode_prompt(pipe, list(texts[start : start + 256]))
        for start in range(0, len(texts), 256)
    ]
    return tuple(
        torch.cat([getattr(part, name).half() for part in parts]) for name in ("text", "pooled")
    )


# ---------------------------------------------------------------- the stage


def make_part(
    name: str, data: renders.Renders, weights: models.Models, steps: int, batch_size: int | None
) -> Pretrained:
    """A part with its data; the generator reads the exported VAE and CLIP."""
    if name == "vae":
        return VaePart(data, steps, batch_size)
    if name == "generator":
        return GeneratorPart(data, weights, steps, batch_size)
    return {"clip": ClipPart, "judge": JudgePart}[name](data, batch_size)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, in turn, and export each part as soon as it is trained."""
    options = args.resolve("pretrain", argv)
    values = options.values
    names = PRETRAIN_STEPS if values.part == "all" else (values.part,)
    plan = [f"train {name} to step {getattr(values, f'{name}_steps')}" for name in names]
    run = open_run(options, values.output_path, {}, plan)
    data = renders.Renders(run.path / "cache", values.pictures, values.seed)
    weights = models.Models(run.path / "weights")
    with loop.stop_requests() as stops:
        for name in names:
            steps = getattr(values, f"{name}_steps")
            trained = run.path / name / "trained.json"
            if trained.exists() and read_json(trained)["steps"] == steps:
                util.LOG.info("%s: already trained to step %d", name, steps)
                continue
            torch.manual_seed(util.seed_for(values.seed, name, "weights"))
            part = make_part(name, data, weights, steps, values.batch_size)
            fit_part(part, steps, run.path, values.seed, stops)
            about = {"steps": steps, "seed": values.seed, "pictures": len(data)}
            part.export(weights, about | {"commit": commit()})
            write_json(trained, about)
    print(f"weights: {weights.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
