"""EEG encoders beside ATMS, behind one contract: EEG [B, C, T] and subject [B] to embedding [B, D].

:class:`Encoder` holds what all of them share: the subject layer in front, the logit scale, the
checks of shapes, and the config that rebuilds them.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import nn

from modalities import ENCODERS
from subject_layers.dropout import Dropout
from subject_layers.subject import SubjectLinear
from util import grouped

POOL_STRIDE = 5  # samples, as published
MAX_LOG_SCALE = math.log(100.0)  # CLIP's own limit of the logit scale


class UnknownEncoder(LookupError):  # noqa: N818 - told to people as UserError or DataError
    """No encoder of that name can be built here: what was expected, and the cure."""

    def __init__(self, expected: str, cure: str) -> None:
        super().__init__(f"expected {expected}: {cure}")
        self.expected, self.cure = expected, cure


# ---------------------------------------------------------------- parts


class SpatioTemporalConvolution(nn.Module):
    """Tokens [B, C, width] -> [B, width' * 40], time-major: the shallow convolution of NICE/ATM.

    ``tsconv`` holds the published layers under the published names. The first two, convolution and
    average pooling, are linear with nothing in between and are computed as one strided convolution.
    """

    def __init__(self, n_channels: int, features: int, kernel: int, pool_kernel: int) -> None:
        super().__init__()
        self.pool_kernel = pool_kernel
        self.tsconv = nn.Sequential(
            nn.Conv2d(1, features, (1, kernel)),
            nn.AvgPool2d((1, pool_kernel), (1, POOL_STRIDE)),
            nn.BatchNorm2d(features),
            nn.ELU(),
            nn.Conv2d(features, features, (n_channels, 1)),
            nn.BatchNorm2d(features),
            nn.ELU(),
            Dropout(0.5),
        )
        self.projection = nn.Sequential(nn.Conv2d(features, features, (1, 1)))

    def pooled_convolution(self, tokens: torch.Tensor) -> torch.Tensor:
        """Convolution and pooling in one product: [B, C, width] -> [B, 40, C, width']."""
        convolution, width = cast(nn.Conv2d, self.tsconv[0]), self.pool_kernel
        box = convolution.weight.new_full((1, 1, width), 1 / width)
        # [40, 1, kernel + width - 1]: the mean of `width` shifted copies of each filter
        filters = F.conv1d(convolution.weight.squeeze(2), box, padding=width - 1)
        windows = tokens.unfold(2, filters.shape[2], POOL_STRIDE)
        return F.linear(windows, filters.squeeze(1), convolution.bias).permute(0, 3, 1, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        maps = self.projection(
            self.tsconv[2:](self.pooled_convolution(tokens))
        )  # [B, 40, 1, width']
        return maps.squeeze(2).transpose(1, 2).flatten(1)


def pooled_width(width: int, kernel: int, pool_kernel: int) -> int:
    """Time steps that are left of ``width`` after the convolution and the pooling."""
    return (width - kernel + 1 - pool_kernel) // POOL_STRIDE + 1


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fn(x)


def projection(inputs: int, embed_dim: int, dropout: float) -> nn.Sequential:
    """[B, inputs] -> [B, embed_dim]: the head that NICE, ATM and EEGProject share."""
    inner = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim), Dropout(dropout))
    return nn.Sequential(nn.Linear(inputs, embed_dim), Residual(inner), nn.LayerNorm(embed_dim))


# ---------------------------------------------------------------- the contract


class Encoder(nn.Module):
    """EEG [B, C, T] float32 and subject [B] int64 -> embedding [B, D], not L2-normalised.

    ``subject``: 0-based per row, -1 = unknown. ``config``: the keywords that rebuild the encoder.
    Subclasses build their layers and say in ``_embed`` how they are used. Raises ValueError on
    wrong shapes.
    """

    def __init__(
        self,
        n_channels: int,
        n_times: int,
        n_subjects: int,
        embed_dim: int,
        *,
        subject_layer: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_channels": n_channels,
            "n_times": n_times,
            "n_subjects": n_subjects,
            "embed_dim": embed_dim,
        }
        self.n_channels, self.n_times, self.n_subjects = n_channels, n_times, n_subjects
        self.embed_dim = embed_dim
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.subject_layer = SubjectLinear(n_subjects, n_times) if subject_layer else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Encoder:
        """A fresh one from another's ``config``. TypeError for options that it does not have."""
        return cls(**config)

    @property
    def name(self) -> str:
        """What ``--encoder`` and a checkpoint's header call it."""
        return type(self).__name__

    def forward(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        if eeg.ndim != 3 or eeg.shape[1:] != (self.n_channels, self.n_times):
            raise ValueError(
                f"eeg has shape {tuple(eeg.shape)}, expected [B, {self.n_channels}, {self.n_times}]"
            )
        if subject.shape != eeg.shape[:1]:
            raise ValueError(f"subject has shape {tuple(subject.shape)}, expected [{len(eeg)}]")
        if self.subject_layer is not None:
            eeg = self.subject_layer(eeg, subject)
        return self._embed(eeg, subject)

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        """[B, C, T], shapes checked and the subject layer applied -> [B, D]."""
        raise NotImplementedError

    def add_subjects(self, count: int) -> None:
        """Rows for ``count`` more subjects, that compute what an unknown one (-1) gets."""
        self._own_layer().add_subjects(count)
        self.n_subjects += count
        self.config["n_subjects"] = self.n_subjects

    def subject_parameters(self) -> list[nn.Parameter]:
        """What belongs to subjects."""
        return list(self._own_layer().parameters())

    def _own_layer(self) -> SubjectLinear:
        if self.subject_layer is None:
            raise ValueError(f"{self.name} was built without a subject layer")
        return self.subject_layer

    @property
    def similarity_scale(self) -> torch.Tensor:
        """What multiplies cosines in the contrastive loss: exp of the parameter, at most 100."""
        return self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()


# ---------------------------------------------------------------- encoders


class EEGProject(Encoder):
    """Two linear layers on all samples at once, with a residual and LayerNorm.

    The cheap baseline of UBP (Wu et al., CVPR 2025, HaitaoWuTJU/Uncertainty-aware-Blur-Prior),
    strong within a person and with few channels.
    """

    def __init__(
        self,
        n_channels: int = 63,
        n_times: int = 250,
        n_subjects: int = 10,
        embed_dim: int = 1024,
        *,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(n_channels, n_times, n_subjects, embed_dim)
        self.config |= {"dropout": dropout}
        self.proj_eeg = projection(n_channels * n_times, embed_dim, dropout)

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.proj_eeg(eeg.flatten(1))


@dataclass(frozen=True)
class NICESizes:
    """Kernels along time, in samples, and the number of ``features`` maps."""

    features: int = 40
    kernel: int = 25
    pool_kernel: int = 51
    dropout: float = 0.5


_NICE_SIZES = NICESizes()


class NICE(Encoder):
    """The shallow spatio-temporal convolution on the EEG itself, and the projection.

    Song et al., ICLR 2024 (eeyhsong/NICE-EEG, without its self-attention), in the sizes that ATM
    compares with. Raises ValueError for fewer samples than its two kernels need.
    """

    def __init__(
        self,
        n_channels: int = 63,
        n_times: int = 250,
        n_subjects: int = 10,
        embed_dim: int = 1024,
        sizes: NICESizes = _NICE_SIZES,
    ) -> None:
        super().__init__(n_channels, n_times, n_subjects, embed_dim)
        self.config |= asdict(sizes)
        needed = sizes.kernel + sizes.pool_kernel - 1
        if n_times < needed:
            raise ValueError(f"NICE needs at least {needed} samples, found {n_times}")
        self.enc_eeg = SpatioTemporalConvolution(
            n_channels, sizes.features, sizes.kernel, sizes.pool_kernel
        )
        flat = sizes.features * pooled_width(n_times, sizes.kernel, sizes.pool_kernel)
        self.proj_eeg = projection(flat, embed_dim, sizes.dropout)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NICE:
        """As of every encoder; its sizes are one."""
        return cls(**grouped(config, "sizes", NICESizes))

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.proj_eeg(self.enc_eeg(eeg))


class Braindecode(Encoder):
    """A model of braindecode (braindecode.org, an optional dependency) by its class name.

    Its outputs, as many as the embedding is wide, are taken as they are. Raises UnknownEncoder, and
    ValueError for a signal that the model cannot take.
    """

    def __init__(
        self, n_channels: int, n_times: int, n_subjects: int, embed_dim: int, *, model: str
    ) -> None:
        super().__init__(n_channels, n_times, n_subjects, embed_dim)
        self.config |= {"model": model}
        kind = braindecode_model(model)
        try:
            self.model = kind(n_chans=n_channels, n_times=n_times, n_outputs=embed_dim)
            found = self._trial()
        except (ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{model} does not take {n_channels} channels x {n_times} samples: {reason}"
            ) from None
        if found != (1, embed_dim):
            raise ValueError(f"{model} gives {found}, expected [B, {embed_dim}]")

    @torch.no_grad()
    def _trial(self) -> tuple[int, ...]:
        """Shape of the model's answer to one row: some models fail only when they are used."""
        self.model.eval()
        answer = self.model(torch.zeros(1, self.n_channels, self.n_times))
        self.model.train()
        return tuple(answer.shape) if isinstance(answer, torch.Tensor) else ()

    @property
    def name(self) -> str:
        return self.config["model"]

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.model(eeg)


SIGNAL_SIZES = {"n_chans", "n_times", "n_outputs"}


def _is_built_from_sizes(kind: object) -> bool:
    """Whether ``kind`` is a network class that takes the three sizes and needs nothing else."""
    if not _is_network(kind):
        return False
    parameters = inspect.signature(kind).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {
        item.name for item in parameters if item.default is item.empty and item.kind not in variadic
    }
    return required <= SIGNAL_SIZES <= {item.name for item in parameters}


def braindecode_model(name: str) -> type[nn.Module]:
    """The class ``name`` of braindecode, which is built from sizes alone.

    Raises UnknownEncoder with how to get braindecode, or with close names.
    """
    takes = "that takes n_chans, n_times, n_outputs"
    return _of_braindecode(name, _is_built_from_sizes, takes)


def braindecode_class(name: str) -> type[nn.Module]:
    """Any class ``name`` of braindecode. Raises UnknownEncoder, as :func:`braindecode_model`."""
    return _of_braindecode(name, _is_network, "that was saved with its weights")


def _is_network(kind: object) -> TypeGuard[type[nn.Module]]:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _of_braindecode(name: str, fits: Callable[[object], bool], which: str) -> type[nn.Module]:
    try:
        from braindecode import models
    except ImportError:
        raise UnknownEncoder(
            f"{', '.join(ENCODERS)}, or a model of braindecode, which is not installed",
            _suggestion(name, ENCODERS) or "pip install braindecode",
        ) from None
    fitting = [key for key, kind in vars(models).items() if fits(kind)]
    if name in fitting:
        return getattr(models, name)
    raise UnknownEncoder(
        f"{', '.join(ENCODERS)}, or a model of braindecode {which}",
        _suggestion(name, [*ENCODERS, *fitting]) or "see braindecode.org for their names",
    )


def _suggestion(name: str, known: Sequence[str]) -> str:
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3)
    return f"did you mean {' or '.join(lower[item] for item in close)}?" if close else ""


def check_name(name: str, *, known_by_weights: bool = False) -> None:
    """Raise UnknownEncoder unless an encoder of that name can be built here.

    ``known_by_weights``: a saved model says more than the sizes that others are built from.
    """
    if name not in ENCODERS:
        (braindecode_class if known_by_weights else braindecode_model)(name)
