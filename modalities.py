"""The registry: five modalities, the SDXL sites they are injected at, and the recipes of a mode.

Everything that is said five times elsewhere is a loop over :data:`MODALITIES`. Standard library
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# The sites of SDXL-base that own cross-attention, as (attentions, transformer layers in each):
# 2x2 + 2x10 + 1x10 + 3x10 + 3x2 = 70 layers. diffusers drops scales for any other block in silence,
# so a name that is not in this table is an error everywhere. Order = depth, input to output.
SITES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"down.1": (2, 2), "down.2": (2, 10), "mid": (1, 10), "up.0": (3, 10), "up.1": (3, 2)}
)


@dataclass(frozen=True)
class Slic:
    """One superpixel level. ``texture_gain``: fill x (1 + gain * T), T: Lab a/b gradient, 0..1."""

    n_segments: int
    compactness: float
    texture_gain: float


@dataclass(frozen=True)
class Modality:
    """One CLIP embedding of the stimulus, its weight in the losses and its place in the U-Net.

    Raises ValueError for unknown or empty sites and for weights that would make it dead.
    """

    name: str
    source: str  # what CLIP reads: "image", "text" or "superpixel"
    loss_weight: float  # share of this prior in the joint loss
    gain: float  # share of this modality where several meet at one site
    sites: Mapping[str, float]  # SDXL site -> IP-Adapter scale
    slic: Slic | None = field(default=None)

    def __post_init__(self) -> None:
        if self.source not in ("image", "text", "superpixel"):
            raise ValueError(
                f"{self.name}: source {self.source!r}, expected image, text or superpixel"
            )
        if not self.sites:
            raise ValueError(f"{self.name}: no sites, it would be injected nowhere")
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown:
            raise ValueError(f"{self.name}: unknown sites {unknown}; SDXL's are {list(SITES)}")
        if min(self.loss_weight, self.gain, *self.sites.values()) <= 0:
            raise ValueError(f"{self.name}: loss_weight, gain and site scales must be > 0")
        if (self.source == "superpixel") != (self.slic is not None):
            raise ValueError(
                f"{self.name}: slic settings belong to superpixel sources, all of them"
            )
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))


# THE order, coarse to fine: of losses, columns and progressive steps.
MODALITIES: tuple[Modality, ...] = (
    Modality("superpixel_few", "superpixel", 0.1, 0.1, {"down.1": 1.0}, Slic(100, 30.0, 0.1)),
    Modality("superpixel_middle", "superpixel", 0.1, 0.1, {"down.2": 1.0}, Slic(500, 20.0, 0.3)),
    Modality("superpixel_large", "superpixel", 0.2, 0.2, {"up.0": 1.0}, Slic(2500, 10.0, 0.5)),
    Modality("text", "text", 0.3, 0.3, dict.fromkeys(SITES, 0.25)),
    Modality("image", "image", 0.3, 0.3, {"up.1": 1.0}),
)
NAMES: tuple[str, ...] = tuple(modality.name for modality in MODALITIES)
MODES: tuple[str, ...] = ("separate", "fused", "progressive", "all")


def get(name: str) -> Modality:
    """The modality called ``name``. Raises KeyError that lists the five names."""
    for modality in MODALITIES:
        if modality.name == name:
            return modality
    raise KeyError(f"unknown modality {name!r}; the modalities are {', '.join(NAMES)}")


@dataclass(frozen=True)
class Recipe:
    """The modalities a picture is drawn from. One left out gets scale 0, never a zero embedding."""

    name: str
    active: tuple[str, ...]
    apply_gain: bool  # share each site among the active modalities by their gains

    def __post_init__(self) -> None:
        if not self.active:
            raise ValueError(f"recipe {self.name!r}: no active modality")
        for name in self.active:
            get(name)


def recipes(mode: str) -> tuple[Recipe, ...]:
    """The recipes of a mode: separate -> 5, fused -> 1, progressive -> 5, all -> the 11 of them."""
    if mode == "separate":
        return tuple(Recipe(f"separate_{name}", (name,), apply_gain=False) for name in NAMES)
    if mode == "fused":
        return (Recipe("fused", NAMES, apply_gain=True),)
    if mode == "progressive":
        return tuple(
            Recipe(f"progressive_{step}_{name}", NAMES[:step], apply_gain=True)
            for step, name in enumerate(NAMES, start=1)
        )
    if mode == "all":
        return recipes("separate") + recipes("fused") + recipes("progressive")
    raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(MODES)}")


TEXT_TEMPLATE = "This picture is {concept}"
CONTROLS = {  # of --control, with the mark that everything drawn or scored under it carries
    "shuffled_eeg": "CONTROL: the EEG of another stimulus",
    "noise_eeg": "CONTROL: noise instead of EEG",
    "mean_embedding": "CONTROL: mean training embedding, no EEG",
    "true_embedding": "CEILING: the stimulus' own embeddings, no EEG",
}
PROMPTS = {  # of --prompt_source, with the mark of what is drawn from more than five embeddings
    "oracle": "oracle prompt: SDXL was told the stimulus' own caption",
    "decoded": "decoded prompt: SDXL was told the training caption nearest to the predicted text",
}
MARKS = {**PROMPTS, **CONTROLS}
TRANSDUCTIVE = (
    "Transductive: EEG aligned by the covariance of the own test recording, without labels, of "
    "people whom the model does not know"
)
WITHOUT_EEG = ("mean_embedding", "true_embedding")  # controls that read the bank instead
DATASETS = ("things-eeg2", "ubp", "neurobridge", "things-meg", "alljoined")  # forms of recordings
FETCHABLE = (
    "things-eeg2",
    "ubp",
    "alljoined",
    "things-eeg1",
    "things-pictures",
    "atm-features",
    "sdxl",
    "ip-adapter",
    "vit-h",
    "sdxl-vae",
)  # of dataset.py --fetch: datafiles/sources.yaml
EXPORTS = ("npy", "ubp", "neurobridge")  # of these, what is written
ENCODERS = ("ATMS", "EEGProject", "NICE")  # this project's own; other names are braindecode's
AUTO = "auto"
EACH = "each"
STRICT = "float32-strict"  # --precision of training: no product is rounded, on a GPU either
FINAL = "final"
# what priors may predict: any of them follows from another, given x_t and t; see unet.PriorBank
QUANTITIES = ("velocity", "noise", "embedding")


def marks_of(prompt_source: str, control: str | None) -> tuple[str, ...]:
    """Keys of MARKS for pictures that do not show what was decoded from the EEG alone."""
    return tuple(name for name in (prompt_source, control) if name in MARKS)
