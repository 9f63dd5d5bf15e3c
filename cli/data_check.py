"""The flags of dataset.py: a check of DATA, or what it does instead."""

from __future__ import annotations

from pathlib import Path

from cli.parser import FlagGroup, Parser, common_flags, count
from modalities import AUTO, DATASETS, EXPORTS, FETCHABLE

CHECKS = ("quick", "full")  # how closely


def dataset_flag(group: FlagGroup) -> None:
    """Which form of recordings, for each stage that reads them."""
    group.choose(
        "--dataset",
        choices=(AUTO, *DATASETS),
        default=AUTO,
        per_call=True,
        help="form of DATA's recordings (docs/datasets.md); auto: the one that is there",
    )


def _instead_of_a_check(parser: Parser) -> None:
    group = parser.flags("export, instead of a check")
    group.choose(
        "--export",
        choices=EXPORTS,
        help="write the recordings in this form for other people's code; npy: THINGS-EEG2's own",
    )
    group.add(
        "--output_path",
        type=Path,
        metavar="DIR",
        help="where to, also of --import_features and --join_features; put training_images/ and "
        "test_images/ beside recordings",
    )
    group = parser.flags("import of embeddings, instead of a check")
    group.several(
        "--import_features",
        type=Path,
        metavar=("TRAINING", "TEST"),
        help="embeddings that others computed of these pictures (.pt, .npy, .safetensors), which "
        "become a bank for --clip_feature_path in --output_path",
    )
    group.several(
        "--join_features",
        metavar="BANK",
        help="the bank of --clip_feature_path with image embeddings of other encoders beside its "
        "own, as NAME=BANK, in --output_path; train.py --contrast_layer final NAME mixes them",
    )


def _block_designs(parser: Parser) -> None:
    group = parser.flags("block designs, instead of a check")
    group.several(
        "--blocks",
        type=Path,
        metavar="FILE",
        help="EEGCVPR40 or EEG-ImageNet (.pth), whose classes were shown in blocks; becomes a DATA "
        "in --output_path, with pictures from --data_path/CLASS/NAME.JPEG",
    )
    group.choose(
        "--split",
        choices=("leave-block", "random"),
        default="leave-block",
        help="test has classes, and so blocks, of its own, or a fifth of each class' pictures",
    )
    group.switch(
        "--allow_block_leak",
        help="make a random split of a block design, which measures EEG's drift, and mark all that "
        "comes of it",
    )
    group.add("--seed", type=count, default=0, help="of the split")


def _fetching(parser: Parser) -> None:
    group = parser.flags("fetching, instead of a check")
    group.choose(
        "--fetch",
        choices=FETCHABLE,
        nargs="+",
        help="fetch data sets with their pictures, or weights, into --data_path; goes on after a "
        "cut, checks SHA-256; EEG2IMAGE_MIRROR or HF_ENDPOINT name another server",
    )
    group.switch("--dry_run", per_call=True, help="say what would be fetched, and how large")


def _checking(parser: Parser) -> None:
    group = parser.flags("check")
    group.add(
        "--data_path",
        type=Path,
        required=True,
        per_call=True,
        metavar="DATA",
        help="folder with Preprocessed_data_250Hz/, training_images/, test_images/",
    )
    group.choose(
        "--check",
        nargs="?",
        choices=CHECKS,
        default=CHECKS[0],
        help="how closely: headers and samples, in seconds, or every value of every file",
    )
    dataset_flag(group)
    group.several(
        "--subjects", metavar="SUB", help="e.g. sub-01 sub-08; default: all that are there"
    )
    group.add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="also whether these captions belong to the pictures",
    )
    group.add(
        "--clip_feature_path",
        type=Path,
        metavar="DIR",
        help="also whether this output of clip_feature_extractor.py belongs to the pictures",
    )


def check_parser() -> Parser:
    parser = Parser(
        "check",
        "Before the first stage: what is there, missing or inconsistent in a data folder. Reads\n"
        "headers and samples, writes nothing; exit code 0 if all is well, 1 for problems.\n"
        "With --export: the recordings in another published form. With --import_features: a bank\n"
        "of embeddings that others computed. With --join_features: of several encoders' banks\n"
        "one. With --blocks: a DATA of a block design.\n"
        "With --fetch: what is published, from the internet.",
        "python dataset.py --check --data_path DATA",
    )
    _checking(parser)
    _fetching(parser)
    _instead_of_a_check(parser)
    _block_designs(parser)
    common_flags(parser, device=False, writes=False)
    return parser
