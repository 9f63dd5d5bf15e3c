"""The versions of a picture that CLIP reads, made by worker processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datafiles import superpixel
from datafiles.feature_bank import layer_name
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
    """How a picture is shown to CLIP.

    ``blurs_px``: of the image modality, then of the blurred versions kept beside it;
    ``png_folder``: superpixels are also saved there, or None.
    """

    slic_px: int
    blurs_px: Sequence[float] = (0.0,)
    png_folder: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What the crops of a picture are called, in their order."""
        return (*VISUAL, *(layer_name(f"blur_{px:g}") for px in self.blurs_px[1:]))


class PictureViews(torch.utils.data.Dataset):
    """Crops [views, 3, S, S] per stimulus, or why it cannot be read."""

    def __init__(self, stimuli: Sequence[Stimulus], transform: Any, views: Views) -> None:
        self.stimuli, self.transform, self.views = stimuli, transform, views

    def __len__(self) -> int:
        return len(self.stimuli)

    def __getitem__(self, index: int) -> torch.Tensor | PictureError:
        try:
            image = read_picture(self.stimuli[index].path)
        except PictureError as error:  # raised here, it would come with the worker's traceback
            return error
        versions = picture_versions(image, self.views)
        if self.views.png_folder:
            save_superpixels(self.views.png_folder, self.stimuli[index], versions)
        return torch.stack([self.transform(versions[name]) for name in self.views.names])

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


def picture_versions(image: Image.Image, views: Views) -> dict[str, Image.Image]:
    """What each of ``views.names`` shows CLIP: the picture, blurred or not, or its superpixels.

    A blur's standard deviation is in the picture's own pixels; the superpixels are not blurred (the
    uniform blur prior of UBP, CVPR 2025; several of them: NeuroBridge).
    """
    from PIL import Image, ImageFilter

    levels = superpixel.superpixels(superpixel.at_slic_size(image, views.slic_px))
    seen = [image.filter(ImageFilter.GaussianBlur(px)) if px else image for px in views.blurs_px]
    shown = {name: Image.fromarray(levels[name]) if name in levels else seen[0] for name in VISUAL}
    return shown | dict(zip(views.names[len(VISUAL) :], seen[1:], strict=True))
