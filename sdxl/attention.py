"""Layer-wise injection: one adapter in every cross-attention, a scale per modality and layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

import modalities
import util
from sdxl.adapter_file import IPAdapterWeights, layer_key
from sdxl.injection_map import Layer

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


_ATTENTION = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)"
    r"\.transformer_blocks\.(\d+)\.attn2\.processor"
)


def layers_of(unet: UNet2DConditionModel) -> tuple[Layer, ...]:
    """The cross-attention layers of ``unet`` in processor order. UserError if it lacks a site."""
    return tuple(_cross_attention(unet).values())


def _cross_attention(unet: UNet2DConditionModel) -> dict[str, Layer]:
    """Processor name -> layer, of attn2 only."""
    found = {}
    for name in unet.attn_processors:
        if match := _ATTENTION.fullmatch(name):
            path, block, attention, layer = match.groups()
            site = f"{path}.{block}" if path else "mid"
            found[name] = Layer(site, int(attention), int(layer))
    sites = list(dict.fromkeys(layer.site for layer in found.values()))
    if set(sites) != set(modalities.SITES):
        raise util.UserError(
            "U-Net",
            f"cross-attention at {', '.join(sites) or 'no block'}",
            f"cross-attention at {', '.join(modalities.SITES)}",
            "name an SDXL-base model: Stable Diffusion 1.5 and 2 and the refiner have other blocks",
        )
    return found


class ImageProjection(nn.Module):
    """CLIP vectors -> image tokens. [B, M, D] -> [B, M, T, W] in the dtype of the weights.

    Submodules are named as in the adapter file. A zero vector does not give zero tokens: there is
    a bias.
    """

    def __init__(self, clip_dim: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(clip_dim, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(embeddings.to(self.proj.weight.dtype))
        return self.norm(tokens.unflatten(-1, (self.tokens, -1)))


class InjectedAttention(nn.Module):
    """Attention processor: ONE to_k_ip / to_v_ip for all modalities, a scale per row and modality.

    The text part is diffusers' AttnProcessor2_0. K and V of the image tokens do not depend on the
    timestep: :meth:`set_tokens` makes them once per image.
    """

    def __init__(self, to_k_ip: torch.Tensor, to_v_ip: torch.Tensor, heads: int) -> None:
        """``to_k_ip``, ``to_v_ip``: [heads * d, W]."""
        super().__init__()
        self.to_k_ip, self.to_v_ip = _frozen_linear(to_k_ip), _frozen_linear(to_v_ip)
        self.heads = heads
        self.clear()

    def clear(self) -> None:
        """Forget the image tokens; a forward pass is then an error."""
        self._batch: int | None = None
        self._first = 0  # row of the first one that the U-Net is given
        self._active = 0  # modalities with a scale > 0 in some row
        self._key = torch.empty(0)  # [B, heads, active * T, d], divided by sqrt(d)
        self._value = torch.empty(0)  # [B, heads, active * T, d], times the scale

    def rows_from(self, first: int) -> None:
        """The U-Net is given the rows from this one on: without the negative ones, say."""
        self._first = first

    def set_tokens(
        self, tokens: torch.Tensor, scale: torch.Tensor, device: torch.device | None = None
    ) -> None:
        """``tokens`` [B, M, T, W] where the weights are, in their dtype; ``scale`` [B, M] on CPU.

        ``device``: where the U-Net computes; None: where the weights are.
        """
        if tokens.ndim != 4 or scale.shape != tokens.shape[:2]:
            raise RuntimeError(
                f"image tokens {tuple(tokens.shape)} with scale {tuple(scale.shape)}: "
                "expected [B, M, T, W] and [B, M]"
            )
        self.clear()
        self._batch = len(tokens)
        # On CPU, so that choosing the modalities of 70 layers does not synchronise with the GPU.
        active = scale.ne(0).any(dim=0).nonzero().flatten()
        self._active = len(active)
        if not self._active:
            return
        self.hold_tokens(tokens[:, active.to(tokens.device)], scale[:, active].to(tokens), device)

    def hold_tokens(
        self, tokens: torch.Tensor, scale: torch.Tensor, device: torch.device | None = None
    ) -> None:
        """As :meth:`set_tokens` for modalities that all act: no scale is looked at.

        ``scale`` is where the tokens are. Training needs it, where a look would be waited for.
        """
        self._batch, self._active = tokens.shape[:2]
        weight = scale[:, :, None, None]
        key = self.to_k_ip(tokens).flatten(1, 2).unflatten(-1, (self.heads, -1))
        value = (self.to_v_ip(tokens) * weight).flatten(1, 2).unflatten(-1, (self.heads, -1))
        self._key = (key.transpose(1, 2).contiguous() * key.shape[-1] ** -0.5).to(device=device)
        self._value = value.transpose(1, 2).contiguous().to(device=device)

    def injected(self, query: torch.Tensor) -> torch.Tensor:
        """sum_m scale_m * Attn(query, K_m, V_m). [B, heads, S, d] -> the same."""
        # 4 keys per modality are too few for the fused kernels, which want a copy of the query for
        # each: one product over all tokens, softmax per modality, took a third of the time or less
        # (CPU, M=5). Tokens come before positions, so that the softmax runs along long rows.
        key, value = self._key[self._first :], self._value[self._first :]
        scores = key @ query.contiguous().transpose(-1, -2)
        shares = scores.unflatten(-2, (self._active, -1)).softmax(dim=-2).flatten(-3, -2)
        return shares.transpose(-1, -2) @ value

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``hidden_states`` [B, S, C] or [B, C, h, w]; ``encoder_hidden_states`` [P, N, W].

        P prompts for B / P rows each, in their order: B for a prompt per row. diffusers calls this.
        Raises RuntimeError without image tokens for exactly these rows.
        """
        if self._batch is None or len(hidden_states) != self._batch - self._first:
            state = (
                "set_tokens was not called"
                if self._batch is None
                else f"image tokens are for {self._batch - self._first} rows"
            )
            raise RuntimeError(
                f"{state}, the U-Net has {len(hidden_states)}: Injector.set must be given "
                "the rows that are drawn, with guidance if the U-Net gets negative rows"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))  # projection, dropout
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Text attention plus the injected one, [B, S, C] -> [B, S, inner]."""
        text_or_self = hidden_states if text is None else text
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, text_or_self.shape[1], len(hidden_states))
            mask = mask.view(len(hidden_states), attn.heads, -1, mask.shape[-1])
        if text is not None and attn.norm_cross:
            text_or_self = attn.norm_encoder_hidden_states(text)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.to_q(hidden_states),
                attn.to_k(text_or_self),
                attn.to_v(text_or_self),
            )
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if len(key) != len(query):  # a prompt's K and V are made once, not for each of its rows
            rows_each = _rows_per_prompt(len(query), len(key))
            key, value = (part.repeat_interleave(rows_each, dim=0) for part in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self._active:
            attended = attended + self.injected(query)
        return attended.transpose(1, 2).flatten(2).to(query.dtype)


def _rows_per_prompt(rows: int, prompts: int) -> int:
    if rows % prompts:
        raise RuntimeError(f"{prompts} prompts for {rows} rows: expected a divisor of them")
    return rows // prompts


def _frozen_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Injector:
    """The adapter in a U-Net: :meth:`install` once, :meth:`set` for each batch of images."""

    def __init__(
        self,
        layers: tuple[Layer, ...],
        processors: Sequence[InjectedAttention],
        projection: ImageProjection,
    ) -> None:
        self.layers = layers
        self.processors = tuple(processors)
        self.projection = projection
        self._guided_rows = 0  # negative rows, which come first

    @classmethod
    def install(cls, unet: UNet2DConditionModel, weights: IPAdapterWeights) -> Injector:
        """Put processors on the cross-attention of ``unet``; others stay. Raises DataError."""
        found = _cross_attention(unet)
        attentions = [unet.get_submodule(name.removesuffix(".processor")) for name in found]
        expected = [tuple(attention.to_k.weight.shape) for attention in attentions]
        shapes = [tuple(key.shape) for key, _ in weights.layers]
        if shapes != expected:
            first = next(
                (
                    i
                    for i, pair in enumerate(zip(shapes, expected, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(shapes), len(expected)),
            )
            raise util.DataError(
                weights.path,
                f"{len(shapes)} layers, number {first}: {shapes[first : first + 1]}",
                f"{len(expected)} layers, number {first}: {expected[first : first + 1]}",
                "take the IP-Adapter made for this U-Net: ip-adapter_sdxl_vit-h for SDXL-base",
            )
        where = {"device": unet.device, "dtype": unet.dtype}
        processors = [
            InjectedAttention(key.to(**where), value.to(**where), attention.heads)
            for (key, value), attention in zip(weights.layers, attentions, strict=True)
        ]
        unet.set_attn_processor(
            {**unet.attn_processors, **dict(zip(found, processors, strict=True))}
        )
        projection = ImageProjection(weights.clip_dim, weights.width, weights.tokens)
        projection.load_state_dict(weights.projection)
        return cls(tuple(found.values()), processors, projection.to(**where).requires_grad_(False))

    def set(
        self,
        embeddings: torch.Tensor,
        scales: torch.Tensor,
        guidance: bool,
        device: torch.device | None = None,
    ) -> None:
        """What to draw next: ``embeddings`` [B, M, D] un-normalised, ``scales`` [B, M, L].

        ``guidance``: the U-Net will get [negative; positive] rows. The negative ones read the
        projection of a ZERO embedding, as in the adapter's training, with the same scales.
        ``device``: where the U-Net computes; None: where its weights are, which with CPU offload
        is another place. Raises ValueError for other shapes.
        """
        wanted = (*embeddings.shape[:2], len(self.layers))
        clip_dim = self.projection.proj.in_features
        if (
            embeddings.ndim != 3
            or embeddings.shape[-1] != clip_dim
            or tuple(scales.shape) != wanted
        ):
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} and scales {tuple(scales.shape)}: expected "
                f"[B, M, {clip_dim}] and [B, M, {len(self.layers)}]"
            )
        weight = self.processors[0].to_k_ip.weight
        device = weight.device if device is None else device
        # Offloaded weights wait on the CPU, or nowhere until accelerate's hooks bring them in.
        there = device if weight.is_meta else weight.device
        self.projection.to(device=there, dtype=weight.dtype)  # the U-Net may have moved since
        embeddings, scales = embeddings.to(there), scales.float().cpu()
        if guidance:
            embeddings = torch.cat([torch.zeros_like(embeddings), embeddings])
            scales = torch.cat([scales, scales])
        tokens = self.projection(embeddings)
        for layer, processor in enumerate(self.processors):
            processor.set_tokens(tokens, scales[:, :, layer], device)
        self._guided_rows = len(embeddings) // 2 if guidance else 0

    def guide(self, on: bool) -> None:
        """After :meth:`set` with guidance: whether the U-Net gets the negative rows, too."""
        for processor in self.processors:
            processor.rows_from(0 if on else self._guided_rows)

    def state(self) -> dict[str, torch.Tensor]:
        """The weights in the keys of an official file."""
        tensors = {
            f"image_proj.{name}": tensor for name, tensor in self.projection.state_dict().items()
        }
        for layer, processor in enumerate(self.processors):
            tensors[layer_key(layer, "k")] = processor.to_k_ip.weight.detach()
            tensors[layer_key(layer, "v")] = processor.to_v_ip.weight.detach()
        return tensors

    def clear(self) -> None:
        """Free the keys and values; drawing before the next :meth:`set` is an error."""
        for processor in self.processors:
            processor.clear()
