"""Stage 1: encode the stimuli once into five CLIP embeddings each, un-normalised, kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("features")

import torch
from torch import nn

import util
from datafiles import superpixel
from datafiles.feature_bank import layer_name
from datafiles.pictures import PictureError, read_picture
from datafiles.stimuli import (
    IMAGE_FOLDER,
    PARTITIONS,
    Stimulus,
    caption,
    check_disjoint,
    list_stimuli,
    read_captions,
)
from modalities import MODALITIES, NAMES
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
    dtype: torch.dtype | None = None  # of the products; None: float32

    @torch.no_grad()
    def encode_pictures(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] after the transform -> un-normalised float32 [B, D] on the model's device.

        A GPU is not waited for: it computes while the caller makes the next crops.
        """
        with self.products():
            encoded = self.model.encode_image(self._moved(crops), normalize=False)
        return encoded.float()

    @torch.no_grad()
    def encode_layers(self, crops: torch.Tensor, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Image layers, counted from 1, averaged over the picture: {name: float32 [B, W]}.

        On the model's device, as :meth:`encode_pictures`.
        """
        if not layers:
            return {}
        order = sorted(set(layers))
        indices = [layer - 1 for layer in order]
        with self.products():
            found = self.model.visual.forward_intermediates(
                self._moved(crops), indices, stop_early=True, intermediates_only=True
            )["image_intermediates"]  # [B, W, h, w] each
        return {
            layer_name(layer): maps.float().mean(dim=(2, 3))
            for layer, maps in zip(order, found, strict=True)
        }

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Un-normalised float32 [B, D] on the model's device."""
        with self.products():
            encoded = self.model.encode_text(
                self.tokenize(list(texts)).to(self.device), normalize=False
            )
        return encoded.float()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _moved(self, crops: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            crops = crops.pin_memory()  # only from there, copying does not wait either
        return crops.to(self.device, non_blocking=True)

    def products(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


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


def adjusted(clip: Clip, blur_px: float, precision: str) -> Clip:
    """``clip`` in this precision, with all that changes features in its identity.

    Models and banks of another blur or precision do not mix.
    """
    marks: dict[str, str | float] = {}
    if blur_px:  # without: as before there was a blur
        marks["target_blur_px"] = blur_px
    if util.PRECISIONS[precision] is not None:  # float32: as before there were others
        marks["precision"] = precision
    return replace(clip, identity=clip.identity | marks, dtype=util.PRECISIONS[precision])


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


@dataclass(frozen=True)
class Views:
    """How a picture is shown to CLIP. ``png_folder``: superpixels are also saved there, or None."""

    slic_px: int
    blur_px: float = 0.0
    png_folder: Path | None = None


class Pictures(torch.utils.data.Dataset):
    """Crops [visual modalities, 3, S, S] per stimulus, or why it cannot be read."""

    def __init__(self, stimuli: Sequence[Stimulus], transform: Any, views: Views) -> None:
        self.stimuli, self.transform, self.views = stimuli, transform, views

    def __len__(self) -> int:
        return len(self.stimuli)

    def __getitem__(self, index: int) -> torch.Tensor | PictureError:
        try:
            image = read_picture(self.stimuli[index].path)
        except PictureError as error:  # raised here, it would come with the worker's traceback
            return error
        versions = picture_versions(image, self.views.slic_px, self.views.blur_px)
        if self.views.png_folder:
            save_superpixels(self.views.png_folder, self.stimuli[index], versions)
        return torch.stack([self.transform(versions[name]) for name in VISUAL])

    def ahead(self, batch_size: int, num_workers: int) -> torch.utils.data.DataLoader:
        """One stimulus after the other; processes are about two batches ahead of the caller.

        Whole batches from each process would make the first, and every pause, a batch long.
        """
        return torch.utils.data.DataLoader(
            self,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=math.ceil(2 * batch_size / num_workers) if num_workers else None,
        )


def save_superpixels(folder: Path, stimulus: Stimulus, versions: Mapping[str, Image.Image]) -> None:
    """Write a picture's superpixel versions as PNG, to look at."""
    for modality in MODALITIES:
        if modality.source == "superpixel":
            path = folder / Path(stimulus.key).with_suffix("") / f"{modality.name}.png"
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


@dataclass(frozen=True)
class Piece:
    """A file of features and its rows: stimuli, or else texts. A restart loses at most one."""

    path: Path
    stimuli: Sequence[Stimulus] = ()
    texts: Sequence[str] = ()


def cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def pieces_of(
    folder: Path,
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
    size: int,
) -> dict[str, list[Piece]]:
    """All work: {partition: pieces of ``size`` rows}, and under "text" each distinct text once."""

    def files(name: str, items: Sequence[Any]) -> Iterator[tuple[Path, Sequence[Any]]]:
        for number, rows in enumerate(cut(items, size)):
            yield folder / f"{name}-{number * size:06d}.safetensors", rows

    distinct = list(dict.fromkeys(itertools.chain(*texts.values())))
    pictures = {
        name: [Piece(path, stimuli=rows) for path, rows in files(name, items)]
        for name, items in stimuli.items()
    }
    return pictures | {"text": [Piece(path, texts=rows) for path, rows in files("text", distinct)]}


def encode(
    clip: Clip,
    pieces: Sequence[Piece],
    views: Views,
    batch_size: int,
    num_workers: int,
    layers: Sequence[int] = (),
) -> None:
    """Encode and save piece by piece, while processes make the pictures of the next batches.

    ``layers``: of CLIP's image side, to be kept beside the modalities. Raises DataError for a
    picture that cannot be read.
    """
    from tqdm import tqdm

    stimuli = [item for piece in pieces for item in piece.stimuli]
    made = iter(Pictures(stimuli, clip.transform, views).ahead(batch_size, num_workers))
    header = {
        "clip": clip.identity,
        "normalised": False,
        "transform": str(clip.transform),
        "superpixel": superpixel.describe(views.slic_px),
    }
    with tqdm(made, total=len(stimuli), desc="encoding", unit="picture") as bar:
        crops = iter(bar)
        for piece in pieces:
            features = encode_piece(clip, piece, crops, batch_size, layers)
            util.save_tensors(piece.path, features, header)


def encode_piece(
    clip: Clip,
    piece: Piece,
    crops: Iterator[torch.Tensor | PictureError],
    batch_size: int,
    layers: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Features {modality: float32 [rows, D]} of a piece; ``crops``: its pictures' are next."""
    if piece.texts:
        encoded = torch.cat([clip.encode_texts(texts) for texts in cut(piece.texts, batch_size)])
        return dict.fromkeys(TEXT, encoded)
    parts = []
    for stimuli in cut(piece.stimuli, batch_size):
        shown = torch.stack(next_crops(crops, len(stimuli)))  # [b, visual, 3, S, S]
        visual = clip.encode_pictures(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        features = {name: visual[:, column] for column, name in enumerate(VISUAL)}
        parts.append(features | clip.encode_layers(shown[:, VISUAL.index("image")], layers))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def next_crops(crops: Iterator[torch.Tensor | PictureError], count: int) -> list[torch.Tensor]:
    """The crops of the next ``count`` pictures. Raises PictureError if one cannot be read."""
    items = list(itertools.islice(crops, count))
    for item in items:
        if isinstance(item, PictureError):
            raise item
    return items


# ---------------------------------------------------------------- joining


def read_pieces(
    pieces: Mapping[str, Sequence[Piece]],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """{partition or "text": {modality: [rows, D]}}, and the header that all pieces have.

    Raises DataError for a piece that was made in another way than the first.
    """
    loaded = {
        name: [(piece.path, *util.load_tensors(piece.path)) for piece in group]
        for name, group in pieces.items()
    }
    first, _, header = next(itertools.chain(*loaded.values()))
    for path, _, other in itertools.chain(*loaded.values()):
        differing = [key for key in {**header, **other} if header.get(key) != other.get(key)]
        if differing:
            raise DataError(
                path,
                "; ".join(f"{key}: {other.get(key)}" for key in differing),
                "; ".join(f"{key}: {header.get(key)}" for key in differing) + f", as {first} has",
                "delete the one that is wrong; the same command makes it again",
            )
    features = {
        name: {key: torch.cat([part[key] for _, part, _ in group]) for key in group[0][1]}
        for name, group in loaded.items()
    }
    return features, header


def join(
    run: util.RunDirectory,
    pieces: Mapping[str, Sequence[Piece]],
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
) -> None:
    """Write both partitions from all pieces. Raises DataError for NaN or mixed pieces."""
    encoded, header = read_pieces(pieces)
    distinct = itertools.chain(*(piece.texts for piece in pieces["text"]))
    row_of = {text: row for row, text in enumerate(distinct)}
    for partition, items in stimuli.items():
        rows = [row_of[text] for text in texts[partition]]
        found = encoded[partition] | {name: encoded["text"][name][rows] for name in TEXT}
        names = [*NAMES, *sorted(found.keys() - set(NAMES))]
        features = {name: found[name] for name in names}
        write_partition(run.path / partition, items, texts[partition], features, header)


def write_partition(
    path: Path,
    stimuli: Sequence[Stimulus],
    texts: Sequence[str],
    features: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    """``path`` + .safetensors: features with row ids; + .json: manifest. DataError for NaN."""
    for name, rows in features.items():
        if not torch.isfinite(rows).all():
            raise DataError(
                path,
                f"NaN in the {name} features",
                "finite features",
                "check --clip_pretrained; where --precision float16 overflows, bfloat16 does not",
            )
    ids = torch.tensor([item.id for item in stimuli])
    util.save_tensors(path.with_suffix(".safetensors"), {**features, "stimulus": ids}, header)
    described = {
        name: {
            "shape": list(rows.shape),
            "dtype": str(rows.dtype),
            "mean_norm": float(rows.norm(dim=1).mean()),
        }
        for name, rows in features.items()
    }
    listed = [
        {"stimulus": item.id, "picture": item.key, "concept": item.concept, "text": text}
        for item, text in zip(stimuli, texts, strict=True)
    ]
    util.write_json(path.with_suffix(".json"), {**header, "features": described, "rows": listed})


# ---------------------------------------------------------------- the stage


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
    check_layers(name, values.image_layers or ())
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
    if values.shard != "1/1":
        plan.append(f"of these only part {values.shard}")
    run = util.open_run(options, values.output_path, inputs, plan, shared=True)
    if run.finished:
        return 0
    texts = {
        name: [caption(item, captions, values.text_template) for item in items]
        for name, items in stimuli.items()
    }
    pieces = pieces_of(run.path / "shards", stimuli, texts, values.shard_size)
    encode_missing(values, device, run, pieces)
    return finish(values, run, pieces, stimuli, texts)


def encode_missing(
    values: Any, device: torch.device, run: util.RunDirectory, pieces: Mapping[str, Sequence[Piece]]
) -> None:
    """Encode what is not on disk yet of this call's part of all pieces, texts first."""
    index, parts = util.parse_shard(values.shard)
    every = [*pieces["text"], *(piece for name in PARTITIONS for piece in pieces[name])]
    missing = [piece for piece in every[index - 1 :: parts] if not piece.path.exists()]
    if not missing:
        return
    clip = load_clip(values.clip_model, values.clip_pretrained, device)
    views = Views(
        values.superpixel_size,
        values.target_blur,
        run.path / "superpixels" if values.save_superpixels else None,
    )
    encode(
        adjusted(clip, values.target_blur, values.precision),
        missing,
        views,
        values.batch_size,
        default_workers() if values.num_workers is None else values.num_workers,
        values.image_layers or (),
    )


def finish(
    values: Any,
    run: util.RunDirectory,
    pieces: Mapping[str, Sequence[Piece]],
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
) -> int:
    """Join the bank if all its pieces are there. Whichever part comes last does."""
    files = [piece.path for group in pieces.values() for piece in group]
    waiting = sum(not path.exists() for path in files)
    if run.finished:  # by another part, which has removed the pieces
        return 0
    if waiting:
        print(
            f"part {values.shard} is encoded; {waiting} of {len(files)} pieces are still missing: "
            "the last part joins them, or a call without --shard"
        )
        return 0
    try:
        join(run, pieces, stimuli, texts)
    except DataError:
        if not run.finished:
            raise
        return 0  # another part was as late: it joined first and removed the pieces meanwhile
    run.finish({name: len(items) for name, items in stimuli.items()})
    for path in files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another part is about to, or has just done so
        (run.path / "shards").rmdir()
    print(f"feature bank: {run.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
