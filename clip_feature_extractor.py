"""Stage 1: encode the stimuli once into five CLIP embeddings each, un-normalised, kept on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("features")

import torch

import util
from cli.parser import parse_shard
from datafiles.captions import caption, read_captions
from datafiles.stimuli import IMAGE_FOLDER, PARTITIONS, Stimulus, check_disjoint, list_stimuli
from features.clip import adjusted, check_layers, check_pretrained, load_clip, model_name
from features.pieces import Piece, encode, join, pieces_of
from features.views import Views
from rundirs.closing import call, tell_end
from rundirs.directory import RunDirectory, open_run
from rundirs.files import file_hash, json_hash
from util import DataError


def picture_hash(stimuli: Sequence[Stimulus]) -> str:
    """sha256 over keys and contents of all pictures."""
    return json_hash([[item.key, file_hash(item.path)] for item in stimuli])


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
        "captions": json_hash(captions),
        "clip_weights": file_hash(weights) if weights.is_file() else values.clip_pretrained,
    }
    plan = [
        f"encode {len(items)} {name} pictures with {values.clip_model} on {device}"
        for name, items in stimuli.items()
    ]
    if values.shard != "1/1":
        plan.append(f"of these only part {values.shard}")
    run = open_run(options, values.output_path, inputs, plan, shared=True)
    if run.finished:
        return 0
    texts = {
        name: [caption(item, captions, values.text_template) for item in items]
        for name, items in stimuli.items()
    }
    pieces = pieces_of(run.path / "shards", stimuli, texts, values.shard_size)
    encode_missing(options.settings(Encoding), device, run, pieces)
    return finish(run, pieces, stimuli, texts, values.shard)


@dataclass(frozen=True)
class Encoding:
    """What one call encodes, and with what; names as the flags of ``args.py``."""

    clip_model: str
    clip_pretrained: str
    superpixel_size: int
    target_blur: list[float]
    save_superpixels: bool
    image_layers: list[int] | None
    precision: str
    batch_size: int
    num_workers: int | None
    shard: str

    def views(self, run: Path) -> Views:
        folder = run / "superpixels" if self.save_superpixels else None
        return Views(self.superpixel_size, self.target_blur, folder)


def encode_missing(
    asked: Encoding, device: torch.device, run: RunDirectory, pieces: Mapping[str, Sequence[Piece]]
) -> None:
    """Encode what is not on disk yet of this call's part of all pieces, texts first."""
    index, parts = parse_shard(asked.shard)
    every = [*pieces["text"], *(piece for name in PARTITIONS for piece in pieces[name])]
    missing = [piece for piece in every[index - 1 :: parts] if not piece.path.exists()]
    if not missing:
        return
    clip = load_clip(asked.clip_model, asked.clip_pretrained, device)
    encode(
        adjusted(clip, asked.target_blur[0], asked.precision),
        missing,
        asked.views(run.path),
        asked.batch_size,
        default_workers() if asked.num_workers is None else asked.num_workers,
        asked.image_layers or (),
    )


def finish(
    run: RunDirectory,
    pieces: Mapping[str, Sequence[Piece]],
    stimuli: Mapping[str, Sequence[Stimulus]],
    texts: Mapping[str, Sequence[str]],
    shard: str,
) -> int:
    """Join the bank if all its pieces are there. Whichever part comes last does."""
    files = [piece.path for group in pieces.values() for piece in group]
    waiting = sum(not path.exists() for path in files)
    if run.finished:  # by another part, which has removed the pieces
        return 0
    if waiting:
        print(
            f"part {shard} is encoded; {waiting} of {len(files)} pieces are still missing: "
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
    data = stimuli["training"][0].data_path
    tell_end(
        {"feature bank": run.path},
        [call("train.py", data_path=data, clip_feature_path=run.path,
              output_dir=run.path.parent / "model")],
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
