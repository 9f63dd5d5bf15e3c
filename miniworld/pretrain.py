"""Train the miniatures: VAE, CLIP, judge, then SDXL's U-Net and the IP-Adapter together.

Every part resumes where it was saved; no random state is stored, each step's draws are recomputed
from (seed, part, step). What is trained is exported to ``RUN/weights`` by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import args

if __name__ == "__main__":
    args.answer_quick_questions("pretrain")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import engine
import util
from miniworld import judge, models, quality, renders

SAVE_EVERY_S = 60
EMA_DECAY = 0.998
WARMUP_STEPS = 100
COOLDOWN = 0.3  # share of the steps over which the learning rate falls to nothing
NEUTRAL = ("", "best quality, high quality",
           "monochrome, lowres, bad anatomy, worst quality, low quality")  # fmt: skip


class Part(Protocol):
    """Something to train: ``model`` holds all trained parameters."""

    name: str
    model: nn.Module
    learning_rate: float

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Losses of a batch, the total under ``loss``; torch's global generator is seeded."""
        ...


# ---------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Call:
    """How long this call may train, and where."""

    folder: Path  # of the run
    seed: int
    deadline: float  # time.monotonic()
    stops: Sequence[str]  # signals received

    def over(self) -> bool:
        return bool(self.stops) or time.monotonic() > self.deadline


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, constant, linear cool-down."""
    left = (steps - step) / max(1, round(COOLDOWN * steps))
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


class Training:
    """Optimiser, averaged weights and step of a part, saved as one file."""

    def __init__(self, part: Part, path: Path) -> None:
        self.part, self.path, self.step = part, path, 0
        self.optimizer = torch.optim.AdamW(
            part.model.parameters(), part.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = engine.Average(part.model, EMA_DECAY)
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            part.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.state = state["average"]
            self.step = state["step"]

    def save(self) -> None:
        state = {
            "model": self.part.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state,
            "step": self.step,
        }
        with util.atomic_write(self.path, "wb") as file:
            torch.save(state, file)

    def update(self, steps: int, seed: int) -> dict[str, torch.Tensor]:
        """One optimiser step; returns its losses."""
        torch.manual_seed(util.seed_for(seed, self.part.name, self.step))
        random = util.numpy_generator_for(seed, self.part.name, "batch", self.step)
        losses = self.part.losses(self.step, random)
        if not torch.isfinite(losses["loss"]):
            raise util.DataError(
                f"{self.part.name}, step {self.step}",
                "a loss that is not finite",
                "finite numbers",
                f"the last checkpoint is kept in {self.path}; lower the learning rate",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.part.learning_rate * rate(self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.part.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.part.model, self.step)
        return losses


def fit(part: Part, steps: int, call: Call) -> None:
    """Train to ``steps``, resuming; leaves the averaged weights in ``part.model``.

    Raises util.Preempted after saving, on a signal or when the call's time is over.
    """
    from tqdm import tqdm

    training = Training(part, call.folder / part.name / "state.pt")
    saved, sums, first = time.monotonic(), {}, training.step
    part.model.train()
    with tqdm(total=steps, initial=first, desc=part.name, unit="step") as bar:
        while training.step < steps:
            for name, value in training.update(steps, call.seed).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            bar.update()
            late = time.monotonic() - saved > SAVE_EVERY_S
            if late or call.over() or training.step == steps:
                training.save()
                record = {name: round(value / (training.step - first), 4) for name, value in
                          sums.items()} | {"part": part.name, "step": training.step}  # fmt: skip
                util.append_jsonl(call.folder / "metrics.jsonl", record)
                bar.set_postfix(loss=record["loss"])
                saved, sums, first = time.monotonic(), {}, training.step
            if call.over() and training.step < steps:
                raise util.Preempted(
                    f"{part.name}: saved at step {training.step} of {steps}; "
                    "the same command goes on"
                )
    part.model.load_state_dict(training.average.state)
    part.model.eval()


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- VAE


class VaePart:
    """Autoencoder: L1 + MSE + a little KL, on crops at first (4 x as many steps), then whole."""

    name, learning_rate = "vae", 1.5e-3
    batch_size, crop_px, crops_until = 8, 64, 0.7
    kl_weight = 1e-4

    def __init__(self, data: renders.Renders, steps: int, batch_size: int | None) -> None:
        self.data, self.steps = data, steps
        self.batch_size = batch_size or self.batch_size
        self.model = models.build_vae(models.TRAINED)

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = random.integers(len(self.data), size=self.batch_size)
        pictures = self.data.whole[np.sort(rows)]
        if step < self.crops_until * self.steps:
            # multiples of 8 px: patterns are fixed in the picture, and so are they in the latents
            top, left = 8 * random.integers((renders.SIZE_PX - self.crop_px) // 8 + 1, size=2)
            pictures = pictures[:, top : top + self.crop_px, left : left + self.crop_px]
        pixels = as_pixels(pictures)
        posterior = self.model.encode(pixels).latent_dist
        made = self.model.decode(posterior.sample()).sample
        l1, mse = F.l1_loss(made, pixels), F.mse_loss(made, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + mse + self.kl_weight * kl, "l1": l1, "mse": mse, "kl": kl}



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


def grouped_contrast(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> Any:
    """CLIP's loss where ``first`` [g * c, D] has g rows in a row for each of ``second`` [c, D]."""
    logits = scale * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    group = len(first) // len(second)
    mine = torch.arange(len(second)).repeat_interleave(group)
    back = logits.T.log_softmax(dim=1)[mine, torch.arange(len(first))].mean()
    return (F.cross_entropy(logits, mine) - back) / 2


class ClipPart:
    """Picture ~ caption; superpixels (or a noisy picture) ~ caption; superpixels ~ own picture.

    The last one has the same concept at another place in the batch: it keeps places in the
    embedding. A pull of un-normalised vectors towards their captions' closes the modality gap,
    which five embeddings through one adapter would feel.
    """

    name, learning_rate = "clip", 1.5e-3
    batch_size = 64

    def __init__(self, data: renders.Renders, batch_size: int | None) -> None:
        import open_clip

        self.data, self.batch_size = data, batch_size or self.batch_size
        self.model = models.build_clip(models.TRAINED)
        self.tokens = open_clip.get_tokenizer(models.CLIP_NAME)(data.captions[:: renders.SCENES])
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]

    def pixels(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 [B, 64, 64, 3] -> as open_clip's transform makes them."""
        return ((as_pixels(pictures) + 1) / 2 - self.mean) / self.std

    def views(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Another version of each picture: a superpixel level where there is one, else noisy."""
        made = np.empty((len(rows), renders.CLIP_PX, renders.CLIP_PX, 3), np.uint8)
        for place, row in enumerate(rows):
            if row < len(self.data.superpixels):
                made[place] = self.data.superpixels[row, random.integers(3)]
            else:
                noise = random.normal(0, random.uniform(4, 24), made[place].shape)
                made[place] = np.clip(self.data.small[row] + noise, 0, 255)
        return made

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        half = max(1, self.batch_size // renders.SCENES // 2)  # with superpixels, and others
        known = len(self.data.superpixels) // renders.SCENES
        chosen = np.concatenate(
            [
                random.permutation(known)[:half],
                known + random.permutation(len(self.data) // renders.SCENES - known)[:half],
            ]
        )
        rows = (chosen[:, None] * renders.SCENES + np.arange(renders.SCENES)).ravel()
        both = np.concatenate([self.data.small[rows], self.views(rows, random)])
        picture, view = self.model.encode_image(self.pixels(both)).chunk(2)
        text = self.model.encode_text(self.tokens[chosen])
        scale = self.model.logit_scale.exp().clamp(max=100)
        parts = {
            "picture": grouped_contrast(picture, text, scale),
            "view": grouped_contrast(view, text, scale),
            "own": grouped_contrast(view, picture, scale),
            "gap": F.mse_loss(picture, text.repeat_interleave(renders.SCENES, dim=0)),
            "norm": (text.square().mean(dim=1) - 1).square().mean(),
        }
        weights = {"picture": 1.0, "view": 0.5, "own": 0.5, "gap": 0.5, "norm": 0.1}
        return {"loss": sum(weights[name] * value for name, value in parts.items()), **parts}



# ---------------------------------------------------------------- judge


class JudgePart:
    """Attributes of renders, with noise, blur and tints so that drawn pictures are in reach."""

    name, learning_rate = "judge", 1.5e-3
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



# ---------------------------------------------------------------- SDXL's U-Net and the IP-Adapter


def set_adapter(unet: Any, clip_dim: int) -> injection.Injector:
    """The very modules that draw, made trainable; starts with little effect."""
    width = unet.config.cross_attention_dim
    weights = models.random_ip_adapter(unet, clip_dim, torch.Generator().manual_seed(0), gain=0.5)
    projection = {
        key.removeprefix("image_proj."): value
        for key, value in weights.items()
        if key.startswith("image_proj.")
    }
    flat = [value for key, value in weights.items() if key.startswith("ip_adapter.")]
    layers = tuple(zip(flat[::2], flat[1::2], strict=True))
    assert projection["norm.weight"].shape == (width,)
    injector = injection.Injector.install(
        unet, injection.IPAdapterWeights(Path("in training"), projection, layers)
    )
    for module in (injector.projection, *injector.processors):
        module.requires_grad_(True)
    return injector


class GeneratorPart:
    """v-prediction with zero terminal SNR; the adapter at scale 1 in all layers, as the real one.

    Most rows have a neutral prompt and the picture's own un-normalised CLIP embedding.
    """

    name, learning_rate = "generator", 1e-3
    batch_size = 32
    caption_share, embedding_dropout = 0.25, 0.08
    snr_limit = 5.0  # of SNR + 1: what is nearly clean counts less

    def __init__(self, data: renders.Renders, weights: Path, batch_size: int | None) -> None:
        self.batch_size = batch_size or self.batch_size
        unet = models.build_unet(models.TRAINED)
        self.injector = set_adapter(unet, models.TRAINED.clip["embed_dim"])
        self.model = nn.ModuleDict({"unet": unet, "projection": self.injector.projection})
        self.scheduler = models.trained_scheduler()
        vae = models.load_vae(weights)
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.latents = (encode_latents(vae, data.whole) - mean) / std
        self.embeddings = encode_embeddings(models.load_clip(weights), data.small)
        unique = sorted(set(data.captions))
        self.caption_of = torch.tensor([unique.index(text) for text in data.captions])
        self.captions = encode_texts(weights, unique)
        self.neutral = encode_texts(weights, NEUTRAL)

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

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        size = self.batch_size
        rows = torch.from_numpy(random.integers(len(self.latents), size=size))
        text, pooled = self.texts(rows, random)
        kept = torch.from_numpy(random.random(size) >= self.embedding_dropout)
        embeddings = self.embeddings[rows] * kept[:, None]
        self.injector.set(
            embeddings[:, None], torch.ones(size, 1, len(self.injector.layers)), guidance=False
        )
        # spread over all times within a batch: less variance than independent draws
        times = torch.from_numpy((np.arange(size) + random.random()) / size * 1000).long()
        clean = self.latents[rows]
        noise = torch.randn_like(clean)
        found = self.model["unet"](
            self.scheduler.add_noise(clean, noise, times),
            times,
            encoder_hidden_states=text,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(size, -1),
            },
        ).sample
        wanted = self.scheduler.get_velocity(clean, noise, times)
        error = (found - wanted).square().mean(dim=(1, 2, 3))
        signal = 1 / (1 - self.scheduler.alphas_cumprod[times])  # SNR + 1
        weight = signal.clamp(max=self.snr_limit) / signal
        self.injector.clear()
        return {"loss": (weight * error).mean(), "error": error.mean()}


@torch.no_grad()
def encode_embeddings(clip: Any, small: np.ndarray) -> torch.Tensor:
    """Un-normalised picture embeddings float32 [n, D] of uint8 [n, 64, 64, 3]."""
    from PIL import Image
    from tqdm import tqdm

    parts = []
    for start in tqdm(range(0, len(small), 128), desc="embeddings", unit="batch"):
        crops = [clip.transform(Image.fromarray(row)) for row in small[start : start + 128]]
        parts.append(clip.encode_pictures(torch.stack(crops)))
    return torch.cat(parts)


@torch.no_grad()
def encode_texts(weights: Path, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL reads of each text: float16 [n, 77, W] and [n, E]."""
    pipe = models.text_pipeline(weights)
    parts = [
        injection.encode_prompt(pipe, list(texts[start : start + 256]), None)
        for start in range(0, len(texts), 256)
    ]
    return tuple(
        torch.cat([getattr(part, name).half() for part in parts]) for name in ("text", "pooled")
    )
