"""Flags of what needs nobody's data: the embedded world, its models' training, the demo."""

from __future__ import annotations

from pathlib import Path

from cli.parser import Parser, common_flags, count, positive, positive_int


def world_parser() -> Parser:
    parser = Parser(
        "world",
        "Write the embedded world: procedural pictures, SIMULATED EEG, miniature models.",
        "python -m miniworld --output_path demo/world",
    )
    group = parser.flags("world")
    group.add("--output_path", type=Path, required=True, per_call=True, metavar="DIR",
        help="gets data/ and models/")
    group.add("--subjects", type=positive_int, default=2, metavar="N", help="simulated people")
    group.add("--training_concepts", type=positive_int, default=300, metavar="N",
        help="concepts to train on")
    group.add("--images_per_concept", type=positive_int, default=4, metavar="N",
        help="pictures of each of them")
    group.add("--test_concepts", type=positive_int, default=200, metavar="N",
        help="unseen concepts, one picture each")
    group.choose("--test_split", choices=("test", "validation"), default="test",
        help="validation: other unseen concepts, to choose settings by; never for results")
    group.add("--training_repetitions", type=positive_int, default=4, metavar="N",
        help="EEG trials per training picture")
    group.add("--test_repetitions", type=positive_int, default=20, metavar="N",
        help="EEG trials per test picture")
    group.add("--snr", type=positive, metavar="RATIO",
        help="std of evoked signal / std of trial noise; default: the simulator's")
    group.add(
        "--seed", type=count, default=0, help="of concepts, pictures, people, noise and weights")
    group.choose("--weights", choices=("trained", "random"), default="trained",
        help="the shipped miniature models, or untrained ones that only show that the chain works")
    common_flags(parser, device=False)
    return parser


PRETRAIN_STEPS = {"vae": 8000, "clip": 6600, "judge": 1500, "generator": 9000}


def pretrain_parser() -> Parser:
    parser = Parser(
        "pretrain",
        "Train the miniature CLIP, SDXL and IP-Adapter and the judge on rendered pictures.",
        "python -m miniworld.pretrain --output_path OUT/pretrain",
    )
    group = parser.flags("training")
    group.add("--output_path", type=Path, required=True, per_call=True, metavar="RUN",
        help="run directory: cache/, a checkpoint per part and weights/")
    group.choose("--part", choices=("all", *PRETRAIN_STEPS), default="all", per_call=True,
        help="what to train; generator, in a new run: with the shipped VAE and CLIP")
    for part, steps in PRETRAIN_STEPS.items():
        group.add(f"--{part}_steps", type=count, default=steps, metavar="N", per_call=True,
            help=f"optimiser steps of the {part}; more than before: it goes on")
    group.add("--pictures", type=positive_int, default=12000, metavar="N",
        help="rendered pictures to train on, two of each concept; the shipped generator had 96000")
    group.add("--batch_size", type=positive_int, metavar="N",
        help="pictures per step, for tests; default: each part's own")
    group.add("--seed", type=count, default=0, help="of pictures, weights, order and noise")
    common_flags(parser)
    return parser


def demo_parser() -> Parser:
    parser = Parser(
        "demo",
        "The whole chain on the embedded miniature world: CPU, no downloads, simulated EEG.",
        "python demo.py",
    )
    group = parser.flags("demo")
    group.add("--output_path", type=Path, metavar="DIR",
        help="everything goes here; default: demo_output, with --quick demo_output_quick")
    group.switch("--quick", help="a smaller world and fewer epochs, for a smoke test")
    group.add("--seed", type=count, default=0, help="of the world and of every stage")
    common_flags(parser, device=False)
    return parser
