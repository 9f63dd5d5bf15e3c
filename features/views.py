"""The versions of a picture that CLIP reads, made by worker processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datafiles import superpixel
from datafiles.pictures import PictureError, read_picture
from datafiles.stimuli import Stimulus
from modalities import MODALITIES
from rundirs.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image


VISUAL = tuple(modality.name for modality in MODALITIES if modality.source != "text")
TEXT = tuple(modality.name for modality in MODALITIES if modality.source == "text")


@dataclass(frozen=True)
class Views:
    """How a picture is shown to CLIP. ``png_folder``: superpixels are also saved there, or None."""

    slic_px: int
    blur_px: float = 0.0
    png_folder: Path | None = None


class PictureViews(torch.utils.data.Dataset):
    """Crops [visual modalities, 3, S, S] per stimulus, or why it cannot be read."""

    def __init__(self, stimuli: Sequence[Stimulus], transform: Any, views: Views) -> None:
        self.stimuli, self.transform, self.views = stimuli, transform, views

    def __len__(self) -> int:
        return len(self.stimuli)

    def __getitem__(self, index: int) -> torch.Tensor | PictureError:
        try:
            image = read_picture(self.stimuli[index].path)
        except PictureError as error:  # raised here, it would come with the worker's traceback
            return error
        versions = picture_versions(image, self.views.slic_px, self.views.blur_px)
        if self.views.png_folder:
            save_superpixels(self.views.png_folder, self.stimuli[index], versions)
        return torch.stack([self.transform(versions[name]) for name in VISUAL])

    def ahead(self, batch_size: int, num_workers: int) -> torch.utils.data.DataLoader:
        """One stimulus after the other; processes are about two batches ahead of the caller.

        Whole batches from each process would make the first, and every pause, a batch long.
        """
        return torch.utils.data.DataLoader(
            self,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=math.ceil(2 * batch_size / num_workers) if num_workers else None,
        )


def save_superpixels(folder: Path, stimulus: Stimulus, versions: Mapping[str, Image.Image]) -> None:
    """Write a picture's superpixel versions as PNG, to look at."""
    for modality in MODALITIES:
        if modality.source == "superpixel":
            path = folder / Path(stimulus.key).with_suffix("") / f"{modality.name}.png"
            with atomic_write(path, "wb") as file:
                versions[modality.name].save(file, format="PNG")


def picture_versions(
    image: Image.Image, slic_px: int, blur_px: float = 0.0
) -> dict[str, Image.Image]:
    """What each visual modality shows CLIP: the picture, or one of its superpixel versions.

    ``blur_px``: standard deviation, in the picture's own pixels, of a Gaussian that the picture
    itself is blurred with, the superpixels are not (the uniform blur prior of UBP, CVPR 2025).
    """
    from PIL import Image, ImageFilter

    levels = superpixel.superpixels(superpixel.at_slic_size(image, slic_px))
    seen = image.filter(ImageFilter.GaussianBlur(blur_px)) if blur_px else image
    return {name: Image.fromarray(levels[name]) if name in levels else seen for name in VISUAL}
