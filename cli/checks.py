"""Combinations of flags that no single flag can see. Each is refused with the cure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.parser import Parser
from modalities import AUTO, WITHOUT_EEG

OF_THE_MODEL = (  # flags of train.py that a trained model has an answer to already
    "encoder", "encoder_weights", "encoder_training", "aligner", "contrast_layer",
    "prior_predicts", "prior_loss", "condition_dropout", "loss_weights", "aligner_skip",
)  # fmt: skip


OF_THE_CHECK = ("check", "captions", "clip_feature_path")
INSTEAD_OF_THE_CHECK = ("export", "import_features", "join_features", "blocks", "fetch")
OF_THE_PRIOR = ("prior_predicts", "prior_loss", "noise_draws", "condition_dropout")
# flags of evaluate.py that say nothing of pictures
OF_RETRIEVAL = (
    "control",
    "subjects",
    "dataset",
    "permutations",
    "average",
    "transductive",
    "averaging",
    "test_views",
)
OF_PICTURES = ("truth", "weights_dir", "score_cache", "authenticity")


def check_combinations(parser: Parser, values: argparse.Namespace) -> None:
    """Combinations that no single flag can see."""
    window = getattr(values, "time_window", None)
    if window and window[0] >= window[1]:
        parser.error(f"--time_window {window[0]} {window[1]}: the start must come before the end")
    if parser.stage == "check":
        _validate_writing(parser, values)
    if parser.stage == "features" and not _names_concept(values.text_template):
        parser.error(
            f"--text_template {values.text_template!r}: expected {{concept}}, without which all "
            "texts would be equal, and no other braces"
        )
    interval = getattr(values, "guidance_interval", None)
    if interval and interval[0] >= interval[1]:
        parser.error(f"--guidance_interval {interval[0]} {interval[1]}: LOW must be below HIGH")
    if getattr(values, "init_strength", 1.0) == 0:
        parser.error("--init_strength 0 leaves no step to draw: give more than 0")
    control = getattr(values, "control", None)
    if control in WITHOUT_EEG and not values.clip_feature_path:
        parser.error(f"--control {control} needs --clip_feature_path, where the embeddings are")
    if control in WITHOUT_EEG and getattr(values, "fusion_weights", "") == "confidence":
        parser.error(
            f"--fusion_weights confidence is read from the EEG, and --control {control} has none: "
            "give --fusion_weights fixed or validated"
        )
    if parser.stage == "generate":
        _validate_generate(parser, values)
    if parser.stage == "evaluate":
        _validate_evaluate(parser, values)
    for flag in ("contrast_layer", "target_blur", "seeds", "minutes"):
        given = getattr(values, flag, None) or ()
        if len(set(given)) < len(given):
            parser.error(f"--{flag} {' '.join(map(str, given))}: one of them twice")
    if parser.stage in ("train", "retrieval"):
        _validate_fitting(parser, values)
    if parser.stage == "train":
        _validate_train(parser, values)
    if parser.stage == "preprocess":
        _validate_preprocess(parser, values)


def _given(parser: Parser, values: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Those of these flags that have another value than the default."""
    return [flag for flag in flags if getattr(values, flag) != parser.actions()[flag].default]


def _validate_fitting(parser: Parser, values: argparse.Namespace) -> None:
    if not values.encoder_weights:
        _refuse_idle(parser, values, ("encoder_training",), "without --encoder_weights")
    if values.contrast_layer and values.target_mse:
        parser.error("--target_mse needs the image embeddings as they are: not --contrast_layer")
    if not values.mask_time + values.mask_patch:
        _refuse_idle(parser, values, ("mask_span",), "without --mask_time or --mask_patch")
    if values.epochs != AUTO:
        _refuse_idle(parser, values, ("patience",), "without --epochs auto")
        return
    if values.schedule == "cosine":
        parser.error("--schedule cosine ends at a known epoch: not with --epochs auto")
    if values.patience < values.val_every:
        parser.error(
            f"--patience {values.patience} epochs, and --val_every {values.val_every}: give as many"
        )


OF_CUTTING = ("raw", "events", "unit", "keep_bad_segments", "min_distance", "sessions", "channels",
              "interpolate_missing", "reference", "band_pass", "epoch", "rate", "whiten", "dtype",
              "n_jobs")  # fmt: skip
OF_THE_CONTRAST = ("text_contrast", "contrast_normalise", "contrast_positives", "contrast_layer")
OF_GUIDANCE = ("negative_prompt", "guidance_interval")


def _refuse_idle(
    parser: Parser, values: argparse.Namespace, flags: Sequence[str], why: str
) -> None:
    """Refuse the first of these flags that is given: it would do nothing."""
    for flag in _given(parser, values, flags):
        parser.error(f"--{flag} does nothing {why}")


def _validate_generate(parser: Parser, values: argparse.Namespace) -> None:
    if values.init == "none":
        _refuse_idle(parser, values, ("init_strength",), "without --init superpixel")
    if values.guidance <= 1:
        _refuse_idle(parser, values, OF_GUIDANCE, f"at --guidance {values.guidance}, which is off")
    if values.prompt_source == "oracle":
        _refuse_idle(parser, values, ("prompt",), "with --prompt_source oracle: captions are told")
    if values.prompt_source == "decoded":
        _refuse_idle(parser, values, ("prompt",), "with --prompt_source decoded: captions are told")
        if not values.clip_feature_path:
            parser.error("--prompt_source decoded needs --clip_feature_path: training captions")
    else:
        _refuse_idle(parser, values, ("prompt_concepts",), "without --prompt_source decoded")
    if values.draws == 1:
        _refuse_idle(parser, values, ("choose",), "at --draws 1")
    if values.draws == 1 or values.choose == "random":
        _refuse_idle(parser, values, ("clip_model", "clip_pretrained"), "without a choice by CLIP")
    if values.sweep:
        _refuse_idle(parser, values, ("mode",), f"in --sweep {values.sweep}, which draws its own")
    idle = {"sites": ("injection", "fusion_weights"), "scale": ("fusion_strength",)}
    why = f"in --sweep {values.sweep}, which sets its own scales"
    _refuse_idle(parser, values, idle.get(values.sweep, ()), why)


def _validate_train(parser: Parser, values: argparse.Namespace) -> None:
    if values.contrast_weight == 0:
        _refuse_idle(parser, values, OF_THE_CONTRAST, "at --contrast_weight 0")
    if values.minutes and not values.adapt_from:
        parser.error("--minutes are of a new person's EEG: needs --adapt_from")
    if not values.minutes:
        _refuse_idle(parser, values, ("trial_seconds",), "without --minutes")
    if values.adapt_from and not values.subjects:
        parser.error("--adapt_from needs --subjects: the people that the model does not know")
    if values.adapt_from and (values.init_from or values.leave_out):
        parser.error("--adapt_from goes with neither --init_from nor --leave_out")
    if values.trainable != "all" and not values.adapt_from:
        parser.error(f"--trainable {values.trainable} freezes parts of a model: needs --adapt_from")
    if values.adapt_from and values.trainable == "subject_layers" and values.subject_dropout:
        parser.error(
            f"--subject_dropout {values.subject_dropout} would train what strangers share, and "
            "with it the people that the model knows: not with --trainable subject_layers"
        )
    for flag in _given(parser, values, OF_THE_MODEL) if values.adapt_from else ():
        parser.error(f"--{flag} was settled when the model of --adapt_from was trained")
    for flag in _given(parser, values, OF_THE_PRIOR) if values.aligner != "prior" else ():
        parser.error(f"--{flag} is of --aligner prior, not of --aligner {values.aligner}")
    if values.aligner == "none":
        why = "with --aligner none, which is nothing but that"
        _refuse_idle(parser, values, ("aligner_skip",), why)


def _validate_writing(parser: Parser, values: argparse.Namespace) -> None:
    writes = [flag for flag in INSTEAD_OF_THE_CHECK if getattr(values, flag)]
    if len(writes) > 1:
        parser.error(f"--{writes[0]} and --{writes[1]} are two commands")
    if bool(writes) != bool(values.output_path or values.fetch):
        parser.error(
            "--output_path DIR goes with --export, --import_features, --join_features or --blocks"
        )
    for flag in _given(parser, values, OF_THE_CHECK) if writes else ():
        if flag == "clip_feature_path" and values.join_features:
            continue
        parser.error(f"--{flag} is of the check, which --{writes[0]} takes the place of")
    if values.join_features and not values.clip_feature_path:
        parser.error("--join_features needs --clip_feature_path: the bank with the modalities")
    if values.import_features or values.join_features or values.blocks:
        _refuse_idle(parser, values, ("subjects", "dataset"), f"with --{writes[0]}")
    if values.fetch:
        _refuse_idle(parser, values, ("output_path", "dataset"), "with --fetch: into --data_path")
    else:
        _refuse_idle(parser, values, ("dry_run",), "without --fetch: nothing else takes long")
    of_blocks = ("split", "allow_block_leak", "seed")
    if not values.blocks:
        _refuse_idle(parser, values, of_blocks, "without --blocks")
    elif values.split != "random":
        _refuse_idle(parser, values, ("allow_block_leak",), f"with --split {values.split}")


def _validate_preprocess(parser: Parser, values: argparse.Namespace) -> None:
    if values.epochs_file:
        why = "with --epochs_file, whose trials are taken as they are"
        _refuse_idle(parser, values, OF_CUTTING, why)
        return
    start, end = values.epoch
    if not start < 0 < end:
        parser.error(
            f"--epoch {start} {end}: must begin before the onset at 0, for the baseline, "
            "and end after it"
        )
    if values.band_pass and values.band_pass[0] >= values.band_pass[1]:
        low, high = values.band_pass
        parser.error(f"--band_pass {low} {high}: LOW_HZ must be below HIGH_HZ")
    if values.raw:
        _refuse_idle(parser, values, ("sessions",), "with --raw: each of its files is taken")
    if values.unit and not values.raw:
        parser.error("--unit belongs to your own recordings: name them with --raw")
    if values.events and not values.raw:
        parser.error("--events belongs to your own recordings: name them with --raw")
    if values.events and len(values.events) != len(values.raw):
        parser.error(
            f"--events names {len(values.events)} tables for {len(values.raw)} "
            "recordings of --raw: one each, in the same order"
        )


def _validate_evaluate(parser: Parser, values: argparse.Namespace) -> None:
    finished = [flag for flag in ("compare", "over_seeds") if getattr(values, flag)]
    if finished:
        if values.model_path or values.images or len(finished) > 1:
            parser.error(
                f"--{finished[0]} reads finished runs: leave out --model_path, --images and any "
                "other comparison"
            )
        return
    if not (values.model_path or values.images):
        parser.error(
            "nothing to score: give --model_path (retrieval), --images (pictures), both, "
            "--compare or --over_seeds"
        )
    if values.model_path and not values.clip_feature_path:
        parser.error("--model_path needs --clip_feature_path, the gallery to retrieve from")
    if values.model_path and not values.data_path:
        parser.error("--model_path needs --data_path, where the test EEG is")
    if values.images and not (values.data_path or values.truth):
        parser.error("--images needs the pictures that were seen: --data_path DATA or --truth DIR")
    if values.authenticity and values.images and not values.data_path:
        parser.error("--authenticity needs --data_path, where the training pictures are")
    if values.control_images and not values.images:
        parser.error("--control_images are scored beside --images: name those, too")
    _validate_what_is_scored(parser, values)


def _validate_what_is_scored(parser: Parser, values: argparse.Namespace) -> None:
    """Flags of retrieval and of pictures, each where it is scored."""
    for flag in _given(parser, values, OF_RETRIEVAL) if not values.model_path else ():
        parser.error(f"--{flag} is of retrieval, which is not scored: give --model_path")
    if values.protocol == "neuralbench":
        if values.images or not values.model_path:
            parser.error(
                "--protocol neuralbench scores retrieval: give --model_path, and score --images in "
                "a run of their own"
            )
        _refuse_idle(parser, values, ("control",), "at --protocol neuralbench: it has its own")
    of_pictures = OF_PICTURES + ("protocol",) * (values.protocol != "neuralbench")
    for flag in _given(parser, values, of_pictures) if not values.images else ():
        parser.error(f"--{flag} is of pictures, and none are scored: give --images")
    if values.average and values.control in WITHOUT_EEG:
        parser.error(
            f"--average counts repetitions of the EEG; --control {values.control} has none"
        )
    if values.occlusion and (values.control or not values.model_path):
        parser.error(
            "--occlusion explains what a model reads from the EEG: give --model_path, "
            "and no --control"
        )


def _names_concept(template: str) -> bool:
    """Whether the template can be filled in and then holds the concept."""
    try:
        return "\0" in template.format(concept="\0")
    except (LookupError, ValueError, AttributeError):
        return False
