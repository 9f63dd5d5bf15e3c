"""Stage 3: EEG -> five predicted CLIP embeddings -> pictures, injected layer-wise into SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("generate")

import torch

import util
from cli.parser import parse_shard
from datafiles.captions import caption, read_captions
from datafiles.eeg_files import locate_test_eeg
from datafiles.stimuli import Stimulus
from dataset import TestEEG, open_test
from decoder import controls, fusion, low_level
from decoder.decoder import Decoder, model_file
from generation.renderer import open_renderer
from generation.series import Series, draw_series
from generation.starts import coarse_starts, encode_starts
from modalities import AUTO, MODALITIES, TEXT_TEMPLATE, marks_of, recipes
from rundirs.directory import RunDirectory, open_run
from rundirs.files import file_hash, json_hash
from rundirs.tensors import save_tensors
from sdxl import injection_map
from sdxl.adapter_file import check_ip_adapter
from sdxl.loading import check_sdxl
from unet import Sampling
from util import UserError


def shard_rows(count: int, shard: str) -> list[int]:
    """Rows of the i-th of n parts; every row is in exactly one part."""
    index, parts = parse_shard(shard)
    return list(range(index - 1, count, parts))


def oracle_prompts(captions: Path | None, stimuli: Sequence[Stimulus] | None) -> list[str]:
    """The stimuli's own captions, for ``--prompt_source oracle``. Raises UserError / DataError."""
    if stimuli is None:
        raise UserError(
            "--prompt_source oracle",
            "no stimuli beside the EEG",
            "test_images/",
            "give --data_path",
        )
    known = read_captions(captions)
    return [caption(item, known, TEXT_TEMPLATE) for item in stimuli]


def model_inputs(values: Any, test: TestEEG) -> dict[str, str]:
    """Identity of everything that determines the pictures beside the options."""
    model = model_file(values.model_path, values.checkpoint)
    sdxl = Path(values.sd_model_path)
    files = sorted(sdxl.rglob("*.safetensors")) if sdxl.is_dir() else [sdxl]
    return {
        "eeg": test.hash,
        "model": file_hash(model),
        "ip_adapter": file_hash(values.ip_adapter_path),
        "sdxl": json_hash([[str(file.relative_to(sdxl)), file_hash(file)] for file in files]),
        "captions": file_hash(values.captions) if values.captions else "",
        "vae": str(values.vae_path or ""),
        "low_level": file_hash(values.model_path / low_level.FILE)
        if values.init == "superpixel"
        else "",
    }


def open_model(values: Any) -> tuple[Decoder, TestEEG]:
    """The decoder and the EEG it is to read, checked against each other and the adapter."""
    injection_map.load_injection(values.injection)
    decoder = Decoder.load(values.model_path, values.checkpoint)
    if decoder.bank is None:
        raise UserError(
            "--model_path",
            f"{values.model_path}: an encoder without priors",
            "a run of train.py",
            "train the priors with train.py --init_from that run",
        )
    if values.init == "superpixel":
        low_level.load_head(values.model_path)
    check_sdxl(values.sd_model_path)
    check_ip_adapter(values.ip_adapter_path, decoder.bank.embed_dim)
    file, subject, data_path = locate_test_eeg(values.eeg_data, values.subject, values.data_path)
    test = open_test(
        file,
        subject,
        data_path,
        values.cache_dir,
        decoder.signal["channels"],
        decoder.signal["times"],
    )
    return decoder, test


def predicted_gains(
    values: Any, decoder: Decoder, test: TestEEG, rows: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Fusion weights [n, M] of ``--fusion_weights``; None for the registered ones."""
    if values.fusion_weights == "fixed":
        return None
    read = controls.controlled_eeg(test, values.control, values.seed)
    return fusion.gains_for(
        values.fusion_weights,
        decoder.calibration,
        decoder.bank,
        decoder.condition(read, rows).to(device),
        [test.ids[row] for row in rows],
        values.seed,
    )


def draw_run(
    values: Any,
    run: RunDirectory,
    decoder: Decoder,
    test: TestEEG,
    rows: Sequence[int],
    prompts: Sequence[str],
    part: str,
) -> None:
    """Predict, save the predictions, draw."""
    device = util.pick_device(values.device)
    sampling = Sampling(
        values.prior_steps,
        values.prior_guidance,
        values.prior_sampler,
        values.prior_draws,
        values.restore_variance,
    )
    given = (decoder.to(device), test, rows)
    embeddings = controls.predict_embeddings(
        *given, sampling, values.seed, values.control, values.clip_feature_path
    )
    gains = predicted_gains(values, *given, device)
    coarse = None
    if values.init == "superpixel":
        head = low_level.load_head(values.model_path)
        coarse = coarse_starts(decoder, head, test, rows, values.seed, values.control)
    save_tensors(
        run.path / f"embeddings{part}.safetensors",
        embeddings | {"stimulus": torch.tensor([test.ids[row] for row in rows])},
        {"clip": decoder.clip, "normalised": False, "subject": test.subject},
    )
    renderer = open_renderer(values, device, prompts)
    if coarse is not None:
        marks = marks_of(values.prompt_source, values.control)
        starts = encode_starts(renderer.pipe, coarse, values.size, run.path, test, rows, marks)
        renderer = replace(renderer, starts=starts)
    series = Series(
        values.mode,
        values.sweep,
        values.injection,
        values.fusion_strength,
        values.prompt_source,
        values.control,
        values.seed,
        None if values.batch_size == AUTO else values.batch_size,
        values.superpixel_size,
    )
    draw_series(series, run, renderer, embeddings, gains, test, rows, part)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures of this shard, or go on drawing, or do nothing when they are finished."""
    options = args.resolve("generate", argv)
    values = options.values
    device = util.pick_device(values.device)
    decoder, test = open_model(values)
    oracle = values.prompt_source == "oracle"
    prompts = oracle_prompts(values.captions, test.stimuli) if oracle else [values.prompt]
    rows = shard_rows(min(values.max_stimuli or len(test.eeg), len(test.eeg)), values.shard)
    part = "" if values.shard == "1/1" else f"-{values.shard.replace('/', '-of-')}"
    what = f"a sweep of {values.sweep}" if values.sweep else f"{len(recipes(values.mode))} pictures"
    plan = (
        f"predict {len(MODALITIES)} embeddings of {len(rows)} stimuli seen by {test.subject}",
        f"draw {what} of {values.size} px of each of {len(rows)} on {device}",
    )
    inputs = model_inputs(values, test)
    run = open_run(options, values.output_dir, inputs, plan, part.removeprefix("-"), shared=True)
    if run.finished:
        return 0
    if not rows:  # more shards than stimuli: this one has nothing to do
        run.finish({"stimuli": 0, "what": what})
        return 0
    draw_run(values, run, decoder, test, rows, prompts, part)
    run.finish({"stimuli": len(rows), "what": what})
    print(f"pictures: {run.path}\noverview: {run.path / f'overview{part}.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
