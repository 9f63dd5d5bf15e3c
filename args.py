"""Every flag of every stage, resolved once: defaults < ``--config`` < command line.

Each value remembers where it came from. Config values pass through the same parser as the command
line, so types, ranges and choices hold. Standard library and PyYAML only: ``--help`` needs no
torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import modalities
from cli.checks import check_combinations
from cli.config import Options, as_yaml, config_tokens
from cli.data_check import check_parser, dataset_flag
from cli.miniature import demo_parser, pretrain_parser, world_parser
from cli.parser import (
    FlagGroup,
    Parser,
    batch_size,
    common_flags,
    contrast_layer,
    count,
    divisible_by_8,
    epochs,
    non_negative,
    positive,
    positive_int,
    proper_share,
    seconds,
    shard,
    share,
)
from modalities import (
    AUTO,
    CONTROLS,
    EACH,
    ENCODERS,
    FINAL,
    PROMPTS,
    QUANTITIES,
    STRICT,
    TEXT_TEMPLATE,
)

MODEL_PRESETS: dict[str, dict[str, Any]] = {  # of generate.py: what its flags default to
    "sdxl": {"steps": 30, "guidance": 5.0, "size": 768},
    # distilled models: no guidance, few steps that start at pure noise
    "turbo": {"steps": 4, "guidance": 0.0, "size": 512, "timestep_spacing": "trailing",
              "scheduler": "EulerAncestralDiscreteScheduler"},
    "lightning": {"steps": 4, "guidance": 0.0, "size": 768, "timestep_spacing": "trailing",
                  "scheduler": "EulerDiscreteScheduler"},
}  # fmt: skip


# ---------------------------------------------------------------- flags shared by stages


def _eeg_selection(group: FlagGroup) -> None:
    group.several("--channels", metavar="NAME",
        help="EEG channels by name; default: all in the file")
    group.several("--time_window", type=seconds, metavar=("START_S", "END_S"),
        help="seconds after stimulus onset, end exclusive; default: all in the file")
    _cache_dir(group)


def _cache_dir(group: FlagGroup, default: str = "DATA/eeg_cache") -> None:
    group.add("--cache_dir", type=Path, metavar="DIR", per_call=True,
        help=f"where the float32 copies of the EEG live; default: {default}")


def _test_eeg(group: FlagGroup) -> None:
    group.choose("--averaging", choices=("mean", "weighted"), default="mean",
        help="of a test stimulus' repetitions: all alike, or by the inverse of each one's noise")
    group.add("--test_views", type=positive_int, default=1, metavar="N",
        help="read test EEG N times, shifted by up to 20 ms and without a tenth of the channels, "
        "beside as it is, and take the mean embedding; 1 = off")
    _cache_dir(group)


def _checkpoint(group: FlagGroup) -> None:
    group.choose("--checkpoint", choices=("best", "latest"), default="best",
        help="best on held-out training concepts, or the last one")


def _training(group: FlagGroup) -> None:
    group.add("--epochs", type=epochs, default=100, metavar="N|auto",
        help="passes over the training stimuli; auto: until --patience of them bring no better "
        "validation on held-out training concepts")
    group.add("--patience", type=positive_int, default=10, metavar="EPOCHS",
        help="of --epochs auto")
    group.add("--batch_size", type=positive_int, default=16, help="samples per optimiser step")
    group.add("--learning_rate", type=positive, default=1e-4, help="AdamW peak learning rate")
    group.add("--lr_eeg", type=positive, metavar="RATE",
        help="peak learning rate of the EEG encoder; default: --learning_rate")
    group.choose("--schedule", choices=("constant", "cosine"), default="constant",
        help="of the learning rates after the warm-up: as they are, or down to 0 at the end")
    group.add("--weight_decay", type=non_negative, default=0.01, help="AdamW weight decay")
    group.add("--warmup_steps", type=count, default=0, help="linear warm-up")
    group.add("--grad_clip", type=non_negative, default=1.0, help="gradient norm limit; 0 = none")
    group.add("--ema_decay", type=share, default=0.0,
        help="EMA of the weights, used for validation and saving; 0 = off")
    group.add("--seed", type=count, default=0, help="of initialisation, order, noise and masks")
    group.several("--seeds", type=count, metavar="N", per_call=True,
        help="a training with each of these seeds instead of --seed, in RUN/seed_N")
    group.add("--accumulate", type=positive_int, default=1, metavar="N",
        help="compute a batch in N parts, for GPUs that are too small for it; negatives of the "
        "contrastive loss are those of the same part")
    _precision(group, "the networks' products; weights, losses and the optimiser stay float32. "
        f"A GPU rounds what float32 multiplies to TF32; with {STRICT} it does not", STRICT)
    group.add("--epochs_per_call", type=positive_int, metavar="N", per_call=True,
        help="save and stop after N epochs (exit code 75); the same command goes on")
    group.add("--save_every", type=positive_int, default=1, metavar="EPOCHS", per_call=True,
        help="epochs between checkpoints")
    group.switch("--compile", help="torch.compile the networks: slow to start, then faster",
        per_call=True)
    group.choose("--data_on_device", choices=(AUTO, "yes", "no"), default=AUTO, per_call=True,
        help="keep the EEG on the GPU; auto: if it takes at most half of its free memory")
    group.choose("--report_to", choices=("none", "wandb", "trackio"), default="none", per_call=True,
        help="also tell this tracker, which has to be installed; TensorBoard is always told")


def _training_data(group: FlagGroup) -> None:
    group.add("--data_path", type=Path, required=True, per_call=True, metavar="DATA",
        help="folder with Preprocessed_data_250Hz/, training_images/, test_images/")
    group.add("--clip_feature_path", type=Path, required=True, per_call=True, metavar="DIR",
        help="output of clip_feature_extractor.py")
    group.add(
        "--output_dir", type=Path, required=True, per_call=True, metavar="RUN",
        help="run directory")
    dataset_flag(group)
    group.several("--subjects", metavar="SUB",
        help="e.g. sub-01 sub-08; default: all that are there")
    group.add("--leave_out", metavar=f"SUB|{EACH}",
        help="train without this subject, whose EEG is never opened, to score it as a stranger; "
        f"{EACH}: a model without each in turn, in RUN/without_SUB")
    group.add("--subject_dropout", type=share, metavar="P",
        help="probability that whose EEG a sample is stays unknown, which trains the token for "
        "strangers; default: 0.2 with --leave_out, else 0")
    group.choose("--align", choices=("none", "euclidean"), default="none",
        help="whiten each person's EEG by the mean covariance of the own training trials; a "
        "stranger's is aligned by the own test recording, without labels, and marked transductive")
    group.choose("--trials", choices=("average", "single", "random"), default="random",
        help="a sample is the mean of all repetitions, one repetition, "
        "or the mean of a random subset")
    group.add("--val_fraction", type=proper_share, default=0.05,
        help="training concepts held out for validation and selection")
    _eeg_selection(group)


def _encoder(parser: Parser) -> None:
    group = parser.flags("EEG encoder")
    group.add("--encoder", default=ENCODERS[0], metavar="NAME",
        help=f"{', '.join(ENCODERS)}, or the class name of a model of braindecode, e.g. "
        "ShallowFBCSPNet, where that is installed; several side by side: ATMS+NICE")
    group.add("--encoder_weights", type=Path, metavar="DIR", per_call=True,
        help="pre-trained weights of a class of braindecode, e.g. Labram or REVE, as its "
        "save_pretrained writes them (config.json, model.safetensors); docs/training.md")
    group.choose("--encoder_training", choices=("full", "lora", "frozen"), default="full",
        help="what is learned of --encoder_weights: all, low-rank changes (peft), or nothing; what "
        "makes an embedding of it always is")


def _masks(parser: Parser) -> None:
    group = parser.flags("EEG masking while training (off by default)")
    for kind, what in (
        ("channel", "a channel"),
        ("time", "a time span"),
        ("patch", "a channel x time patch"),
    ):
        group.add(f"--mask_{kind}", type=share, default=0.0, metavar="P",
            help=f"probability that {what} is set to 0")
    group.add("--mask_span", type=positive_int, default=25, metavar="SAMPLES",
        help="length of time spans and patches")


def _contrast(group: FlagGroup) -> None:
    group.add("--text_contrast", type=share, default=0.01, metavar="SHARE",
        help="share of text in the contrastive loss; images get the rest")
    group.choose("--contrast_normalise", choices=("both", "targets"), default="both",
        help="what the contrastive loss brings to unit length; targets: the EEG side keeps its "
        "own, as in ATM's published code")
    group.choose("--contrast_positives", choices=("pair", "concept"), default="pair",
        help="which rows of a batch the contrastive loss draws together: an EEG and its own "
        "target, or all of the same concept; the rest is pushed apart")
    group.several("--contrast_layer", type=contrast_layer, metavar=f"N|NAME|{FINAL}",
        help="compare EEG with this layer of CLIP's image side (clip_feature_extractor.py "
        f"--image_layers), the {FINAL} one, or another encoder's images by its name in the bank "
        "(dataset.py --join_features), through a trained linear projection, which retrieval then "
        "uses, too; several: a mixture, with weights that are learned for each person; the five "
        "embeddings to draw from stay as they are; default: the final layer without a projection")
    group.add("--target_mse", type=non_negative, default=0.0, metavar="WEIGHT",
        help="weight of the MSE between the encoder's output and the un-normalised image "
        "embedding, beside the contrastive loss; 0 = off")


def _precision(group: FlagGroup, what: str, *more: str) -> None:
    choices = ("float32", "bfloat16", "float16", *more)
    group.choose("--precision", choices=choices, default="float32", help=f"of {what}")


def _superpixel_size(group: FlagGroup) -> None:
    group.add("--superpixel_size", type=positive_int, default=500, metavar="PX",
        help="pictures are resized to this width and height before SLIC; THINGS has 500")


# ---------------------------------------------------------------- the stages


def _signal(parser: Parser) -> None:
    group = parser.flags("signal")
    group.several("--channels", metavar="NAME",
        help="by name, in this order; or things (the 63), posterior (the 17 of parietal and "
        "occipital cortex), all; default: things, with --raw all EEG channels")
    group.switch("--interpolate_missing",
        help="channels that are missing, flat or marked as bad: spherical splines from the rest")
    group.several("--reference", metavar="NAME",
        help="average, or channels whose mean is subtracted; default: as recorded")
    group.several("--band_pass", type=non_negative, metavar=("LOW_HZ", "HIGH_HZ"),
        help="zero-phase FIR of the continuous recording, LOW 0 = low-pass; default: none")
    group.several("--epoch", type=seconds, default=[-0.2, 1.0], metavar=("START_S", "END_S"),
        help="around the onset; the mean before the onset is subtracted, what follows it is kept")
    group.add("--rate", type=positive, default=250.0, metavar="HZ", help="sampling rate written")
    group.switch("--whiten", default=True,
        help="multivariate noise normalisation, per session, from its training trials")
    group.choose("--dtype", choices=("float64", "float32"), default="float64",
        help="of the file: as published, or half the size")
    group.add("--seed", type=count, default=20200220,
        help="of the choice and the order of repetitions")


def _own_recordings(parser: Parser) -> None:
    group = parser.flags("your own recordings")
    group.several("--raw", type=Path, metavar="FILE|DIR", per_call=True,
        help="one subject's recordings of EEG or MEG in order (.vhdr, .edf, .bdf, .set, .fif, "
        ".ds, ...), or one folder: BIDS, "
        "which takes mne-bids, or Alljoined's raw_eeg")
    group.several("--events", type=Path, metavar="TABLE", per_call=True,
        help="CSV or TSV per recording: column stimulus (a picture of DATA) beside onset (s), "
        "sample or marker; default: *_events.tsv beside the recording, as in BIDS")
    group.several("--epochs_file", type=Path, metavar="FILE", per_call=True,
        help="one subject's trials that are cut already, as MNE's *-epo.fif (pictures by a column "
        "of the metadata or by the events' names) or Alljoined1's parquet; nothing is filtered, "
        "whitened or resampled")
    group.choose("--unit", choices=("V", "mV", "uV", "nV"), default=None,
        help="of the numbers in the files, where these state none, or a wrong one")
    group.switch("--keep_bad_segments",
        help="keep trials in segments that the recording marks as BAD; those across a gap are "
        "always left out")
    group.add("--min_distance", type=positive, metavar="SECONDS",
        help="events closer than this are refused, as one told twice; default: half the baseline")


def preprocess_parser() -> Parser:
    parser = Parser(
        "preprocess",
        "Stage 0: raw EEG -> DATA/Preprocessed_data_250Hz/sub-XX, which all later stages read.\n"
        "Without --raw: the raw THINGS-EEG2 recordings in DATA/Raw_data. With --raw: your own, in\n"
        "any format that MNE reads; see docs/own_recordings.md.",
        "python preprocess.py --data_path DATA --n_jobs 4\n"
        "  python preprocess.py --data_path DATA --raw a.vhdr b.vhdr --events a.csv b.csv "
        "--subjects sub-01",
    )
    group = parser.flags("data")
    group.add("--data_path", type=Path, required=True, per_call=True, metavar="DATA",
        help="folder with Raw_data/, or with --raw your training_images/ and test_images/")
    group.add("--output_path", type=Path, per_call=True, metavar="DIR",
        help="Preprocessed_data_250Hz/ is written here; default: DATA")
    group.several("--subjects", metavar="SUB", per_call=True,
        help="e.g. sub-01 sub-08; default: all that are there. With --raw FILE: its name")
    group.add("--sessions", type=positive_int, default=4, metavar="N",
        help="of each subject of THINGS-EEG2: ses-01 to ses-0N")
    _own_recordings(parser)
    _signal(parser)
    group = parser.flags("work")
    group.add("--n_jobs", type=positive_int, default=1, metavar="N", per_call=True,
        help="processes that cut and resample trials")
    common_flags(parser, device=False)
    return parser


def _encoding_work(parser: Parser) -> None:
    group = parser.flags("work")
    group.add("--shard", type=shard, default="1/1", metavar="i/n", per_call=True,
        help="encode the i-th of n parts, for SLURM arrays: jobs with one --output_path share the "
        "work; the last one joins the bank, or a call without --shard")
    group.add("--num_workers", type=count, metavar="N", per_call=True,
        help="superpixel processes, which stay two batches ahead of CLIP; 0 = in this process; "
        "default: cores - 1, at least 1")
    group.add("--shard_size", type=positive_int, default=256, metavar="PICTURES",
        help="a restart loses at most this many")
    group.switch("--save_superpixels", help="also write the superpixel PNGs to look at")


def features_parser() -> Parser:
    parser = Parser(
        "features",
        "Stage 1: encode the stimuli once into five CLIP embeddings each.",
        "python clip_feature_extractor.py --data_path DATA --output_path OUT/clip_features "
        "--batch_size 32",
    )
    group = parser.flags("data")
    group.add("--data_path", type=Path, required=True, per_call=True, metavar="DATA",
        help="folder with training_images/ and test_images/")
    group.add("--output_path", type=Path, required=True, per_call=True, metavar="DIR",
        help="where the feature bank is written")
    group.add("--captions", type=Path, per_call=True, metavar="CSV|JSON",
        help="captions by picture (training_images/C/F.jpg) or by concept: a table with columns "
        "picture or concept, and caption, or a JSON object")
    group.add("--text_template", default=TEXT_TEMPLATE, metavar="TEXT",
        help="used where --captions has nothing; {concept} is the folder name after its number")
    group = parser.flags("CLIP")
    _clip(group)
    group.add("--batch_size", type=positive_int, default=32, help="pictures encoded at once",
        per_call=True)
    group.several("--target_blur", type=non_negative, default=[0.0], metavar="SIGMA_PX",
        help="blur the picture before CLIP, for the image modality only: EEG holds little fine "
        "detail, and what is drawn from such targets holds less; 0 = off. Several, e.g. 0 2 4: the "
        "first is the image modality, the others are kept beside it, and training contrasts EEG "
        "with one of them by lot")
    group.several("--image_layers", type=positive_int, metavar="N",
        help="also keep these layers of CLIP's image side, averaged over the picture, for "
        "train.py --contrast_layer: transformer blocks from 1 on (ViT-H-14 has 32), or the stem "
        "and the 4 stages of a ResNet")
    _precision(group, "CLIP's products; weights stay float32. The others are faster on a GPU and "
        "a little off: models and banks of another precision are not mixed")
    _superpixel_size(parser.flags("superpixels"))
    _encoding_work(parser)
    common_flags(parser)
    return parser


def _validation(parser: Parser) -> None:
    parser.flags("validation").add("--val_every", type=positive_int, default=1, metavar="EPOCHS",
        help="epochs between validations")


def _joint_loss(parser: Parser) -> None:
    group = parser.flags("loss")
    group.add("--contrast_weight", type=non_negative, default=1.0, metavar="LAMBDA",
        help="weight of the CLIP contrastive loss beside the priors' loss")
    _contrast(group)
    group.choose("--aligner", choices=("prior", "mlp", "none"), default="prior",
        help="what makes the five embeddings of the encoder's output: a diffusion prior for each, "
        "a regression with a shared trunk, or nothing (the output is taken for each of them)")
    group.choose("--aligner_skip", choices=("on", "off"), default="on",
        help="let the aligner begin at the encoder's output, with a fitted gain for each "
        "modality, and learn what is to be changed of it; on won at 120 to 16,540 pictures")
    group.choose("--prior_predicts", choices=QUANTITIES, default="velocity",
        help="what the priors' networks put out")
    group.choose("--prior_loss", choices=QUANTITIES,
        help="what 0.7 MSE + 0.3 (1 - cos) of the priors compares; default: what they predict, "
        "from which they learned faster on simulated EEG than from the noise, as published")
    group.add("--noise_draws", type=positive_int, default=4, metavar="N",
        help="timesteps and noises at which the priors see each sample of a batch: cheap beside "
        "the encoder, and they learn faster")
    group.choose("--loss_weights", choices=("fixed", "uncertainty"), default="fixed",
        help="of the five modalities: the registry's, or learned log-variances")
    group.add("--condition_dropout", type=share, default=0.1, metavar="P",
        help="share of samples a prior sees without EEG, for guidance")


def train_parser() -> Parser:
    parser = Parser(
        "train",
        "Stage 2: fit the EEG encoder and what makes five embeddings of its output, jointly.",
        "python train.py --data_path DATA --clip_feature_path OUT/clip_features "
        "--output_dir OUT/model \\\n      --epochs 100 --batch_size 16 --learning_rate 1e-4",
    )
    _training_data(parser.flags("data"))
    _encoder(parser)
    group = parser.flags("optimisation")
    _training(group)
    group.add("--init_from", type=Path, per_call=True, metavar="RUN",
        help="start from the encoder of an ATMS_retrieval.py run")
    group.add("--adapt_from", type=Path, per_call=True, metavar="RUN",
        help="go on from this model as it is, with --subjects that it does not know")
    group.choose("--trainable", choices=("subject_layers", "encoder", "all"), default="all",
        help="what changes with --adapt_from: the new subjects' layer and token, the encoder, all")
    group.several("--minutes", type=positive, metavar="MINUTES",
        help="with --adapt_from: train on so much of the new subjects' EEG, nested, each in "
        "RUN/minutes_N, and draw RUN/calibration.png, the score against the minutes")
    group.add("--trial_seconds", type=positive, default=0.2, metavar="SECONDS",
        help="recorded time of a trial, which --minutes counts; THINGS-EEG2: 0.2")
    group.switch("--low_level", per_call=True,
        help="at the end also fit the linear head that predicts a coarse picture, for "
        "generate.py --init superpixel; on a finished run fit only that")
    _joint_loss(parser)
    _validation(parser)
    _masks(parser)
    common_flags(parser)
    return parser


def retrieval_parser() -> Parser:
    parser = Parser(
        "retrieval",
        "Contrastive pre-training of the EEG encoder, scored by retrieval on held-out concepts.",
        "python ATMS_retrieval.py --data_path DATA --clip_feature_path OUT/clip_features "
        "--output_dir OUT/encoder",
    )
    _training_data(parser.flags("data"))
    _encoder(parser)
    _training(parser.flags("optimisation"))
    _contrast(parser.flags("loss"))
    _validation(parser)
    _masks(parser)
    common_flags(parser)
    return parser


def _model(group: FlagGroup) -> None:
    group.add("--model_path", type=Path, required=True, per_call=True, metavar="RUN",
        help="output of train.py")
    _checkpoint(group)


def _prior_sampling(parser: Parser) -> None:
    group = parser.flags("prior sampling")
    group.add("--prior_steps", type=positive_int, default=20, metavar="N",
        help="denoising steps of each prior")
    group.add("--prior_guidance", type=non_negative, default=2.0, metavar="SCALE",
        help="classifier-free guidance; 1 = off")
    group.add("--prior_draws", type=positive_int, default=8, metavar="N",
        help="a prediction is the mean of so many samples, nearer to the truth than a single one")
    group.choose(
        "--prior_sampler", choices=("dpm", "ddim"), default="dpm", help="DPM-Solver++ or DDIM")
    group.switch("--restore_variance",
        help="stretch predictions, which shrink towards the mean, until each modality spreads as "
        "the training targets do; measured on held-out training concepts")


def _control(group: FlagGroup) -> None:
    group.choose("--control", choices=tuple(CONTROLS),
        help="instead of the EEG's own predictions: EEG of other stimuli, noise, the mean training "
        "embedding, or the stimulus' own embeddings (the ceiling); marked in every output")


def _drawing_work(parser: Parser) -> None:
    group = parser.flags("work")
    group.add("--batch_size", type=batch_size, default=4, metavar="N|auto", per_call=True,
        help="pictures drawn at once; auto = as many as fit")
    group.switch("--offload", per_call=True,
        help="keep the models in main memory and bring each to the GPU only while it computes")
    group.switch("--compile", per_call=True,
        help="compile the U-Net with torch.compile: minutes once, then faster on a GPU")
    group.add("--shard", type=shard, default="1/1", metavar="i/n", per_call=True,
        help="draw the i-th of n parts of the stimuli, for SLURM arrays")


def _clip(group: FlagGroup, more: str = "") -> None:
    group.add("--clip_model", default="ViT-H-14", metavar="NAME|JSON",
        help=f"open_clip model name or model config file{more}")
    group.add("--clip_pretrained", per_call=True, default="laion2b_s32b_b79k", metavar="TAG|FILE",
        help=f"open_clip tag or weight file{more}")


def _denoising(group: FlagGroup) -> None:
    group.add("--size", type=divisible_by_8, default=768, metavar="PX", help="width and height")
    group.add("--steps", type=positive_int, default=30, help="SDXL denoising steps")
    group.add("--guidance", type=non_negative, default=5.0, metavar="SCALE",
        help="SDXL classifier-free guidance; up to 1 = none")
    group.several("--guidance_interval", type=share, default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels between these, 0 = picture, 1 = pure noise; a step "
        "without guidance takes half the time")
    group.add("--scheduler", metavar="NAME",
        help="a diffusers scheduler by its class, e.g. DPMSolverMultistepScheduler; default: the "
        "model's own")
    group.choose("--timestep_spacing", choices=("leading", "trailing", "linspace"),
        help="of the scheduler; default: the model's own")
    group.choose("--init", choices=("none", "superpixel"), default="none",
        help="superpixel: begin from a coarse picture of 16 x 16 superpixels that a linear head "
        "predicts from the EEG (train.py --low_level)")
    group.add("--init_strength", type=share, default=0.8, metavar="SHARE",
        help="of the denoising steps that are left to go from there; 1 forgets the coarse picture")
    group.add("--draws", type=positive_int, default=1, metavar="N",
        help="noises for each picture, of which --choose keeps one; all are saved")
    group.choose("--choose", choices=("eeg", "random"), default="eeg",
        help="of several draws: the one whose CLIP embedding agrees best with the predicted image "
        "embedding, never with the stimulus; or one at random, the control")
    group.choose("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="auto = fp16 on CUDA, fp32 on CPU")
    group.add(
        "--seed", type=count, default=0, help="noise depends on this and on the stimulus only")


def _injection(group: FlagGroup) -> None:
    group.choose("--preset", choices=tuple(MODEL_PRESETS), default="sdxl",
        help="steps, guidance, size and scheduler for SDXL or for a model distilled from it; each "
        "can still be given by its own flag")
    group.choose("--mode", choices=modalities.MODES, default="fused", help="which recipes to draw")
    group.choose("--sweep", choices=("sites", "modality", "scale"),
        help="draw a grid instead of a mode, on one labelled sheet: each modality at each site, "
        "each one alone and left out, or the fused picture at growing scale")
    group.add("--injection", default="intent", metavar="PRESET|FILE",
        help="where each modality enters: intent, uniform, content_style, redistributed, published "
        "or a YAML file")
    group.add("--fusion_strength", type=positive, default=1.0, metavar="SCALE",
        help="total IP-Adapter scale at a site, shared among the active modalities by their gains")
    group.choose("--fusion_weights", choices=("fixed", "validated", "confidence"), default="fixed",
        help="gains where modalities meet: the registry's, each one's skill on held-out concepts, "
        "or per stimulus from the agreement of several prior samples")
    group.choose("--prompt_source", choices=("neutral", *PROMPTS), default="neutral",
        help="decoded gives SDXL the captions of the training concepts nearest to the predicted "
        "text embedding (--clip_feature_path); oracle the stimulus' own caption, which leaks the "
        "answer; both are marked in every output")
    group.add("--prompt_concepts", type=positive_int, default=1, metavar="N",
        help="captions in a decoded prompt, the nearest first")
    group.add("--prompt", default="best quality, high quality", metavar="TEXT",
        help="neutral prompt, the same for all pictures (IP-Adapter's own default)")
    group.add("--negative_prompt",
        default="monochrome, lowres, bad anatomy, worst quality, low quality", metavar="TEXT",
        help="for guidance, the same for all pictures (IP-Adapter's own default)")
    group.add("--captions", type=Path, per_call=True, metavar="CSV|JSON",
        help="captions for --prompt_source oracle")
    _superpixel_size(group)


def generate_parser() -> Parser:
    parser = Parser(
        "generate",
        "Stage 3: predict the five embeddings from EEG and draw them with SDXL, layer-wise.",
        "python generate.py --eeg_data EEG --model_path OUT/model "
        "--sd_model_path sd_xl_base_1.0.safetensors \\\n"
        "      --ip_adapter_path ip-adapter_sdxl_vit-h.safetensors --output_dir OUT/images "
        "--mode all",
    )
    group = parser.flags("data")
    group.add("--eeg_data", type=Path, required=True, per_call=True, metavar="EEG",
        help="preprocessed_eeg_test.npy, its sub-XX folder, or DATA (one subject: see --subject)")
    group.add("--subject", metavar="SUB", help="whose EEG; default: read from the path")
    group.add("--data_path", type=Path, per_call=True, metavar="DATA",
        help="folder with test_images/; default: found above --eeg_data")
    _test_eeg(group)
    group.add("--output_dir", type=Path, required=True, per_call=True, metavar="RUN",
        help="run directory for the pictures")
    group.add("--max_stimuli", type=positive_int, metavar="N",
        help="draw only the first N stimuli; default: all")
    _control(group)
    group.add("--clip_feature_path", type=Path, per_call=True, metavar="DIR",
        help="output of clip_feature_extractor.py, for decoded prompts, and for the controls that "
        "need embeddings")
    group = parser.flags("models")
    _model(group)
    group.add("--sd_model_path", required=True, per_call=True, metavar="FILE|DIR",
        help="SDXL: single safetensors file or diffusers folder")
    group.add("--ip_adapter_path", type=Path, per_call=True, required=True, metavar="FILE",
        help="IP-Adapter for SDXL, ViT-H")
    group.add("--vae_path", per_call=True, metavar="FILE|DIR",
        help="another VAE, e.g. an fp16-safe one, or TAESDXL for quick previews")
    _clip(group, ", for --draws with --choose eeg: stage 1's")
    group = parser.flags("pictures")
    _injection(group)
    _denoising(group)
    _prior_sampling(parser)
    _drawing_work(parser)
    common_flags(parser)
    return parser


def _scored_pictures(parser: Parser) -> None:
    group = parser.flags("pictures")
    group.add("--images", type=Path, per_call=True, metavar="RUN|DIR",
        help="score the pictures of this generate.py run, or of any folder whose files or folders "
        "are named after the stimuli")
    group.several("--control_images", type=Path, per_call=True, metavar="RUN|DIR",
        help="score these beside them: runs of generate.py --control ..., or other systems'")
    group.add("--truth", type=Path, per_call=True, metavar="DIR",
        help="the pictures that were seen; default: DATA/test_images")
    group.choose("--protocol", choices=("mindeye", "braindiffuser", "neuralbench"),
        default="mindeye",
        help="sizes, resizing and weights of the published scores of pictures, which differ; "
        "neuralbench: retrieval of --model_path, from single trials as there")
    group.add("--weights_dir", type=Path, per_call=True, metavar="DIR",
        help="official weight files by their official names (or in DIR/checkpoints); scores whose "
        "file is missing are left out and named with where the file comes from")
    group.switch("--authenticity",
        help="also the nearest training picture of each, in pixels and in features, beside its own "
        "stimulus: pictures that are copies are named; reads DATA/training_images")
    group.add("--batch_size", type=positive_int, default=16, per_call=True,
        help="pictures in a network at once")
    group.add("--score_cache", type=Path, per_call=True, metavar="DIR",
        help="where the stimuli's features live; default: score_cache beside --output_dir")


def _scoring(parser: Parser) -> None:
    group = parser.flags("all")
    group.add("--data_path", type=Path, per_call=True, metavar="DATA",
        help="folder with the test EEG and test_images/")
    group.add("--output_dir", type=Path, required=True, per_call=True, metavar="RUN",
        help="run directory for results.json, table.md, ranks.csv and pictures.csv")
    group.add(
        "--seed", type=count, default=0,
        help="of the prior samples, the controls and the intervals")


def evaluate_parser() -> Parser:
    parser = Parser(
        "evaluate",
        "Stage 4: retrieval and picture scores on the test concepts, each beside its controls.",
        "python evaluate.py --model_path OUT/model --data_path DATA "
        "--clip_feature_path OUT/clip_features \\\n"
        "      --images OUT/images --control_images OUT/shuffled_eeg --weights_dir WEIGHTS "
        "--output_dir OUT/scores\n"
        "  python evaluate.py --images ANY_FOLDER --truth STIMULI --output_dir OUT/other_system\n"
        "  python evaluate.py --compare OUT/scores OUT/other_system --output_dir OUT/comparison",
    )
    group = parser.flags("retrieval")
    group.add("--model_path", type=Path, per_call=True, metavar="RUN",
        help="score the retrieval of this train.py or ATMS_retrieval.py run")
    _checkpoint(group)
    group.add("--clip_feature_path", type=Path, per_call=True, metavar="DIR",
        help="output of clip_feature_extractor.py")
    dataset_flag(group)
    group.several("--subjects", metavar="SUB",
        help="default: the subjects the model was trained on")
    _test_eeg(group)
    group.add("--permutations", type=positive_int, default=200, metavar="N",
        help="shuffles of the EEG in the control")
    group.several("--average", type=positive_int, metavar="N",
        help="also score retrieval with so many repetitions averaged, 1 2 4 ... 80: single trials "
        "are what one look gives, published figures average all")
    group.choose("--transductive", nargs="+", choices=("centred", "csls", "sinkhorn"),
        help="also score retrieval that uses all test queries together, in a table of its own: "
        "against hubs (centred, csls), or as an assignment, an upper bound (sinkhorn)")
    group.choose("--occlusion", nargs="+", choices=("channels", "time"),
        help="also explain the encoder: what retrieval loses without each channel and region, or "
        "without each 50-ms window")
    _control(group)
    _prior_sampling(parser)
    _scored_pictures(parser)
    _finished_scores(parser.flags("finished runs of this stage"))
    _scoring(parser)
    common_flags(parser)
    return parser


def _finished_scores(group: FlagGroup) -> None:
    group.several("--compare", type=Path, per_call=True, metavar=("RUN_A", "RUN_B"),
        help="instead: differences of every score they share, paired by stimulus, with tests")
    group.several("--over_seeds", type=Path, per_call=True, metavar="RUN",
        help="instead: mean and standard deviation over trainings with other seeds, each scored by "
        "itself, with --checkpoint best, latest, or both")


def report_parser() -> Parser:
    parser = Parser(
        "report",
        "Stage 5: one self-contained HTML page from any runs; it opens from disk, without network.",
        "python report.py --runs OUT/model OUT/images OUT/shuffled_eeg OUT/scores",
    )
    group = parser.flags("report")
    group.several("--runs", type=Path, required=True, per_call=True, metavar="RUN",
        help="run directories of train, ATMS_retrieval, generate and evaluate, in any order")
    group.add("--output", type=Path, per_call=True, metavar="FILE",
        help="the page; default: report.html beside the first run")
    group.add("--data_path", type=Path, per_call=True, metavar="DATA",
        help="folder with test_images/ and the test EEG; default: as the runs recorded it")
    dataset_flag(group)
    _cache_dir(group, "as the runs recorded it")
    common_flags(parser, device=False)
    return parser


STAGES: dict[str, Callable[[], Parser]] = {
    "check": check_parser,
    "preprocess": preprocess_parser,
    "features": features_parser,
    "train": train_parser,
    "retrieval": retrieval_parser,
    "generate": generate_parser,
    "evaluate": evaluate_parser,
    "report": report_parser,
    "world": world_parser,
    "pretrain": pretrain_parser,
    "demo": demo_parser,
}

# ---------------------------------------------------------------- resolving


def resolve(stage: str, argv: Sequence[str] | None = None) -> Options:
    """Parse the command line and its ``--config``.

    Prints and exits for --help, --print_config and errors.
    """
    tokens = sys.argv[1:] if argv is None else [str(token) for token in argv]
    parser = STAGES[stage]()
    typed = _given(stage, tokens)
    config = typed.get("config")
    configured = (
        _given(stage, config_tokens(parser, config), f"--config {config}: ") if config else {}
    )
    values, provenance, missing = {}, {}, []
    for name, action in parser.actions().items():
        if name in typed:
            values[name], provenance[name] = typed[name], "command line"
        elif name in configured:
            values[name], provenance[name] = configured[name], f"config {config}"
        elif action.required:
            missing.append(f"--{name}")
        else:
            values[name], provenance[name] = action.default, "default"
    if stage == "generate":
        for name, value in MODEL_PRESETS[values["preset"]].items():
            if provenance[name] == "default":
                values[name] = value
                provenance[name] = f"default of --preset {values['preset']}"
    if missing:
        parser.error(f"missing {', '.join(missing)}: on the command line or in --config")
    options = Options(
        stage,
        argparse.Namespace(**values),
        provenance,
        tuple(sorted(set(values) - parser.per_call)),
    )
    check_combinations(parser, options.values)
    if options.values.print_config:
        print(as_yaml(options), end="")
        raise SystemExit(0)
    return options


def answer_quick_questions(stage: str) -> None:
    """For the top of a script: --help, --print_config and wrong flags answer without torch."""
    resolve(stage)


def _given(stage: str, tokens: Sequence[str], source: str = "") -> dict[str, Any]:
    """Only what ``tokens`` say, parsed and checked; errors begin with their ``source``."""
    parser = STAGES[stage]()
    parser.source = source
    for action in parser.actions().values():
        action.required, action.default = False, argparse.SUPPRESS
    if "--help" in tokens or "-h" in tokens:
        STAGES[stage]().parse_args(["--help"])
    values, unknown = parser.parse_known_args(list(tokens))
    parser.refuse_unknown(unknown)
    return vars(values)
