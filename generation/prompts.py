"""The words that SDXL is given: one neutral text, the stimulus' own caption, or a decoded one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metrics
from datafiles.captions import caption, read_captions
from datafiles.feature_bank import Bank, check_clip, open_bank
from datafiles.stimuli import Stimulus
from decoder.decoder import Decoder
from modalities import TEXT_TEMPLATE
from rundirs.files import read_json
from util import DataError, UserError

LEADS_IN = TEXT_TEMPLATE.split("{")[0]  # said once, however many captions


@dataclass(frozen=True)
class Prompting:
    """Which prompt each picture gets; names as the flags of ``args.py``."""

    prompt_source: str
    prompt: str
    prompt_concepts: int
    captions: Path | None
    clip_feature_path: Path | None


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


def training_captions(decoder: Decoder, folder: Path) -> tuple[list[str], torch.Tensor]:
    """The distinct captions of the training pictures, and their text embeddings [n, D].

    Raises DataError for a bank of another CLIP, or without captions.
    """
    bank = open_bank(folder, "training")
    check_clip(bank.clip, bank.path, decoder.clip, "the model")
    first: dict[str, int] = {}
    for row, text in enumerate(_texts(bank)):
        first.setdefault(text, row)
    return list(first), bank.features["text"][torch.tensor(list(first.values()))]


def _texts(bank: Bank) -> list[str]:
    """The caption of each row, as stage 1 noted it beside the bank."""
    noted: Mapping[str, Any] = read_json(bank.path.with_suffix(".json"))
    of = {row["stimulus"]: str(row["text"]) for row in noted.get("rows", ()) if "text" in row}
    lost = sum(stimulus not in of for stimulus in bank.ids)
    if lost:
        raise DataError(
            bank.path.with_suffix(".json"),
            f"no caption of {lost} of {len(bank.ids)} pictures",
            "the caption that stage 1 embedded of each",
            "run clip_feature_extractor.py again",
        )
    return [of[stimulus] for stimulus in bank.ids]


def decoded_prompts(
    decoder: Decoder,
    predicted: torch.Tensor,
    captions: Sequence[str],
    embeddings: torch.Tensor,
    number: int,
) -> list[str]:
    """A prompt for each predicted text embedding [n, D]: the ``number`` nearest captions.

    ``embeddings`` [m, D] of ``captions``. Nearness is the cosine of standardised embeddings, as in
    retrieval.
    """
    query, gallery = (decoder.standardised({"text": rows})["text"]
                      for rows in (predicted, embeddings))  # fmt: skip
    nearest = metrics.cosine_similarity(query, gallery).topk(min(number, len(captions)), dim=1)
    return [_joined([captions[place] for place in row]) for row in nearest.indices.tolist()]


def _joined(captions: Sequence[str]) -> str:
    later = (text.removeprefix(LEADS_IN) for text in captions[1:])
    return ", ".join([captions[0], *later])
