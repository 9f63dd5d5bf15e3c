"""Training of SDXL's U-Net and the IP-Adapter together, on one GPU in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import modalities
from features.clip import load_clip
from miniworld import models, pictures, renders
from miniworld.latents import halved, whitened_latents
from rundirs.files import file_hash
from rundirs.tensors import load_tensors, save_tensors
from sdxl import sampler
from sdxl.adapter_file import IPAdapterWeights
from sdxl.attention import Injector
from sdxl.loading import load_sdxl

TIME_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)  # original size, crop, target size
NEUTRAL = ("", "best quality, high quality",
           "monochrome, lowres, bad anatomy, worst quality, low quality")  # fmt: skip


def set_adapter(unet: Any, clip_dim: int) -> Injector:
    """The very modules that draw, made trainable; starts with little effect."""
    tensors = models.adapter_tensors(unet, clip_dim, seed=0, value_gain=0.5)
    weights = IPAdapterWeights.from_tensors(Path("in training"), tensors)
    injector = Injector.install(unet, weights)
    for module in (injector.projection, *injector.processors):
        module.requires_grad_(True)
    return injector


class DenoisingLoss(nn.Module):
    """The loss of a batch, computed where its data lies, without a look at any value.

    So that a CUDA graph can hold it: at 9 million parameters, launching kernels takes longer than
    running them.
    """

    snr_limit = 5.0  # of SNR + 1: what is nearly clean counts less

    def __init__(self, unet: Any, injector: Injector, data: Mapping[str, torch.Tensor]) -> None:
        """``data``: latents [n, 4, 16, 16], embeddings [n, 2, D] of picture and caption,
        importance [n, 1, 16, 16]; text [p, 77, W] and pooled [p, E] of the prompts; signal [T],
        the scheduler's."""
        super().__init__()
        self.unet, self.projection = unet, injector.projection
        self.processors, self.data = injector.processors, data
        self.centre = data["embeddings"].mean(dim=0)
        self.spread = data["embeddings"].std(dim=0)
        self.time_ids = torch.tensor(TIME_IDS, device=self.centre.device)

    def forward(
        self,
        numbers: torch.Tensor,
        scales: torch.Tensor,
        blur: torch.Tensor,
        kept: torch.Tensor,
        noise: torch.Tensor,
        embedding_noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted and plain squared error []; arguments as in :meth:`GeneratorPart.draws`."""
        rows, prompts, times = numbers
        self._inject(self._blurred(rows, blur, embedding_noise) * kept[:, None, None], scales)
        clean, signal = self.data["latents"][rows], self.data["signal"][times]
        share, rest = (part.view(-1, 1, 1, 1) for part in (signal.sqrt(), (1 - signal).sqrt()))
        found = self.unet(
            share * clean + rest * noise,
            times,
            encoder_hidden_states=self.data["text"][prompts].float(),
            added_cond_kwargs={
                "text_embeds": self.data["pooled"][prompts].float(),
                "time_ids": self.time_ids.expand(len(rows), -1),
            },
        ).sample.float()
        squares = (found - (share * noise - rest * clean)).square()  # v of arXiv:2202.00512
        error = (squares * self.data["importance"][rows]).mean(dim=(1, 2, 3))
        ratio = 1 / (1 - signal)  # SNR + 1
        return (ratio.clamp(max=self.snr_limit) / ratio * error).mean(), error.mean()

    def _blurred(self, rows: torch.Tensor, blur: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, 2, D] as they would be estimated from ones with ``blur`` [B] times their
        deviation of noise on top, the least squares way."""
        own = self.data["embeddings"][rows] - self.centre
        level = blur[:, None, None]
        return self.centre + (own + level * self.spread * noise) / (1 + level.square())

    def _inject(self, embeddings: torch.Tensor, scales: torch.Tensor) -> None:
        tokens = self.projection(embeddings)
        for layer, processor in enumerate(self.processors):
            processor.hold_tokens(tokens, scales[:, :, layer])


class GeneratorPart:
    """v-prediction with zero terminal SNR; the adapter at scale 1 in all layers, as the real one.

    Most rows have a neutral prompt and the picture's own un-normalised CLIP embedding. Unlike the
    real adapter's, a share of the rows is injected at some sites only: SDXL's sites act alone, too
    (InstantStyle, arXiv:2404.02733), and miniature ones have to be made to. Another share sees
    its embedding blurred, as unCLIP's decoders do (arXiv:2204.06125, Stable unCLIP): predicted
    ones are, and a generator that has only seen clean ones draws blobs from them. In a third
    share the caption's embedding takes part of each site, as in the recipes: it knows no place,
    and the sites that do have to be followed. The object counts more than the ground, ten times
    its size and soon learned; so do the noise levels that decide on it.
    """

    # Adam moves weights whose gradient is mostly noise as far as all others: without decay kernels
    # quadrupled and the deep levels' input grew to a deviation of 30.
    name, learning_rate, weight_decay, ema_decay = "generator", 1e-3, 0.1, 0.999
    batch_size = 512
    caption_share, embedding_dropout = 0.1, 0.08
    few_sites_share = 0.3
    blurred_share, most_blur = 0.3, 2.0
    mixed_share = 0.4
    # At first the embedding enters at the 4 x 4 level only. Where all sites learn at once, the
    # 8 x 8 level is quicker, and then leaves nothing to learn for those below.
    deep_sites, deep_until = ("down.2", "mid", "up.0"), 0.2
    early_times = 0.6  # times are 1000 u^0.6: at 78 % of them the condition still matters
    object_weight = 4.0  # of latent cells within one of the object's

    def __init__(
        self,
        data: renders.Renders,
        weights: models.Models,
        steps: int,
        batch_size: int | None,
        device: torch.device,
    ) -> None:
        self.steps, self.batch_size = steps, batch_size or self.batch_size
        self.device = device
        # 3 x 3 convolutions of few channels are faster with channels last
        self.unet = models.build_unet(models.TRAINED).to(memory_format=torch.channels_last)
        self.unet.to(device)
        self.injector = set_adapter(self.unet, models.TRAINED.clip["embed_dim"])
        self.model = nn.ModuleDict({"unet": self.unet, "projection": self.injector.projection})
        unique = sorted(set(data.captions))
        number = {text: len(NEUTRAL) + place for place, text in enumerate(unique)}
        self.caption_of = np.array([number[text] for text in data.captions])
        held = training_data(data, weights, (*NEUTRAL, *unique), self.object_weight, device)
        self.denoising: Callable[..., tuple[torch.Tensor, torch.Tensor]] = DenoisingLoss(
            self.unet, self.injector, {name: part.to(device) for name, part in held.items()}
        )
        if device.type == "cuda":
            self.denoising = graphed(self.denoising, self.draws(0, np.random.default_rng(0)))

    def prompts(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Numbers [B] of the texts: a picture's caption, or one of the neutral prompts."""
        plain = random.integers(len(NEUTRAL), size=len(rows))
        told = random.random(len(rows)) < self.caption_share
        return np.where(told, self.caption_of[rows], plain)

    def scales(self, step: int, random: np.random.Generator) -> torch.Tensor:
        """Injection scales [B, 2, L] of picture and caption: together 1 at all sites, or in some
        rows at one site and perhaps more.

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
        layers = [layer.site for layer in self.injector.layers]
        whole = np.stack([chosen.get(site, nowhere) for site in layers], axis=1)
        shares = dict(zip(modalities.SITES, self.caption_shares(random).T, strict=True))
        told = np.stack([shares[site] for site in layers], axis=1)
        return torch.from_numpy(np.stack([whole * (1 - told), whole * told], axis=1)).float()

    def caption_shares(self, random: np.random.Generator) -> np.ndarray:
        """The caption's share [B, sites] of each site: none in most rows, else any, often all."""
        shape = (self.batch_size, len(modalities.SITES))
        mixed = random.random((shape[0], 1)) < self.mixed_share
        return mixed * (2 * random.random(shape) - 0.5).clip(0, 1)

    def draws(self, step: int, random: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Arguments of :class:`DenoisingLoss`: numbers [3, B] of pictures, prompts and times,
        scales [B, 2, L], blur and kept [B], noise [B, 4, 16, 16] and [B, 2, D] of embeddings.
        """
        size = self.batch_size
        rows = random.integers(len(self.caption_of), size=size)
        # spread over all times within a batch: less variance than independent draws
        even = (np.arange(size) + random.random()) / size
        times = (1000 * even**self.early_times).astype(int)
        blurred = random.random(size) < self.blurred_share
        small = (
            torch.from_numpy(np.stack([rows, self.prompts(rows, random), times])),
            self.scales(step, random),
            torch.from_numpy(blurred * random.random(size) * self.most_blur).float(),
            torch.from_numpy(random.random(size) >= self.embedding_dropout).float(),
        )
        cells, width = models.SIZE_PX // 8, models.TRAINED.clip["embed_dim"]
        return (
            *(part.to(self.device, non_blocking=True) for part in small),
            torch.randn(size, 4, cells, cells, device=self.device),
            torch.randn(size, 2, width, device=self.device),
        )

    def losses(self, step: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        loss, error = self.denoising(*self.draws(step, random))
        return {"loss": loss, "error": error}

    def export(self, weights: models.Models, about: Mapping[str, Any]) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        state = {name: tensor.cpu() for name, tensor in self.injector.state().items()}
        save_tensors(weights.ip_adapter, halved(state), about)
        self.unet.set_attn_processor(AttnProcessor2_0())  # the adapter has a file of its own
        plain = self.unet.cpu().half().to(memory_format=torch.contiguous_format)
        plain.save_pretrained(weights.sdxl / "unet", safe_serialization=True)


def graphed(denoising: DenoisingLoss, draws: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """``denoising``, forward and backward, as CUDA graphs, its products in bfloat16.

    ``draws``: an example, whose shapes are those of all later ones.
    """
    torch.backends.cudnn.benchmark = True  # the shapes never change
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        return torch.cuda.make_graphed_callables(denoising, draws)


def training_data(
    data: renders.Renders,
    weights: models.Models,
    prompts: Sequence[str],
    object_weight: float,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What :class:`DenoisingLoss` reads, on CPU; pictures are encoded on ``device``, once."""
    pipe = load_sdxl(weights.sdxl, torch.float32, "cpu")
    text, pooled = encode_texts(pipe, prompts)
    seen = kept(
        data.folder, "embeddings", weights.clip_checkpoint,
        lambda: embed_pictures(weights, data.small, device),
    )  # fmt: skip
    told = embed_captions(weights, data.captions)
    return {
        "latents": kept(
            data.folder, "latents", weights.sdxl / "vae" / models.WEIGHTS_FILE,
            lambda: whitened_latents(pipe.vae.to(device), data.whole),
        ),
        "embeddings": torch.stack([seen, told], dim=1),
        "importance": importance(data.scenes, object_weight),
        "text": text,
        "pooled": pooled,
        "signal": models.trained_scheduler().alphas_cumprod,
    }  # fmt: skip


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
def embed_pictures(weights: models.Models, small: np.ndarray, device: torch.device) -> torch.Tensor:
    """Un-normalised CLIP embeddings float32 [n, D] on CPU of uint8 [n, 64, 64, 3]."""
    from PIL import Image

    from rundirs.progress import Progress

    clip = load_clip(str(weights.clip_config), str(weights.clip_checkpoint), device)
    parts = []
    for start in Progress(range(0, len(small), 128), desc="embeddings", unit="batch"):
        crops = [clip.transform(Image.fromarray(row)) for row in small[start : start + 128]]
        parts.append(clip.encode_pictures(torch.stack(crops)).cpu())
    return torch.cat(parts)


def embed_captions(weights: models.Models, captions: Sequence[str]) -> torch.Tensor:
    """Un-normalised CLIP embeddings float32 [n, D] on CPU; each text is encoded once."""
    clip = load_clip(str(weights.clip_config), str(weights.clip_checkpoint), torch.device("cpu"))
    unique = sorted(set(captions))
    place = {text: row for row, text in enumerate(unique)}
    parts = [clip.encode_texts(unique[i : i + 256]) for i in range(0, len(unique), 256)]
    return torch.cat(parts)[[place[text] for text in captions]]


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
