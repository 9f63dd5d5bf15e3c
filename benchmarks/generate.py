"""Speed and memory of drawing beside diffusers' own route to IP-Adapter, side by side in one run.

    python benchmarks/generate.py --json generate.json

Both baselines hold one copy of the adapter per modality. "published" draws one stimulus and one
recipe per call, from text, as published scripts do; "stock" draws one recipe of many stimuli per
call, at its best batch size, from encoded text. The miniature SDXL draws; nothing is timed before
all three have drawn the same pictures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import args
import util
from datafiles import superpixel
from features.clip import load_clip
from generation import variants
from miniworld import models, pictures, renders
from modalities import NAMES, recipes
from rundirs.environment import environment
from rundirs.files import write_json
from sdxl import injection_map, sampler
from sdxl.adapter_file import read_ip_adapter
from sdxl.attention import InjectedAttention, Injector, layers_of
from sdxl.loading import load_sdxl, quiet_loading

WEIGHTS = models.Models(models.SHIPPED)
STOCK_BATCHES = (4, 8, 16, 32)  # tried once; the fastest is timed
LEVELS_APART = 2  # of 255: what another order of float32 sums may change
MEMORY_CALLS = 3  # of each route, in a process of its own
# batch (two rows per picture with guidance), image positions, width, heads of SDXL's attention
ATTENTION = {
    "ip_attention_b2_n4096": (2, 4096, 640, 10),
    "ip_attention_b2_n1024": (2, 1024, 1280, 20),
    "ip_attention_b8_n1024": (8, 1024, 1280, 20),
}
ATTENTION_ROUNDS = 5  # per repeat
TOKEN_WIDTH, TOKENS, SDXL_STEPS = 2048, 4, 30

Drawn = dict[tuple[int, str], np.ndarray]  # (stimulus, recipe) -> uint8 [H, W, 3]
Unit = Callable[[], Drawn]  # one call of a route


@dataclass(frozen=True)
class Work:
    """What all routes draw: every recipe of mode ``all`` for each stimulus."""

    embeddings: torch.Tensor  # [N, M, D]
    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    size: int
    seed: int

    @property
    def stimuli(self) -> range:
        return range(len(self.embeddings))

    @property
    def pictures(self) -> int:
        """Delivered by every route, drawn twice or not."""
        return len(self.embeddings) * len(recipes("all"))

    def seeds(self, stimuli: Sequence[int]) -> list[int]:
        return [util.seed_for(self.seed, "sdxl", stimulus) for stimulus in stimuli]


def clip_embeddings(n: int, seed: int) -> torch.Tensor:
    """The miniature CLIP's five embeddings of n unseen renders, float32 [n, M, D]."""
    from PIL import Image

    clip = load_clip(str(WEIGHTS.clip_config), str(WEIGHTS.clip_checkpoint), torch.device("cpu"))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    scenes = renders.unseen_scenes("test", n, seed)
    for scene in scenes:
        picture = pictures.render(scene, models.CLIP_PX)
        for name, view in {"image": picture, **superpixel.superpixels(picture)}.items():
            found[name].append(clip.transform(Image.fromarray(view)))
    with torch.no_grad():
        vectors = {
            name: clip.encode_pictures(torch.stack(crops)) for name, crops in found.items() if crops
        }
        vectors["text"] = clip.encode_texts([pictures.scene_caption(scene) for scene in scenes])
    return torch.stack([vectors[name] for name in NAMES], dim=1)


# ---------------------------------------------------------------- ours


@dataclass(frozen=True)
class Ours:
    """This project's route: one adapter copy, distinct pictures only, mixed in batches."""

    work: Work
    pipe: Any
    injector: Injector
    prompt: sampler.PromptEmbeds
    batch: int

    @classmethod
    def load(cls, work: Work, batch: int) -> Ours:
        pipe = load_sdxl(WEIGHTS.sdxl, torch.float32, "cpu")
        injector = Injector.install(pipe.unet, read_ip_adapter(WEIGHTS.ip_adapter))
        prompt = sampler.encode_prompt(pipe, [work.prompt], [work.negative_prompt])
        return cls(work, pipe, injector, prompt, batch)

    @functools.cached_property
    def distinct(self) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        """(names, scales [M, L]) of the recipes that differ, as generate.py draws them."""
        preset = injection_map.load_injection("intent")
        families = variants.families("all", None, preset, self.injector.layers, strength=1.0)
        return variants.distinct([item for family in families for item in family.variants])

    def units(self, stimuli: Sequence[int]) -> list[Unit]:
        tasks = [(row, names, table) for row in stimuli for names, table in self.distinct]
        return [functools.partial(self.draw, batch) for batch in cut(tasks, self.batch)]

    def draw(self, tasks: Sequence[tuple[int, tuple[str, ...], torch.Tensor]]) -> Drawn:
        rows = [row for row, _, _ in tasks]
        work = self.work
        latents = sampler.denoise(
            self.pipe,
            self.injector,
            work.embeddings[rows],
            torch.stack([table for _, _, table in tasks]),
            work.seeds(rows),
            self.prompt,
            sampler.Denoising(work.steps, work.guidance, work.size),
        )
        made = sampler.pictures_of(self.pipe, latents)
        return {
            (row, name): picture
            for (row, names, _), picture in zip(tasks, made, strict=True)
            for name in names
        }


def cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# ---------------------------------------------------------------- diffusers


@dataclass(frozen=True)
class Stock:
    """diffusers' route: a copy of the adapter per modality, one scale for a whole batch.

    ``encoded``: the text, for all calls; None: every call encodes it.
    """

    work: Work
    pipe: Any
    tables: Mapping[str, torch.Tensor]  # recipe -> scales [M, L]
    encoded: sampler.PromptEmbeds | None
    batch: int

    @classmethod
    def load(cls, work: Work) -> Stock:
        """The published way; raises SystemExit if diffusers' scales are not those of the map."""
        from diffusers import StableDiffusionXLPipeline
        from diffusers.utils import logging

        quiet_loading()
        pipe = StableDiffusionXLPipeline.from_pretrained(
            str(WEIGHTS.sdxl), dtype=torch.float32, local_files_only=True, add_watermarker=False
        )
        pipe.set_progress_bar_config(disable=True)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # five warnings that no image encoder was loaded
        pipe.load_ip_adapter(
            [str(WEIGHTS.ip_adapter.parent)] * len(NAMES),
            subfolder="",
            weight_name=[WEIGHTS.ip_adapter.name] * len(NAMES),
            image_encoder_folder=None,
            local_files_only=True,
        )
        logging.set_verbosity(verbosity)
        layers = layers_of(pipe.unet)
        tables = {
            recipe.name: injection_map.scales(recipe, layers=layers) for recipe in recipes("all")
        }
        made = cls(work, pipe, tables, None, 1)
        made.check_scales()
        return made

    def batched(self, batch: int) -> Stock:
        """The same models with more rows per call, the text encoded once.

        The pipeline means its embeddings for every row of a call, and repeats them once per row;
        so it is told that ours are the rows' own.
        """
        work = self.work
        pipe = type(self.pipe)(**self.pipe.components, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.prepare_ip_adapter_image_embeds = lambda _image, embeds, *_: embeds
        encoded = sampler.encode_prompt(pipe, [work.prompt], [work.negative_prompt])
        return Stock(work, pipe, self.tables, encoded, batch)

    def adapters(self) -> list[Any]:
        """The attention processors with adapter weights, in the order of the layers."""
        return [item for name, item in self.pipe.unet.attn_processors.items() if "attn2" in name]

    def check_scales(self) -> None:
        for name, table in self.tables.items():
            self.set_scales(name)
            found = torch.tensor([processor.scale for processor in self.adapters()]).T
            if not torch.equal(found, table):
                raise SystemExit(f"{name}: diffusers' scales {found} are not the map's {table}")

    def set_scales(self, recipe: str) -> None:
        layers, forms = layers_of(self.pipe.unet), []
        for row in self.tables[recipe].tolist():
            form: dict[str, Any] = {"down": {}, "up": {}, "mid": 0.0}
            for layer, scale in zip(layers, row, strict=True):
                way, _, block = layer.site.partition(".")
                if block:
                    form[way][f"block_{block}"] = scale
                else:
                    form[way] = scale
            forms.append(form)
        self.pipe.set_ip_adapter_scale(forms)

    def seconds_to_set_scales(self) -> float:
        """Of each call: diffusers lists all weights of the U-Net for every modality."""
        found = []
        for recipe in self.tables:
            started = time.perf_counter()
            self.set_scales(recipe)
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def units(self, stimuli: Sequence[int]) -> list[Unit]:
        """Every recipe of every ``batch`` stimuli."""
        calls = [
            (rows, recipe)
            for rows, recipe in itertools.product(cut(stimuli, self.batch), self.tables)
        ]
        return [functools.partial(self.draw, rows, recipe) for rows, recipe in calls]

    def draw(self, rows: Sequence[int], recipe: str) -> Drawn:
        work = self.work
        self.set_scales(recipe)
        vectors = work.embeddings[list(rows)]
        pairs = torch.cat([torch.zeros_like(vectors), vectors])  # negative rows read zeros
        side = work.size // self.pipe.vae_scale_factor
        noise = [
            torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
            for seed in work.seeds(rows)
        ]
        images = self.pipe(
            **self.text(len(rows)),
            ip_adapter_image_embeds=[pairs[:, [m]] for m in range(len(NAMES))],
            latents=torch.cat(noise),
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            height=work.size,
            width=work.size,
            output_type="pt",
        ).images
        made = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return {(row, recipe): picture for row, picture in zip(rows, made, strict=True)}

    def text(self, rows: int) -> dict[str, Any]:
        """The pipeline's arguments for the prompt."""
        if self.encoded is None:
            texts = {"prompt": self.work.prompt, "negative_prompt": self.work.negative_prompt}
            return {key: [text] * rows for key, text in texts.items()}
        encoded = {
            "prompt_embeds": self.encoded.text,
            "pooled_prompt_embeds": self.encoded.pooled,
            "negative_prompt_embeds": self.encoded.negative,
            "negative_pooled_prompt_embeds": self.encoded.negative_pooled,
        }
        return {key: part.expand(rows, *part.shape[1:]) for key, part in encoded.items()}


# ---------------------------------------------------------------- pictures per second


def interleaved(sides: Mapping[str, Sequence[Unit]]) -> tuple[dict[str, float], dict[str, Drawn]]:
    """Seconds and pictures of each side; whichever is furthest behind has the next turn.

    So a busy minute of the machine slows all sides, not one.
    """
    from tqdm import tqdm

    done, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
    drawn: dict[str, Drawn] = {name: {} for name in sides}
    calls = sum(len(units) for units in sides.values())
    for _ in tqdm(range(calls), desc="drawing", unit="call", leave=False):
        waiting = [name for name, units in sides.items() if done[name] < len(units)]
        name = min(waiting, key=lambda name: done[name] / len(sides[name]))
        started = time.perf_counter()
        made = sides[name][done[name]]()
        seconds[name] += time.perf_counter() - started
        drawn[name] |= made
        done[name] += 1
    return seconds, drawn


def levels_apart(drawn: Mapping[str, Drawn]) -> int:
    """Largest difference of a pixel from ours. SystemExit if it is not the same picture."""
    ours, largest = drawn["ours"], 0
    for name, theirs in drawn.items():
        if theirs.keys() != ours.keys():
            raise SystemExit(f"{name} drew {len(theirs)} pictures, ours {len(ours)}")
        for key, picture in theirs.items():
            apart = int(np.abs(picture.astype(int) - ours[key]).max())
            if apart > LEVELS_APART:
                raise SystemExit(f"{name} and ours draw other pictures: {key}, {apart} of 255")
            largest = max(largest, apart)
    return largest


def best_batch(stock: Stock) -> tuple[Stock, dict[int, float]]:
    """Stock at the batch size that draws one recipe fastest, and seconds per batch size."""
    n = len(stock.work.stimuli)
    tried = [stock.batched(size) for size in sorted({min(size, n) for size in STOCK_BATCHES})]
    units = {
        str(side.batch): [
            functools.partial(side.draw, rows, "fused")
            for rows in cut(stock.work.stimuli, side.batch)
        ]
        for side in tried
    }
    rounds = [interleaved(units)[0] for _ in range(2)]
    seconds = {side.batch: min(found[str(side.batch)] for found in rounds) for side in tried}
    return min(tried, key=lambda side: seconds[side.batch]), seconds


class Shares:
    """Seconds spent in the parts of our route."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    def module(self, module: nn.Module, name: str) -> list[Any]:
        """Count calls of ``module`` until the handles are removed."""
        started: list[float] = []
        return [
            module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
            module.register_forward_hook(lambda *_: self.add(name, started.pop())),
        ]

    def method(self, owner: Any, method: str, name: str) -> Callable[[], None]:
        """Count calls of a method of this one object; the result undoes it."""
        original = getattr(owner, method)

        def counted(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = original(*given, **named)
            self.add(name, started)
            return result

        setattr(owner, method, counted)
        return lambda: delattr(owner, method)

    def add(self, name: str, started: float) -> None:
        self.spent[name] += time.perf_counter() - started

    def of(self, total: float) -> dict[str, float]:
        """Shares of ``total``, largest first; ``rest`` is what was not counted."""
        rest = total - sum(self.spent.values())
        return {
            name: spent / total for name, spent in (self.spent + Counter(rest=rest)).most_common()
        }


def unet_parts(ours: Ours) -> dict[str, float]:
    """Shares of the U-Net's own time, of one batch that is not timed otherwise."""
    whole, parts, handles = Shares(), Shares(), []
    kinds = {"attn1": "self-attention", "attn2": "text attention", "ff": "feed-forward"}
    handles += whole.module(ours.pipe.unet, "unet")
    for name, module in ours.pipe.unet.named_modules():
        kind = name.rpartition(".")[2]
        if kind in kinds:
            handles += parts.module(module, kinds[kind])
        elif type(module).__name__ == "ResnetBlock2D":
            handles += parts.module(module, "convolution blocks")
    undo = [parts.method(item, "injected", "image attention") for item in ours.injector.processors]
    ours.units(ours.work.stimuli)[0]()
    for handle in handles:
        handle.remove()
    for one in undo:
        one()
    parts.spent["text attention"] -= parts.spent["image attention"]  # which is inside of it
    return parts.of(whole.spent["unet"])


@dataclass(frozen=True)
class Rounds:
    """Whole runs of all sides, and what was found out beside their time."""

    seconds: Sequence[Mapping[str, float]]  # of each side, repeat by repeat
    apart: int  # levels of 255
    shares: Mapping[str, float]  # of our own runs

    def rate(self, name: str, delivered: int) -> float:
        return delivered / statistics.median(found[name] for found in self.seconds)


def timed_rounds(sides: Mapping[str, Any], repeats: int) -> Rounds:
    """Every side draws everything, ``repeats`` times. SystemExit for other pictures than ours."""
    ours, shares, rounds, apart = sides["ours"], Shares(), [], 0
    handles = shares.module(ours.pipe.unet, "U-Net")
    handles += shares.module(ours.pipe.vae.decoder, "VAE decoder")
    undo = shares.method(ours.injector, "set", "image tokens")
    for _ in range(repeats):
        units = {name: side.units(side.work.stimuli) for name, side in sides.items()}
        seconds, drawn = interleaved(units)
        apart = max(apart, levels_apart(drawn))
        rounds.append(seconds)
    for handle in handles:
        handle.remove()
    undo()
    return Rounds(rounds, apart, shares.of(sum(found["ours"] for found in rounds)))


def speed_rows(ours: Ours, published: Stock, repeats: int) -> dict[str, dict[str, Any]]:
    """Pictures per second of a whole run, both rows, and what our own run is made of."""
    work, sample = ours.work, ours.work.stimuli[:2]
    trial = {"ours": ours, "published": published, "stock": published.batched(len(sample))}
    levels_apart(interleaved({name: side.units(sample) for name, side in trial.items()})[1])
    stock, tried = best_batch(published)
    sides = {"ours": ours, "published": published, "stock": stock}
    found = timed_rounds(sides, repeats)
    facts = {
        "pictures": work.pictures, "stimuli": len(work.stimuli), "steps": work.steps,
        "size_px": work.size, "guidance": work.guidance, "seed": work.seed,
        "threads": torch.get_num_threads(), "largest_difference_of_255": found.apart,
        "ours_batch": ours.batch, "ours_distinct_recipes": len(ours.distinct),
        "ours_shares": found.shares,
    }  # fmt: skip
    rows, setting = [], stock.seconds_to_set_scales()
    for name in ("published", "stock"):
        rates = [found.rate(side, work.pictures) for side in ("ours", name)]
        ratio = rates[0] / rates[1]
        set_share = setting * len(sides[name].units(work.stimuli)) * rates[1] / work.pictures
        rows.append({
            "ours": rates[0], "baseline": rates[1], "ratio": ratio, "unit": "pictures/s",
            "n": repeats, "baseline_batch": sides[name].batch,
            "ratio_of_each_repeat": [each[name] / each["ours"] for each in found.seconds],
            "ratio_drawing_all_recipes": ratio * len(ours.distinct) / len(recipes("all")),
            "baseline_share_of_setting_scales": set_share, **facts,
        })  # fmt: skip
    rows[0]["ours_unet_parts"] = unet_parts(ours)
    rows[1]["baseline_seconds_by_batch"] = tried
    return dict(zip(("mode_all_vs_published", "mode_all_vs_stock_batched"), rows, strict=True))


# ---------------------------------------------------------------- parameters and memory


def adapter_parameters(ours: Ours, stock: Stock) -> dict[str, Any]:
    counts = {
        "ours": sum(tensor.numel() for tensor in ours.injector.state().values()),
        "baseline": sum(
            tensor.numel()
            for module in (stock.pipe.unet.encoder_hid_proj, *stock.adapters())
            for tensor in module.parameters()
        ),
    }
    return {
        **counts, "ratio": counts["ours"] / counts["baseline"], "unit": "parameters",
        "n": 1, "modalities": len(NAMES),
    }  # fmt: skip


def peak_mib() -> float:
    """Peak resident memory of this process in MiB.

    Linux: VmHWM. ru_maxrss would be no less than the parent's, which a child inherits over exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def memory_of(route: str, given: argparse.Namespace) -> dict[str, float]:
    """Load one route in this process and draw with it. Peaks in MiB, also before the models."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401 - counted as an import

    imported = peak_mib()
    dim = read_ip_adapter(WEIGHTS.ip_adapter).clip_dim
    vectors = torch.randn(given.stimuli, len(NAMES), dim, generator=util.generator_for(given.seed))
    work = work_of(given, vectors)
    if route == "ours":
        side = Ours.load(work, given.batch_size)
    else:
        side = Stock.load(work)
        side = side.batched(given.batch_size) if route == "stock" else side
    for unit in side.units(work.stimuli)[-MEMORY_CALLS:]:  # of the full batches, and all active
        unit()
    return {"peak": peak_mib(), "imported": imported}


def memory_in_child(route: str, batch: int, given: argparse.Namespace) -> dict[str, float]:
    """:func:`memory_of` in a fresh process."""
    flags = {
        name: getattr(given, name) for name in ("stimuli", "steps", "guidance", "size", "seed")
    }
    flags |= {"batch_size": batch, "only": route}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(given: argparse.Namespace, stock_batch: int) -> dict[str, Any]:
    """Peak resident memory of each route, in a fresh process each."""
    ours = memory_in_child("ours", given.batch_size, given)
    stock = memory_in_child("stock", stock_batch, given)
    same = ours
    if given.batch_size != stock_batch:
        same = memory_in_child("ours", stock_batch, given)
    published = memory_in_child("published", 1, given)
    return {
        "ours": ours["peak"], "baseline": stock["peak"], "ratio": ours["peak"] / stock["peak"],
        "unit": "MiB", "n": 1, "ours_batch": given.batch_size, "baseline_batch": stock_batch,
        "ours_at_baseline_batch": same["peak"], "published": published["peak"],
        "python_and_imports": {"ours": ours["imported"], "baseline": stock["imported"]},
    }  # fmt: skip


# ---------------------------------------------------------------- the image branch of attention


def five_copies(key: torch.Tensor, value: torch.Tensor, scale: Sequence[float]) -> nn.Module:
    """diffusers' processor with a copy of the adapter's layer per modality."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    made = IPAdapterAttnProcessor2_0(*key.shape, (TOKENS,) * len(scale), list(scale))
    for copies, weight in ((made.to_k_ip, key), (made.to_v_ip, value)):
        for copy in copies:
            copy.weight.copy_(weight)
    return made


def without_projections(query: torch.Tensor, text: torch.Tensor, heads: int) -> SimpleNamespace:
    """What processors read of diffusers' Attention, with its projections' results for them."""
    return SimpleNamespace(
        to_q=lambda _: query, to_k=lambda _: text, to_v=lambda _: text, heads=heads,
        to_out=[nn.Identity(), nn.Identity()], spatial_norm=None, group_norm=None, norm_cross=None,
        norm_q=None, norm_k=None, residual_connection=False, rescale_output_factor=1.0,
    )  # fmt: skip


@torch.no_grad()
def ip_attention(
    batch: int, positions: int, width: int, heads: int, rounds: int, seed: int
) -> dict[str, Any]:
    """The image branch alone at one of SDXL's shapes, five modalities active. float32.

    The projections around attention are left out on both sides, so that the difference of
    diffusers' two processors is the image branch and little else.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    draw = util.generator_for(seed, "attention", batch, positions)
    query, text = (torch.randn(batch, n, width, generator=draw) for n in (positions, 1))
    tokens = torch.randn(batch, len(NAMES), TOKENS, TOKEN_WIDTH, generator=draw)
    key, value = torch.randn(2, width, TOKEN_WIDTH, generator=draw) * TOKEN_WIDTH**-0.5
    scale = [0.2 + 0.1 * m for m in range(len(NAMES))]
    plain, stock = AttnProcessor2_0(), five_copies(key, value, scale)
    ours = InjectedAttention(key, value, heads)
    attn = without_projections(query, text, heads)
    per_modality = [tokens[:, [m]] for m in range(len(NAMES))]
    split = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    attended = torch.zeros_like(split)
    calls = {
        "plain": lambda: plain(attn, query, text),
        "stock": lambda: stock(attn, query, (text, per_modality)),
        "tokens": lambda: ours.set_tokens(tokens, torch.tensor(scale).expand(batch, -1)),
        "ours": lambda: attended + ours.injected(split),
    }
    results = {name: call() for name, call in calls.items()}
    branch = results["ours"].transpose(1, 2).flatten(2)
    apart = float((results["stock"] - results["plain"] - branch).abs().max())
    if apart > 1e-4:
        raise SystemExit(f"attention of {batch} x {positions} differs from diffusers' by {apart}")
    return attention_row(calls, rounds) | {
        "largest_difference": apart, "batch": batch, "positions": positions, "width": width,
        "heads": heads, "active": len(NAMES), "threads": torch.get_num_threads(),
    }  # fmt: skip


def attention_row(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Milliseconds per call, all sides in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append(1000 * (time.perf_counter() - started))
    ours, tokens = statistics.median(found["ours"]), statistics.median(found["tokens"])
    branch = [whole - plain for whole, plain in zip(found["stock"], found["plain"], strict=True)]
    baseline = statistics.median(branch)
    return {
        "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": "ms", "n": rounds,
        "set_tokens": tokens,
        "ratio_with_set_tokens": baseline / (ours + tokens / SDXL_STEPS),
        "what": "per step and layer: InjectedAttention.injected and its sum with the text's, image "
        "tokens set before; against IPAdapterAttnProcessor2_0 less AttnProcessor2_0, both without "
        f"projections of query, text and output. with_set_tokens: 1/{SDXL_STEPS} of setting them, "
        "which is done once per picture",
    }  # fmt: skip


# ---------------------------------------------------------------- the table


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what | ours | baseline | ratio | unit | N |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        ours, baseline = (f"{row[side]:,.4g}" if row[side] < 1e4 else f"{row[side]:,}"
                          for side in ("ours", "baseline"))  # fmt: skip
        unit = f"{row['unit']}, median" if row["n"] > 1 else row["unit"]
        lines.append(f"| {name} | {ours} | {baseline} | {row['ratio']:.2f} | {unit} | {row['n']} |")
    return "\n".join(lines) + "\n"


def percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def notes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the table's numbers mean, and where our time goes."""
    published, stock = rows["mode_all_vs_published"], rows["mode_all_vs_stock_batched"]
    memory, shares = rows["peak_memory"], published["ours_shares"]
    parts = {name: share for name, share in published["ours_unet_parts"].items() if name != "rest"}
    apart, twins = published["largest_difference_of_255"], "ratio_drawing_all_recipes"
    seconds = {size: round(s, 2) for size, s in stock["baseline_seconds_by_batch"].items()}
    amortised = ", ".join(f"{rows[name]['ratio_with_set_tokens']:.2f}" for name in ATTENTION)
    each = "; ".join(
        " ".join(f"{ratio:.2f}" for ratio in row["ratio_of_each_repeat"])
        for row in (published, stock)
    )
    setting = " and ".join(
        f"{100 * row['baseline_share_of_setting_scales']:.1f} %" for row in (published, stock)
    )
    largest = next(iter(shares))
    inside = f", first its {next(iter(parts))}" if largest == "U-Net" else ""
    imports = memory["python_and_imports"]["ours"]
    return f"""ratio: times faster than the baseline; for memory and parameters, ours / baseline.
Pictures: {published["pictures"]} delivered by every route, in {published["threads"]} threads, at \
most {apart} of 255 levels apart. Not timed: loading, PNG files, encoding text but published's.
Of {len(recipes("all"))} recipes {published["ours_distinct_recipes"]} differ, and ours draws those;
drawing all: {published[twins]:.2f} times published, {stock[twins]:.2f} times stock (computed).
Ratio of each repeat, published; stock: {each}.
Setting scales is {setting} of published's and stock's time.
Stock's batch is {stock["baseline_batch"]}: seconds for one recipe by batch size {seconds}.
Memory above Python and its imports, {imports:.0f} MiB: ours {memory["ours"] - imports:.0f}, at \
stock's batch {memory["ours_at_baseline_batch"] - imports:.0f}, stock \
{memory["baseline"] - imports:.0f}, published {memory["published"] - imports:.0f} MiB.
Attention with the setting of tokens: {amortised} times.
Our run: {percent(shares)}.
Inside the U-Net: {percent(published["ours_unet_parts"])}.
Next would be: {largest}{inside}. All but the U-Net for nothing: \
{1 / shares["U-Net"]:.2f} times faster."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--json", type=Path, help="also write the rows here")
    add("--stimuli", type=int, default=16, metavar="N", help="(default: %(default)s)")
    add("--steps", type=int, default=10, metavar="N", help="of SDXL (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="more than 1 (default: %(default)s)")
    add("--size", type=int, default=models.SIZE_PX, metavar="PX", help="(default: %(default)s)")
    add("--batch_size", type=int, default=22, metavar="N",
        help="pictures that ours draws at once (default: %(default)s, as in the demo)")  # fmt: skip
    add("--repeats", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    # a child of peak_memory
    add("--only", choices=("ours", "stock", "published"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.guidance <= 1:
        parser.error(f"--guidance {given.guidance}: the baselines are set up for more than 1")
    if given.size % 32 or min(given.stimuli, given.steps, given.batch_size, given.repeats) < 1:
        parser.error("--size in multiples of 32; all numbers from 1")
    return given


def work_of(given: argparse.Namespace, embeddings: torch.Tensor) -> Work:
    """With the texts that generate.py draws with by default."""
    flags = args.STAGES["generate"]().actions()
    texts = (flags[name].default for name in ("prompt", "negative_prompt"))
    return Work(embeddings, *texts, given.steps, given.guidance, given.size, given.seed)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.only:
        print(json.dumps(memory_of(given.only, given)))
        return 0
    work = work_of(given, clip_embeddings(given.stimuli, given.seed))
    ours, published = Ours.load(work, given.batch_size), Stock.load(work)
    rows = speed_rows(ours, published, given.repeats)
    rows["adapter_parameters"] = adapter_parameters(ours, published)
    rows["peak_memory"] = peak_memory(given, rows["mode_all_vs_stock_batched"]["baseline_batch"])
    for name, shape in ATTENTION.items():
        rows[name] = ip_attention(*shape, ATTENTION_ROUNDS * given.repeats, given.seed)
    print(table(rows))
    print(notes(rows))
    if given.json:
        write_json(given.json, {"rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
