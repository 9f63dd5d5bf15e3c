"""Best of n: several noises for each picture, of which one is kept by what the EEG said.

The stimulus is never looked at: what a picture has to agree with is the predicted embedding. As a
control, one of the n is kept at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

import util
from decoder.decoder import Decoder
from util import DataError

BY_EEG, AT_RANDOM = "eeg", "random"
Agreement = Callable[[np.ndarray, int], float]  # of a picture with the prediction of a test row


class Reader(Protocol):
    """What reads a drawn picture: ``features.clip.Clip``."""

    transform: Any
    identity: dict[str, Any]

    def encode_pictures(self, crops: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Choosing:
    """How many are drawn, and which is kept; names as the flags of ``args.py``."""

    draws: int
    choose: str
    clip_model: str
    clip_pretrained: str
    seed: int

    @property
    def compares(self) -> bool:
        """Whether pictures are compared with what was predicted."""
        return self.draws > 1 and self.choose == BY_EEG

    def kept(
        self, pictures: Sequence[np.ndarray], stimulus: int, row: int, agreement: Agreement | None
    ) -> tuple[int, list[float]]:
        """(which of the n draws of a picture is kept, the agreement of each where it decides)."""
        if agreement is None:
            return util.seed_for(self.seed, "choose", stimulus) % len(pictures), []
        found = [agreement(picture, row) for picture in pictures]
        return int(np.argmax(found)), found


def check_eye(asked: Choosing, eye: Reader, decoder: Decoder) -> None:
    """Raise DataError for another CLIP than the one that made the model's targets."""
    if eye.identity != decoder.clip:
        raise DataError(
            f"--clip_model {asked.clip_model} --clip_pretrained {asked.clip_pretrained}",
            f"{eye.identity}",
            f"{decoder.clip}, which the model was trained on",
            "name the CLIP of clip_feature_extractor.py",
        )


def agreement_of(
    eye: Reader, decoder: Decoder, predicted: torch.Tensor, places: dict[int, int]
) -> Agreement:
    """Cosine of a picture's standardised CLIP image embedding with the predicted one.

    ``predicted`` [n, D]: image embeddings; ``places``: test row -> row of it.
    """
    from PIL import Image, ImageFilter

    blur = decoder.clip.get("target_blur_px", 0.0)
    wanted = decoder.standardised({"image": predicted})["image"]

    def agreement(picture: np.ndarray, row: int) -> float:
        image = Image.fromarray(picture)
        image = image.filter(ImageFilter.GaussianBlur(blur)) if blur else image
        embedding = eye.encode_pictures(eye.transform(image)[None]).cpu()
        own = decoder.standardised({"image": embedding})["image"]
        return float(torch.cosine_similarity(own, wanted[places[row]][None]))

    return agreement
