"""The ATMS encoder: Adaptive Thinking Mapper with subject tokens (Li et al., NeurIPS 2024).

As in EEG_Image_decode, with the published code's traps mended; ``reference=True`` keeps them for
public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from decoder.encoders import Encoder, SpatioTemporalConvolution, pooled_width, projection
from subject_layers.transformer import ChannelTransformer, LayerSizes
from util import grouped


@dataclass(frozen=True)
class ATMSSizes(LayerSizes):
    """Of the transformer over channels and the convolution over its tokens, as published."""

    features: int = 40
    kernel: int = 25
    pool_kernel: int = 51


_PUBLISHED = ATMSSizes()


class ATMS(Encoder):
    """EEG [B, C, T] float32 and subject [B] int64 -> embedding [B, D], not L2-normalised.

    ``subject``: 0-based per row, -1 = unknown. ``reference=True`` computes what the published code
    does: the last channel's token dropped, ids read as table rows (one beyond the table switches
    the whole batch to the shared token), no subject layer, the logit scale used raw. Raises
    ValueError on wrong shapes.
    """

    def __init__(
        self,
        n_channels: int = 63,
        n_times: int = 250,
        n_subjects: int = 10,
        embed_dim: int = 1024,
        sizes: ATMSSizes = _PUBLISHED,
        *,
        positional: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(n_channels, n_times, n_subjects, embed_dim, subject_layer=not reference)
        self.config |= asdict(sizes) | {"positional": positional, "reference": reference}
        self.reference = reference
        self.encoder = ChannelTransformer(
            n_channels, n_times, n_subjects, sizes, positional=positional, reference=reference
        )
        kernels = (sizes.kernel, sizes.pool_kernel)
        self.enc_eeg = nn.Sequential(
            SpatioTemporalConvolution(n_channels, sizes.features, *kernels)
        )
        flat = sizes.features * pooled_width(sizes.width, *kernels)
        self.proj_eeg = projection(flat, embed_dim, dropout=0.5)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ATMS:
        """As of every encoder; its sizes are one."""
        return cls(**grouped(config, "sizes", ATMSSizes))

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.proj_eeg(self.enc_eeg(self.encoder(eeg, subject)))

    def add_subjects(self, count: int) -> None:
        """As of every encoder; tokens, too."""
        super().add_subjects(count)
        self.encoder.enc_embedding.subject_embedding.add_subjects(count)

    def subject_parameters(self) -> list[nn.Parameter]:
        """As of every encoder; tokens, too."""
        embedding = self.encoder.enc_embedding.subject_embedding
        return [*super().subject_parameters(), *embedding.parameters()]

    @property
    def similarity_scale(self) -> torch.Tensor:
        """As of every encoder; ``reference``: the parameter itself."""
        return self.logit_scale if self.reference else super().similarity_scale

    @classmethod
    def from_reference(
        cls, state_dict: Mapping[str, torch.Tensor], positional: bool = True, pool_kernel: int = 51
    ) -> ATMS:
        """Load a public ATM-S checkpoint; sizes are read from its shapes.

        The returned module takes the reference's own integer ids (``sub-08`` -> 8).
        ``positional=False`` for checkpoints trained before 2025-12-24, in which the table was
        silently off. Parameters that never took part in the published forward pass are left out.
        Raises ValueError for another model.
        """
        live = {
            key: value
            for key, value in state_dict.items()
            if not key.startswith(_DEAD_IN_REFERENCE)
        }
        try:
            model = cls.from_config(
                _reference_sizes(live)
                | {"positional": positional, "pool_kernel": pool_kernel, "reference": True}
            )
        except KeyError as missing:
            raise ValueError(f"not an ATM-S state dict: {missing} is missing") from None
        found, needed = (state["proj_eeg.0.weight"].shape for state in (live, model.state_dict()))
        if found != needed:
            raise ValueError(
                f"proj_eeg.0.weight is {tuple(found)}, expected {tuple(needed)} with pool_kernel="
                f"{pool_kernel}: pass the pooling width that this checkpoint was trained with"
            )
        model.to(live["proj_eeg.0.weight"].dtype)
        try:
            model.load_state_dict(live)
        except RuntimeError as error:
            raise ValueError(f"not an ATM-S state dict: {error}") from None
        return model.eval()


_DEAD_IN_REFERENCE = (
    "subject_wise_linear.",
    "encoder.enc_embedding.mask_token",
    "encoder.enc_embedding.temporal_embedding.",
    "encoder.enc_embedding.position_embedding.",
    "encoder.enc_embedding.subject_embedding.mask_embedding",
)


def _reference_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {
        "n_times": state["encoder.enc_embedding.value_embedding.weight"].shape[1],
        "width": state["encoder.enc_embedding.value_embedding.weight"].shape[0],
        "n_subjects": state[
            "encoder.enc_embedding.subject_embedding.subject_embedding.weight"
        ].shape[0],
        "hidden": state["encoder.encoder.attn_layers.0.conv1.weight"].shape[0],
        "n_channels": state["enc_eeg.0.tsconv.4.weight"].shape[2],
        "features": state["enc_eeg.0.tsconv.0.weight"].shape[0],
        "kernel": state["enc_eeg.0.tsconv.0.weight"].shape[3],
        "embed_dim": state["proj_eeg.0.weight"].shape[0],
    }
