"""Stage 3: EEG -> five predicted CLIP embeddings -> pictures, injected layer-wise into SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("generate")

import torch

import util
from cli.parser import parse_shard
from datafiles.captions import read_captions
from datafiles.eeg_files import locate_test_eeg
from dataset import TestEEG, open_test
from decoder import controls, fusion, low_level
from decoder.controls import Prediction
from decoder.decoder import Decoder, model_file
from features.clip import adjusted, check_pretrained, load_clip, model_name
from generation.choosing import Choosing, agreement_of, check_eye
from generation.prompts import Prompting, decoded_prompts, oracle_prompts, training_captions
from generation.renderer import Rendering, open_renderer
from generation.series import Keep, Predicted, Series, draw_series
from generation.starts import coarse_starts, encode_starts
from modalities import MODALITIES, TRANSDUCTIVE, recipes
from rundirs.closing import call, tell_end
from rundirs.directory import RunDirectory, open_run
from rundirs.files import file_hash, json_hash, write_json
from rundirs.tensors import save_tensors
from sdxl import injection_map
from sdxl.adapter_file import adapter_file, check_ip_adapter
from sdxl.loading import check_drawing
from util import UserError


def shard_rows(count: int, shard: str) -> list[int]:
    """Rows of the i-th of n parts; every row is in exactly one part."""
    index, parts = parse_shard(shard)
    return list(range(index - 1, count, parts))


@dataclass(frozen=True)
class ModelChoice:
    """Which model reads which EEG; names as the flags of ``args.py``."""

    model_path: Path
    checkpoint: str
    eeg_data: Path
    subject: str | None
    data_path: Path | None
    cache_dir: Path | None
    averaging: str
    test_views: int
    captions: Path | None
    fusion_weights: str
    prompt_source: str
    clip_feature_path: Path | None


IDENTIFYING = (".safetensors", ".json", ".txt")  # of a folder: weights, configs, vocabularies


def weights_identity(path: str | Path | None) -> str:
    """Hash of what a file, or the files of a model's folder, hold; "" for none."""
    if not path:
        return ""
    root = Path(path)
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    found = [file for file in files if file.suffix in IDENTIFYING and file.is_file()]
    return json_hash([[file.relative_to(root).as_posix(), file_hash(file)] for file in found])


def model_inputs(
    asked: ModelChoice, rendering: Rendering, test: TestEEG, injection: str
) -> dict[str, str]:
    """Identity of everything that determines the pictures beside the options: by content."""
    head = asked.model_path / low_level.FILE
    return {
        "eeg": test.hash,
        "model": file_hash(model_file(asked.model_path, asked.checkpoint)),
        "ip_adapter": file_hash(adapter_file(rendering.ip_adapter_path)),
        "sdxl": weights_identity(rendering.sd_model_path),
        "captions": file_hash(asked.captions) if asked.captions else "",
        "vae": weights_identity(rendering.vae_path),
        "low_level": file_hash(head) if rendering.from_picture else "",
        "injection": json_hash(injection_map.load_injection(injection).identity),
        "captions_decoded": captions_identity(asked),
    }


def captions_identity(asked: ModelChoice) -> str:
    """Of the training captions that prompts are decoded to; "" where none are."""
    if asked.prompt_source != "decoded" or asked.clip_feature_path is None:
        return ""
    bank = asked.clip_feature_path / "training"
    return json_hash([file_hash(bank.with_suffix(kind)) for kind in (".json", ".safetensors")])


def open_model(asked: ModelChoice, rendering: Rendering) -> tuple[Decoder, TestEEG]:
    """The decoder and the EEG it is to read, checked against each other and the adapter."""
    decoder = Decoder.load(asked.model_path, asked.checkpoint)
    decoder.test_views = asked.test_views
    if decoder.bank is None:
        raise UserError(
            "--model_path",
            f"{asked.model_path}: an encoder without priors",
            "a run of train.py",
            "train the priors with train.py --init_from that run",
        )
    if rendering.from_picture:
        low_level.load_head(asked.model_path)
    if asked.captions:
        read_captions(asked.captions)
    if asked.prompt_source == "decoded" and asked.clip_feature_path is not None:
        training_captions(decoder, asked.clip_feature_path)
    check_drawing(rendering.sd_model_path, rendering.vae_path, rendering.scheduler)
    check_ip_adapter(rendering.ip_adapter_path, decoder.bank.embed_dim)
    file, subject, data_path = locate_test_eeg(asked.eeg_data, asked.subject, asked.data_path)
    reading = decoder.reading(subject)
    test = open_test(file, subject, data_path, asked.cache_dir, reading, asked.averaging)
    if asked.prompt_source == "oracle":
        oracle_prompts(asked.captions, test.stimuli)
    return decoder, test


def predict(
    decoder: Decoder, test: TestEEG, rows: Sequence[int], how: Prediction, fusion_weights: str
) -> Predicted:
    """The five embeddings of each row, and what each counts where several meet."""
    embeddings = controls.predict_embeddings(decoder, test, rows, how)
    if fusion_weights == "fixed":
        return Predicted(test, rows, embeddings, None)
    read = controls.controlled_eeg(test, how.control, how.seed)
    condition = decoder.condition(read, rows).to(next(decoder.parameters()).device)
    ids = [test.ids[row] for row in rows]
    gains = fusion.gains_for(
        fusion_weights, decoder.calibration, decoder.bank, condition, ids, how.seed
    )
    return Predicted(test, rows, embeddings, gains)


def save_predictions(run: RunDirectory, decoder: Decoder, predicted: Predicted) -> None:
    """``embeddings.safetensors``: {modality: [n, D]} and the stimuli they are of."""
    test = predicted.test
    save_tensors(
        run.path / f"embeddings{run.suffix}.safetensors",
        dict(predicted.embeddings)
        | {"stimulus": torch.tensor([test.ids[row] for row in predicted.rows])},
        {"clip": decoder.clip, "normalised": False, "subject": test.subject},
    )


def prompts_of(asked: Prompting, decoder: Decoder, predicted: Predicted) -> list[str]:
    """One prompt for all pictures, or one for each row of the test set."""
    test = predicted.test
    if asked.prompt_source == "oracle":
        return oracle_prompts(asked.captions, test.stimuli)
    if asked.prompt_source != "decoded" or asked.clip_feature_path is None:
        return [asked.prompt]
    known = training_captions(decoder, asked.clip_feature_path)
    own = decoded_prompts(decoder, predicted.embeddings["text"], *known, asked.prompt_concepts)
    of_row = dict(zip(predicted.rows, own, strict=True))
    return [of_row.get(row, asked.prompt) for row in range(len(test.eeg))]  # another shard's: any


def told(prompts: Sequence[str], predicted: Predicted) -> dict[str, str]:
    """{folder of a stimulus: its prompt}, for people."""
    return {predicted.test.names[row]: prompts[row] for row in predicted.rows}


def check_clip_named(asked: Choosing) -> None:
    """Raise UserError / DataError for a CLIP to choose by that is not there."""
    if asked.compares:
        check_pretrained(model_name(asked.clip_model), asked.clip_pretrained)


def keeper(asked: Choosing, decoder: Decoder, predicted: Predicted, device: torch.device) -> Keep:
    """Which of several draws of a picture is kept. Raises UserError / DataError."""
    if not asked.compares:
        return partial(asked.kept, agreement=None)
    precision = str(decoder.clip.get("precision", "float32"))
    loaded = load_clip(asked.clip_model, asked.clip_pretrained, device)
    clip = adjusted(loaded, float(decoder.clip.get("target_blur_px", 0.0)), precision)
    check_eye(asked, clip, decoder)
    image = predicted.embeddings["image"]
    return partial(asked.kept, agreement=agreement_of(clip, decoder, image, predicted.places))


def draw_run(
    run: RunDirectory,
    predicted: Predicted,
    series: Series,
    rendering: Rendering,
    prompts: Sequence[str],
    device: torch.device,
    coarse: torch.Tensor | None,
    keep: Keep,
) -> None:
    """All pictures, from noise or from ``coarse`` pictures [n, 3, GRID, GRID]."""
    renderer = open_renderer(rendering, device, prompts)
    if coarse is not None:
        test, rows = predicted.test, predicted.rows
        starts = encode_starts(
            renderer.pipe, coarse, rendering.size, run.path, test, rows, series.marks
        )
        renderer = replace(renderer, starts=starts)
    draw_series(series, run, renderer, predicted, keep)


def warn_of(decoder: Decoder, test: TestEEG) -> None:
    """Say what is not known: the person, or what was seen."""
    decoder.tell_stranger(test.subject)
    if test.transductive:
        util.LOG.warning("%s: %s", TRANSDUCTIVE, test.subject)
    if test.stimuli is None:
        util.LOG.warning(
            "no test_images/ beside %s: pictures get numbers, and nothing shows what was seen; "
            "--data_path DATA names it",
            test.source,
        )


def tell_pictures(run: RunDirectory, test: TestEEG, control: str | None) -> None:
    """What a finished drawing says: where the pictures are, and how to score them."""
    data = test.stimuli[0].data_path if test.stimuli else None
    scores = {"images": run.path, "output_dir": run.path.parent / "scores"}
    tell_end(
        {"pictures": run.path, "overview": run.path / f"overview{run.suffix}.png"},
        # controls are scored beside a run: --control_images
        [call("evaluate.py", data_path=data, **scores)] if data and not control else [],
    )


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures of this shard, or go on drawing, or do nothing when they are finished."""
    options = args.resolve("generate", argv)
    values, series = options.values, options.settings(Series)
    asked, rendering = options.settings(ModelChoice), options.settings(Rendering)
    device = util.pick_device(values.device)
    injection_map.load_injection(series.injection)
    check_clip_named(options.settings(Choosing))
    decoder, test = open_model(asked, rendering)
    rows = shard_rows(min(values.max_stimuli or len(test.eeg), len(test.eeg)), values.shard)
    part = "" if values.shard == "1/1" else values.shard.replace("/", "-of-")
    what = f"a sweep of {series.sweep}" if series.sweep else f"{len(recipes(series.mode))} pictures"
    plan = (
        f"predict {len(MODALITIES)} embeddings of {len(rows)} stimuli seen by {test.subject}",
        f"draw {what} of {rendering.size} px of each of {len(rows)} on {device}",
    )
    inputs = model_inputs(asked, rendering, test, series.injection)
    run = open_run(options, values.output_dir, inputs, plan, part, shared=True)
    if not rows and not run.finished:  # more shards than stimuli: this one has nothing to do
        run.finish({"stimuli": 0, "what": what})
    if run.finished:
        return 0
    warn_of(decoder, test)
    how, decoder = options.settings(Prediction), decoder.to(device)
    predicted = predict(decoder, test, rows, how, asked.fusion_weights)
    save_predictions(run, decoder, predicted)
    prompts = prompts_of(options.settings(Prompting), decoder, predicted)
    if len(prompts) > 1:
        write_json(run.path / f"prompts{run.suffix}.json", told(prompts, predicted))
    head = low_level.load_head(asked.model_path) if rendering.from_picture else None
    coarse = coarse_starts(decoder, head, test, rows, how) if head else None
    keep = keeper(options.settings(Choosing), decoder, predicted, device)
    draw_run(run, predicted, series, rendering, prompts, device, coarse, keep)
    run.finish({"stimuli": len(rows), "what": what})
    tell_pictures(run, test, values.control)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
