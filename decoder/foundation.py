"""Pre-trained encoders of EEG from a folder on disk: braindecode's Labram, EEGPT, REVE and others.

The folder is what braindecode's ``save_pretrained`` writes: ``config.json`` and
``model.safetensors``. The recording is brought to what the model was trained on: resampled to its
rate, filled with zeros up to its window, and its channels carried to the model's electrodes by
where they sit on the head, so that neither their order nor their names matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datafiles.electrodes import positions, standard_names
from decoder.encoders import Encoder, braindecode_class, projection
from modalities import ENCODERS
from rundirs.files import file_hash, read_json
from rundirs.tensors import load_tensors
from util import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SAFE_TYPES = ("torch.nn.", "braindecode.")  # that a config may name
LORA_RANK = 8
FLAG = "--encoder_weights"
HOW_TO_SAVE = (
    "write it by braindecode: MODEL.from_pretrained(HUB, chs_info=..., n_times=..., "
    "sfreq=...).save_pretrained(DIR)"
)


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder, and what it starts from; names as the flags of ``args.py``."""

    encoder: str
    encoder_weights: Path | None = None
    encoder_training: str = "full"


ATMS_ALONE = EncoderChoice(ENCODERS[0])


@dataclass(frozen=True)
class SavedEncoder:
    """A model of braindecode as it was saved. ``learnt``: frozen, lora or full."""

    model: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    learnt: str


def read_pretrained(choice: EncoderChoice) -> SavedEncoder | None:
    """What ``--encoder_weights`` names; None without it. Raises UserError / DataError."""
    folder = choice.encoder_weights
    if folder is None:
        return None
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(FLAG, f"{folder}: no {CONFIG} with {WEIGHTS}", "both", HOW_TO_SAVE)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(FLAG, f"{folder / CONFIG}: no object", "a model's settings", HOW_TO_SAVE)
    config.pop("braindecode_version", None)
    for name, value in config.items():
        foreign = isinstance(value, str) and "." in value and not value.startswith(SAFE_TYPES)
        if foreign:
            raise UserError(
                FLAG, f"{folder / CONFIG}: {name} is {value}", "parts of torch or braindecode",
                "a config may not load other code",
            )  # fmt: skip
    return SavedEncoder(
        choice.encoder, config, load_tensors(folder / WEIGHTS)[0], choice.encoder_training
    )


def encoder_hash(choice: EncoderChoice) -> dict[str, str]:
    """What a run keeps of ``--encoder_weights`` among its inputs."""
    folder = choice.encoder_weights
    return {} if folder is None else {"encoder_weights": file_hash(folder / WEIGHTS)}


class Foundation(Encoder):
    """Features of a pre-trained model, their mean projected as other encoders' are.

    ``channels`` and ``rate_hz`` are the recording's; ``pretrained``: the saved model's own config;
    ``learnt``: ``frozen``, ``lora`` (low-rank changes of its linear layers, by peft) or ``full``.
    Raises UnknownEncoder, and ValueError for a signal that the model cannot take.
    """

    carry: torch.Tensor  # [C', C]: from the recording's channels to the model's
    places: torch.Tensor  # [C, 3] in metres, for a model that is told them; else [0, 3]
    resample: torch.Tensor  # [T, T']

    def __init__(
        self,
        sizes: Mapping[str, int],
        model: str,
        pretrained: Mapping[str, Any],
        learnt: str,
        channels: Sequence[str],
        rate_hz: float,
    ) -> None:
        own = ("n_channels", "n_times", "n_subjects", "embed_dim")
        super().__init__(*(sizes[name] for name in own))
        self.config |= {
            "model": model, "pretrained": dict(pretrained), "learnt": learnt,
            "channels": list(channels), "rate_hz": rate_hz,
        }  # fmt: skip
        kind: Any = braindecode_class(model)
        with _told(model, "is not built"):
            self.model = kind.from_config(dict(pretrained))
        _without_lazy_heads(self.model)
        taken = inspect.signature(kind.forward).parameters
        if "return_features" not in taken:
            raise ValueError(f"{model} has no features to take (braindecode's return_features)")
        electrodes = None if "pos" in taken else _electrodes(model, pretrained)
        carry, places = _carried(channels, electrodes)
        self.register_buffer("carry", carry, persistent=False)
        self.register_buffer("places", places, persistent=False)
        matrix = _resampled(self.n_times, rate_hz, pretrained)
        self.register_buffer("resample", matrix, persistent=False)
        names = [item["ch_name"] for item in electrodes or ()]
        self.more = {"ch_names": names} if "ch_names" in taken else {}
        with _told(model, "does not take the recording"):
            width, self.unused = self._trial()
        self.head = projection(width, self.embed_dim, dropout=0.5)
        self.learnt = learnt
        self._choose_learnt()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Foundation:
        """As of every encoder; its sizes are one."""
        own = {"model", "pretrained", "learnt", "channels", "rate_hz"}
        sizes = {name: value for name, value in config.items() if name not in own}
        return cls(sizes, **{name: config[name] for name in own})

    @property
    def name(self) -> str:
        return self.config["model"]

    def load_pretrained(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError unless these are all that the model has, but for its head."""
        own = self.model.state_dict()
        renamed = {name.replace(".base_layer.", "."): name for name in own}
        needed = {short for short, name in renamed.items() if "lora_" not in name}
        needed -= self.unused
        lost = sorted(name for name in needed if name not in weights)
        other = sorted(
            name for name in needed & {*weights} if own[renamed[name]].shape != weights[name].shape
        )
        if lost or other:
            named = ", ".join([*lost, *other][:3])
            raise ValueError(f"the weights lack, or have in other shapes: {named}")
        chosen = {renamed[name]: weights[name] for name in needed}
        self.model.load_state_dict(own | chosen)

    def train(self, mode: bool = True) -> Foundation:
        """As of every module; what is frozen has no dropout, either."""
        super().train(mode)
        if self.learnt == "frozen":
            self.model.eval()
        return self

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.head(self._features(eeg))

    def _features(self, eeg: torch.Tensor) -> torch.Tensor:
        """[B, C, T] -> [B, F], the mean over the model's tokens."""
        read = self.carry @ eeg @ self.resample
        told = {"pos": self.places.expand(len(eeg), -1, -1)} if len(self.places) else {}
        found = self.model(read, return_features=True, **self.more, **told)
        features = found["features"] if isinstance(found, Mapping) else found
        return features.reshape(len(eeg), -1, features.shape[-1]).mean(dim=1)

    def _trial(self) -> tuple[int, set[str]]:
        """(width of the features, names of the parameters that they do not depend on)."""
        self.model.eval()
        with torch.enable_grad():  # also where a model is opened without
            features = self._features(torch.zeros(2, self.n_channels, self.n_times))
            if features.requires_grad:
                features.sum().backward()
        unused = {name for name, of in self.model.named_parameters() if of.grad is None}
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        return features.shape[1], unused

    def _choose_learnt(self) -> None:
        """Freeze what is not to be learnt, and what the features do not depend on."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.learnt == "full" and name not in self.unused)
        if self.learnt == "lora":
            _add_lora(self.model, self.unused)
            dead = self._trial()[1]  # linear layers whose weights the model reads by itself
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in dead)


# ---------------------------------------------------------------- the parts


@contextmanager
def _told(model: str, what: str) -> Iterator[None]:
    """What braindecode raises, as a ValueError of one line."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{model} {what}: {reason}") from None


def _without_lazy_heads(model: nn.Module) -> None:
    """Put nothing in the place of heads whose size was left open: features come before them."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.modules.lazy.LazyModuleMixin):
                setattr(module, name, nn.Identity())


def _add_lora(model: nn.Module, unused: set[str]) -> None:
    """Low-rank changes beside the linear layers, by peft. Raises ValueError where it is missing."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("low-rank changes need peft: pip install peft") from None
    linear = [
        name for name, module in model.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" not in unused
    ]  # fmt: skip
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=linear), model)


def _electrodes(model: str, pretrained: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Names and places of the channels that a model was trained on. Raises ValueError."""
    from braindecode import models

    listed = pretrained.get("chs_info")
    if not listed:
        wrapped = f"interpolated{model}".lower()
        own = next((of for name, of in vars(models).items() if name.lower() == wrapped), None)
        listed = getattr(own, "_TARGET_CHS_INFO", None)
    if not listed:
        raise ValueError(f"{model}'s {CONFIG} says nothing of its electrodes (chs_info)")
    names = [item["ch_name"] for item in listed]
    known = positions(names)
    found = []
    for item in listed:
        place = known.get(item["ch_name"], item.get("loc"))
        if place is None or not np.isfinite(np.asarray(place, float)[:3]).all():
            raise ValueError(f"{model}'s electrode {item['ch_name']} is nowhere on the head")
        place = np.asarray(place, float)[:3]
        found.append({"ch_name": item["ch_name"], "kind": "eeg", "loc": place})
    return found


def _carried(
    channels: Sequence[str], electrodes: Sequence[Mapping[str, Any]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix [C', C] to the model's electrodes by MNE's splines, places [C, 3] in metres).

    Without electrodes, as of a model that is told the places, the channels stay as they are.
    """
    known, spelling = positions(channels), standard_names(channels)
    if lost := [name for name in channels if name not in known]:
        raise ValueError(f"channels that are nowhere on the head: {', '.join(lost[:5])}")
    places = torch.tensor(np.array([known[name] for name in channels]), dtype=torch.float32)
    if electrodes is None:
        return torch.eye(len(channels)), places
    import mne
    from braindecode.modules import ChannelInterpolationLayer

    source = [
        {"ch_name": spelling.get(name, name), "kind": "eeg", "loc": known[name]}
        for name in channels
    ]
    with mne.utils.use_log_level("ERROR"):
        layer = ChannelInterpolationLayer(source, list(electrodes), mode="name_match")
    return layer.matrix.float(), places[:0]


def _resampled(n_times: int, rate_hz: float, pretrained: Mapping[str, Any]) -> torch.Tensor:
    """[T, T']: to the model's rate, zeros after the recording. Raises ValueError."""
    from scipy.signal import resample_poly

    rate, window = pretrained.get("sfreq"), pretrained.get("n_times")
    if window is None and rate and pretrained.get("input_window_seconds"):
        window = round(rate * pretrained["input_window_seconds"])
    if not rate or not window:
        raise ValueError(f"{CONFIG} does not say sfreq and n_times, the rate and the window")
    ratio = Fraction(rate / rate_hz).limit_denominator(1000)
    matrix = resample_poly(np.eye(n_times), ratio.numerator, ratio.denominator, axis=1)
    length = matrix.shape[1]
    if length > window:
        raise ValueError(
            f"its window is {window / rate:g} s, and {n_times / rate_hz:g} s are given"
        )
    return torch.from_numpy(np.pad(matrix, ((0, 0), (0, window - length)))).float()
