"""Train the miniatures: VAE, CLIP, judge, then SDXL's U-Net and the IP-Adapter together.

Every part resumes where it was saved; no random state is stored, each step's draws are recomputed
from (seed, part, step). What is trained is exported to ``RUN/weights`` by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
import injection
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

    def score(self) -> dict[str, float]:
        """Measures on unseen validation pictures, with averaged weights."""
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

    def score(self) -> dict[str, float]:
        return quality.vae_psnr(self.model, "validation", 64)


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
