"""Which concepts validate and which are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import util


def numbered(concepts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """The distinct names, sorted, and int64 [N]: the number of each concept among them."""
    names = sorted(set(concepts))
    number = {name: place for place, name in enumerate(names)}
    return names, torch.tensor([number[concept] for concept in concepts])


def split_concepts(concepts: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The held-out concepts: a seeded ``fraction`` of the distinct ones; at least one if > 0."""
    distinct = sorted(set(concepts))
    if fraction == 0 or len(distinct) < 2:
        return set()
    number = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return set(util.numpy_generator_for(seed, "validation").permutation(distinct)[:number].tolist())


def fair_validation(
    chosen: set[str], here: set[str], donor: Mapping[str, Sequence[str]]
) -> tuple[set[str], list[str]]:
    """The concepts to hold out where training goes on from a model, and what is to be said of them.

    ``chosen``, if the model was trained on none of them; else those that it held out, of the
    concepts ``here``. Raises UserError where it held out none of them.
    """
    seen = chosen & set(donor["trained"])
    if not seen:
        return chosen, []
    inherited = here & set(donor["held_out"])
    if not inherited:
        raise util.UserError(
            "--val_fraction",
            f"{len(seen)} of {len(chosen)} validation concepts were trained on by the model that "
            "this run starts from, which held out none of these concepts",
            "concepts that neither was trained on",
            "give --val_fraction 0: nothing here can validate or select",
        )
    return inherited, [
        f"{len(seen)} of the {len(chosen)} concepts that this --seed and --val_fraction hold out "
        "were trained on by the model that this run starts from: validating on the "
        f"{len(inherited)} that it held out"
    ]


def held_out_concepts(
    concepts: Sequence[str], fraction: float, seed: int, donor: Mapping[str, Sequence[str]] | None
) -> tuple[set[str], list[str]]:
    """:func:`split_concepts`, fair where training goes on from a ``donor``, and what to say of it.

    Raises UserError.
    """
    chosen = split_concepts(concepts, fraction, seed)
    return fair_validation(chosen, set(concepts), donor) if donor else (chosen, [])
