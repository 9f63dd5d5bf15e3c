"""SDXL with the adapter installed: from tasks to pictures, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import util
from sdxl import sampler
from sdxl.adapter_file import read_ip_adapter
from sdxl.attention import Injector
from sdxl.loading import load_sdxl
from sdxl.memory import forget_peak, largest_batch, peak_memory
from sdxl.schedulers import set_scheduler

MOST_ON_CPU = 32  # pictures at once: more are no faster there


@dataclass(frozen=True)
class Task:
    """One picture to draw: the test ``row`` it shows and ``names``, the recipes that equal it.

    ``draw``: from which of a stimulus' noises, 0 where there is one.
    """

    row: int
    names: tuple[str, ...]
    scales: torch.Tensor  # [M, L]
    draw: int = 0


@dataclass(frozen=True)
class Renderer:
    """SDXL with the adapter installed, and the drawing options that all pictures share."""

    pipe: Any
    injector: Injector
    prompts: sampler.PromptEmbeds  # encoded once: for all rows, or one per row of the test set
    how: sampler.Denoising
    seed: int
    starts: torch.Tensor | None = None  # [n, 4, h, w]: latents of what each embedding row begins as

    def latents(
        self,
        tasks: Sequence[Task],
        embeddings: torch.Tensor,
        ids: Sequence[int],
        places: Mapping[int, int],
    ) -> torch.Tensor:
        """Latents [B, 4, h, w] of embeddings [n, M, D].

        ``places``: test row -> embedding row; ``ids``: the stimulus of each test row.
        """
        rows = [task.row for task in tasks]
        at = [places[row] for row in rows]
        one = len(self.prompts.text) == 1
        return sampler.denoise(
            self.pipe,
            self.injector,
            embeddings[at],
            torch.stack([task.scales for task in tasks]),
            [noise_seed(self.seed, ids[task.row], task.draw) for task in tasks],
            self.prompts if one else self.prompts.chosen(rows),
            self.how,
            None if self.starts is None else self.starts[at],
        )

    def draw(
        self,
        tasks: Sequence[Task],
        embeddings: torch.Tensor,
        ids: Sequence[int],
        places: Mapping[int, int],
    ) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3], see :meth:`latents`."""
        return sampler.pictures_of(self.pipe, self.latents(tasks, embeddings, ids, places))


def noise_seed(seed: int, stimulus: int, draw: int) -> int:
    """Of a stimulus' noise, whatever else is drawn."""
    return util.seed_for(seed, "sdxl", stimulus, *((draw,) if draw else ()))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return names.get(precision, torch.float16 if device.type == "cuda" else torch.float32)


def drawn_batches(
    tasks: Sequence[Task], size: int, draw: Callable[[Sequence[Task]], np.ndarray], halve: bool
) -> Iterator[tuple[Sequence[Task], np.ndarray]]:
    """(tasks, pictures) of every batch. ``halve``: from where the GPU's memory does not suffice.

    Raises UserError where it does not and the size is given, or is 1.
    """
    start = 0
    while start < len(tasks):
        batch = tasks[start : start + size]
        try:
            pictures = draw(batch)
        except torch.cuda.OutOfMemoryError as error:
            if not halve or len(batch) == 1:
                raise util.UserError(
                    "--batch_size",
                    f"{len(batch)} pictures at once do not fit ({error})",
                    "what the GPU's free memory holds",
                    "give --batch_size auto, a smaller --size, or --offload",
                ) from None
            size = len(batch) // 2
            torch.cuda.empty_cache()
            util.LOG.warning("out of memory: going on with batches of %d", size)
            continue
        yield batch, pictures
        start += len(batch)


def fitting_batch(
    renderer: Renderer, latents: Callable[[Renderer, int], torch.Tensor], most: int
) -> int:
    """How many pictures can be denoised at once; on a CPU no more than help.

    ``latents(renderer, n)`` denoises n pictures. They are decoded in small parts in turn: what that
    takes beyond denoising one picture is set aside, however many there are.
    """
    device = renderer.pipe._execution_device
    quick = replace(renderer, how=replace(renderer.how, steps=1, strength=1.0))
    forget_peak(device)
    one = latents(quick, 1)
    denoising = peak_memory(device)
    forget_peak(device)
    sampler.decode_latents(quick.pipe, one)
    decoding = max(0, peak_memory(device) - denoising)
    limit = most if device.type == "cuda" else min(most, MOST_ON_CPU)
    found = largest_batch(lambda rows: latents(quick, rows), limit, device, decoding)
    util.LOG.info("batch size %d", found)
    return found


@dataclass(frozen=True)
class Rendering:
    """SDXL, its adapter and how they draw; names as the flags of ``args.py``."""

    sd_model_path: str
    ip_adapter_path: Path
    vae_path: str | None
    precision: str
    offload: bool
    compile: bool
    scheduler: str | None
    timestep_spacing: str | None
    negative_prompt: str
    steps: int
    guidance: float
    guidance_interval: list[float]
    size: int
    init: str
    init_strength: float
    seed: int

    @property
    def from_picture(self) -> bool:
        """Whether drawing begins from a coarse picture, not from noise alone."""
        return self.init == "superpixel"

    @property
    def denoising(self) -> sampler.Denoising:
        strength = self.init_strength if self.from_picture else 1.0
        interval = tuple(self.guidance_interval)
        return sampler.Denoising(self.steps, self.guidance, self.size, interval, strength)


def open_renderer(asked: Rendering, device: torch.device, prompts: Sequence[str]) -> Renderer:
    """SDXL with the adapter, the scheduler and the options of this call."""
    pipe = load_sdxl(
        asked.sd_model_path,
        pick_dtype(asked.precision, device),
        "cpu" if asked.offload else device,
        asked.vae_path,
    )
    set_scheduler(pipe, asked.scheduler, asked.timestep_spacing)
    injector = Injector.install(pipe.unet, read_ip_adapter(asked.ip_adapter_path))
    if asked.offload:
        pipe.enable_model_cpu_offload(device=device)
    if asked.compile:
        pipe.unet.compile()
    encoded = sampler.encode_prompt(pipe, list(prompts), [asked.negative_prompt] * len(prompts))
    return Renderer(pipe, injector, encoded, asked.denoising, asked.seed)
