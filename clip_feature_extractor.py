"""Stage 1: encode the stimuli once into five CLIP embeddings each, un-normalised, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("features")

import torch
from torch import nn

import superpixel
import util
from banks import layer_name
from modalities import MODALITIES, NAMES
from pictures import PictureError, read_picture
from stimuli import (
    IMAGE_FOLDER,
    PARTITIONS,
    Stimulus,
    caption,
    check_disjoint,
    list_stimuli,
    read_captions,
)
from util import DataError, UserError

if TYPE_CHECKING:
    from PIL import Image

VISUAL = tuple(modality.name for modality in MODALITIES if modality.source != "text")
TEXT = tuple(modality.name for modality in MODALITIES if modality.source == "text")


# ---------------------------------------------------------------- CLIP


@dataclass(frozen=True)
class Clip:
    """An open_clip model in eval mode, its deterministic validation transform and its identity."""

    model: nn.Module
    transform: Any
    tokenize: Any
    identity: dict[str, str | float]

    @torch.no_grad()
    def encode_pictures(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] after the transform -> un-normalised float32 [B, D]."""
        device = next(self.model.parameters()).device
        return self.model.encode_image(crops.to(device), normalize=False).float().cpu()

    @torch.no_grad()
    def encode_layers(self, crops: torch.Tensor, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Image layers, counted from 1, averaged over the picture: {name: float32 [B, W]}."""
        if not layers:
            return {}
        device = next(self.model.parameters()).device
        order = sorted(set(layers))
        found = self.model.visual.forward_intermediates(
            crops.to(device), indices=[layer - 1 for layer in order], intermediates_only=True
        )["image_intermediates"]  # [B, W, h, w] each
        return {
            layer_name(layer): maps.mean(dim=(2, 3)).float().cpu()
            for layer, maps in zip(order, found, strict=True)
        }

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Un-normalised float32 [B, D]."""
        device = next(self.model.parameters()).device
        return (
            self.model.encode_text(self.tokenize(list(texts)).to(device), normalize=False)
            .float()
            .cpu()
        )


def model_name(clip_model: str) -> str:
    """An open_clip model name; a JSON config is registered under its own name. Raises UserError."""
    import open_clip

    if clip_model.endswith(".json"):
        if not Path(clip_model).is_file():
            raise UserError(
                "--clip_model",
                f"{clip_model}: no such file",
                "an open_clip model config",
                "check the path",
            )
        open_clip.add_model_config(clip_model)
        return Path(clip_model).stem
    if clip_model not in open_clip.list_models():
        raise UserError(
            "--clip_model",
            clip_model,
            f"one of {len(open_clip.list_models())} open_clip models or a JSON",
            "see open_clip.list_models(); the default is ViT-H-14",
        )
    return clip_model


def load_clip(clip_model: str, clip_pretrained: str, device: torch.device) -> Clip:
    """Load any open_clip model with a tag or a local weight file. Raises UserError / DataError."""
    import open_clip

    name = model_name(clip_model)
    check_pretrained(name, clip_pretrained)
    try:
        model, transform = open_clip.create_model_from_pretrained(
            name, pretrained=clip_pretrained, device=device
        )
    except (RuntimeError, OSError, KeyError) as error:
        raise DataError(
            f"--clip_pretrained {clip_pretrained}",
            f"cannot be loaded into {name}: {error}",
            f"weights of {name}",
            "without internet, download the file elsewhere and name it here",
        ) from None
    identity = {"model": name, "weights": weights_hash(model)}
    return Clip(model.eval(), transform, open_clip.get_tokenizer(name), identity)


def blurred(clip: Clip, blur_px: float) -> Clip:
    """``clip`` with the blur in its identity: models and banks of different blur do not mix."""
    if not blur_px:  # as before there was a blur
        return clip
    return replace(clip, identity=clip.identity | {"target_blur_px": blur_px})


def check_pretrained(name: str, clip_pretrained: str) -> None:
    """Raise UserError unless this is a file or a tag that open_clip knows for the model."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not Path(clip_pretrained).is_file() and clip_pretrained not in tags:
        raise UserError(
            "--clip_pretrained",
            f"{clip_pretrained}: no such file, nor a tag of {name}",
            f"a weight file, or one of {', '.join(tags) or '(no tags)'}",
            "check the path or the tag",
        )


def check_layers(name: str, layers: Sequence[int]) -> None:
    """Raise UserError for layers that the image side of an open_clip model does not have."""
    import open_clip

    built = open_clip.get_model_config(name)["vision_cfg"].get("layers", 0)  # timm's have no number
    depth = built if isinstance(built, int) else 1 + len(built)  # a ResNet's stem and its stages
    if max(layers, default=0) > depth:
        raise UserError(
            "--image_layers",
            str(max(layers)),
            f"1 to {depth}, the layers of {name}" if depth else "a ViT or ResNet of open_clip",
            "choose among them" if depth else f"leave it out: {name} is built by timm",
        )


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of the loaded weights: the same for a tag and for its file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


# ---------------------------------------------------------------- what CLIP is shown


class Pictures(torch.utils.data.Dataset):
    """Crops [visual modalities, 3, S, S] per stimulus, or why it cannot be read."""

    def __init__(
        self,
        stimuli: Sequence[Stimulus],
        transform: Any,
        slic_px: int,
        blur_px: float,
        png_folder: Path | None,
    ) -> None:
        self.stimuli, self.transform = stimuli, transform
        self.slic_px, self.blur_px, self.png_folder = slic_px, blur_px, png_folder

    def __len__(self) -> int:
        return len(self.stimuli)

    def __getitem__(self, index: int) -> torch.Tensor | PictureError:
        try:
            image = read_picture(self.stimuli[index].path)
        except PictureError as error:  # raised here, it would come with the worker's traceback
            return error
        versions = picture_versions(image, self.slic_px, self.blur_px)
        if self.png_folder:
            self._save(self.stimuli[index], versions)
        return torch.stack([self.transform(versions[name]) for name in VISUAL])

    def _save(self, stimulus: Stimulus, versions: dict[str, Image.Image]) -> None:
        for modality in MODALITIES:
            if modality.source == "superpixel":
                path = self.png_folder / Path(stimulus.key).with_suffix("") / f"{modality.name}.png"
                with util.atomic_write(path, "wb") as file:
                    versions[modality.name].save(file, format="PNG")


def picture_versions(
    image: Image.Image, slic_px: int, blur_px: float = 0.0
) -> dict[str, Image.Image]:
    """What each visual modality shows CLIP: the picture, or one of its superpixel versions.

    ``blur_px``: standard deviation, in the picture's own pixels, of a Gaussian that the picture
    itself is blurred with, the superpixels are not (the uniform blur prior of UBP, CVPR 2025).
    """
    from PIL import Image, ImageFilter

    levels = superpixel.superpixels(superpixel.at_slic_size(image, slic_px))
    seen = image.filter(ImageFilter.GaussianBlur(blur_px)) if blur_px else image
    return {name: Image.fromarray(levels[name]) if name in levels else seen for name in VISUAL}


# ---------------------------------------------------------------- encoding


def encode(
    clip: Clip,
    stimuli: Sequence[Stimulus],
    texts: Sequence[str],
    batch_size: int,
    num_workers: int,
    slic_px: int,
    blur_px: float,
    png_folder: Path | None,
    layers: Sequence[int] = (),
) -> Iterator[dict[str, torch.Tensor]]:
    """Features {modality: [b, D]} batch by batch; superpixels are made in worker processes.

    ``layers``: of the image side, to be kept beside them.
    """
    loader = torch.utils.data.DataLoader(
        Pictures(stimuli, clip.transform, slic_px, blur_px, png_folder),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    done = 0
    for items in loader:
        for item in items:
            if isinstance(item, PictureError):
                raise item
        crops = torch.stack(items)  # [b, visual, 3, S, S]
        visual = clip.encode_pictures(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        features = {name: visual[:, column] for column, name in enumerate(VISUAL)}
        features |= clip.encode_layers(crops[:, VISUAL.index("image")], layers)
        text = clip.encode_texts(texts[done : done + len(items)])
        yield features | dict.fromkeys(TEXT, text)
        done += len(items)


def encode_partition(
    clip: Clip,
    run: util.RunDirectory,
    partition: str,
    stimuli: Sequence[Stimulus],
    texts: Sequence[str],
    shard_size: int,
    batch_size: int,
    num_workers: int,
    slic_px: int,
    blur_px: float,
    png_folder: Path | None,
    layers: Sequence[int],
) -> None:
    """Encode shard by shard, skip those on disk, join them into ``{partition}.safetensors``."""
    from tqdm import tqdm

    shards = [
        run.path / "shards" / f"{partition}-{start:06d}.safetensors"
        for start in range(0, len(stimuli), shard_size)
    ]
    with tqdm(total=len(stimuli), desc=f"encoding {partition}", unit="picture") as bar:
        for number, path in enumerate(shards):
            rows = slice(number * shard_size, (number + 1) * shard_size)
            if path.exists():
                bar.update(len(stimuli[rows]))
                continue
            parts = []
            for part in encode(
                clip,
                stimuli[rows],
                texts[rows],
                batch_size,
                num_workers,
                slic_px,
                blur_px,
                png_folder,
                layers,
            ):
                parts.append(part)
                bar.update(len(part["image"]))
            util.save_tensors(
                path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, {}
            )
    join_shards(clip, run, partition, stimuli, texts, slic_px, shards)


def join_shards(
    clip: Clip,
    run: util.RunDirectory,
    partition: str,
    stimuli: Sequence[Stimulus],
    texts: Sequence[str],
    slic_px: int,
    shards: Sequence[Path],
) -> None:
    """Write the partition's features with row ids, and its manifest. Raises DataError for NaN."""
    loaded = [util.load_tensors(path)[0] for path in shards]
    names = [*NAMES, *sorted(loaded[0].keys() - set(NAMES))]
    features = {name: torch.cat([part[name] for part in loaded]) for name in names}
    for name, rows in features.items():
        if not torch.isfinite(rows).all():
            raise DataError(
                run.path,
                f"NaN in the {name} features",
                "finite features",
                "check --clip_pretrained",
            )
    header = {
        "clip": clip.identity,
        "normalised": False,
        "transform": str(clip.transform),
        "superpixel": superpixel.describe(slic_px),
    }
    ids = torch.tensor([item.id for item in stimuli])
    util.save_tensors(run.path / f"{partition}.safetensors", features | {"stimulus": ids}, header)
    util.write_json(
        run.path / f"{partition}.json",
        header
        | {
            "features": {
                name: {
                    "shape": list(rows.shape),
                    "dtype": str(rows.dtype),
                    "mean_norm": float(rows.norm(dim=1).mean()),
                }
                for name, rows in features.items()
            },
            "rows": [
                {"stimulus": item.id, "picture": item.key, "concept": item.concept, "text": text}
                for item, text in zip(stimuli, texts, strict=True)
            ],
        },
    )


def picture_hash(stimuli: Sequence[Stimulus]) -> str:
    """sha256 over keys and contents of all pictures."""
    return util.json_hash([[item.key, util.file_hash(item.path)] for item in stimuli])


def default_workers() -> int:
    return max(1, (os.cpu_count() or 2) - 1)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Encode both partitions, or go on encoding, or do nothing when the bank is finished."""
    options = args.resolve("features", argv)
    values = options.values
    stimuli = {partition: list_stimuli(values.data_path, partition) for partition in PARTITIONS}
    check_disjoint(stimuli["training"], stimuli["test"])
    captions = read_captions(values.captions, [*stimuli["training"], *stimuli["test"]])
    name = model_name(values.clip_model)
    check_pretrained(name, values.clip_pretrained)
    layers = values.image_layers or []
    check_layers(name, layers)
    device = util.pick_device(values.device)
    weights = Path(values.clip_pretrained)
    inputs = {IMAGE_FOLDER[part]: picture_hash(items) for part, items in stimuli.items()} | {
        "captions": util.json_hash(captions),
        "clip_weights": util.file_hash(weights) if weights.is_file() else values.clip_pretrained,
    }
    plan = [
        f"encode {len(items)} {name} pictures with {values.clip_model} on {device}"
        for name, items in stimuli.items()
    ]
    run = util.open_run(options, values.output_path, inputs, plan)
    if run.finished:
        return 0
    clip = blurred(load_clip(values.clip_model, values.clip_pretrained, device), values.target_blur)
    workers = default_workers() if values.num_workers is None else values.num_workers
    png_folder = run.path / "superpixels" if values.save_superpixels else None
    for partition, items in stimuli.items():
        texts = [caption(item, captions, values.text_template) for item in items]
        encode_partition(
            clip,
            run,
            partition,
            items,
            texts,
            values.shard_size,
            values.batch_size,
            workers,
            values.superpixel_size,
            values.target_blur,
            png_folder,
            layers,
        )
    run.finish({name: len(items) for name, items in stimuli.items()})
    for path in (run.path / "shards").glob("*.safetensors"):
        path.unlink()
    (run.path / "shards").rmdir()
    print(f"feature bank: {run.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
