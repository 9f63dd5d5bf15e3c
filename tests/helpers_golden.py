"""Golden numbers of the published ATM code: its parameter shapes, and values made by a hash."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

GOLDEN = json.loads((Path(__file__).parent / "golden_atm.json").read_text(encoding="utf-8"))
_MASK = np.uint64(0xFFFFFFFF)


def hashed(count: int, number: int) -> np.ndarray:
    """Pseudo-random float64 [count] in [-1, 1) from a 32-bit integer hash of (index, number)."""
    u = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    u = (u + np.uint64(number * 40503 + 12345)) & _MASK
    for _ in range(2):
        u ^= u >> np.uint64(16)
        u = (u * np.uint64(73244475)) & _MASK
    u ^= u >> np.uint64(16)
    return u / 2.0**31 - 1


def golden_input(number: int, scale: float, shape: tuple[int, ...], dtype: torch.dtype):
    values = scale * hashed(math.prod(shape), 1000 + number)
    return torch.from_numpy(values).reshape(shape).to(dtype)


def _parameter(key: str, shape: tuple[int, ...], number: int) -> np.ndarray:
    if key.endswith("num_batches_tracked") or key.endswith("position_embedding.pe"):
        return np.zeros(shape)
    s = hashed(math.prod(shape), number).reshape(shape)
    if key == "logit_scale":
        return np.full(shape, math.log(1 / 0.07))
    if key.endswith("running_var"):
        return 1 + 0.5 * s**2
    if len(shape) == 1:
        return 1 + 0.1 * s if key.endswith(".weight") else 0.1 * s
    return s * math.sqrt(3 / (math.prod(shape) // shape[0]))


def golden_state(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict:
    """The recipe's state dict; a parameter's number is the rank of its key among them, sorted."""
    return {
        key: torch.tensor(_parameter(key, shapes[key], number)).to(
            torch.int64 if key.endswith("num_batches_tracked") else dtype
        )
        for number, key in enumerate(sorted(shapes))
    }


def _linear(name: str, width_out: int, *width_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width_out, *width_in), f"{name}.bias": (width_out,)}


def _batch_norm(name: str) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (40,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def atms_shapes() -> dict[str, tuple[int, ...]]:
    """The 53 keys of a public ATM-S checkpoint, those that its forward pass never uses included."""
    embedding, layer = "encoder.enc_embedding", "encoder.encoder.attn_layers.0"
    shapes = {
        "logit_scale": (),
        f"{embedding}.mask_token": (1, 250),
        f"{embedding}.position_embedding.pe": (1, 5000, 250),
        f"{embedding}.temporal_embedding.embed.weight": (250, 4),
        f"{embedding}.subject_embedding.shared_embedding": (1, 250),
        f"{embedding}.subject_embedding.mask_embedding": (1, 250),
        f"{embedding}.subject_embedding.subject_embedding.weight": (10, 250),
    }
    shapes |= _linear(f"{embedding}.value_embedding", 250, 250)
    for kind in ("query", "key", "value"):
        shapes |= _linear(f"{layer}.attention.{kind}_projection", 248, 250)
    shapes |= _linear(f"{layer}.attention.out_projection", 250, 248)
    shapes |= _linear(f"{layer}.conv1", 256, 250, 1) | _linear(f"{layer}.conv2", 250, 256, 1)
    for norm in (f"{layer}.norm1", f"{layer}.norm2", "encoder.encoder.norm", "proj_eeg.2"):
        shapes |= _linear(norm, 1024 if norm == "proj_eeg.2" else 250)
    for index in range(2):
        shapes |= _linear(f"subject_wise_linear.{index}", 250, 250)
    shapes |= _linear("enc_eeg.0.tsconv.0", 40, 1, 1, 25) | _batch_norm("enc_eeg.0.tsconv.2")
    shapes |= _linear("enc_eeg.0.tsconv.4", 40, 40, 63, 1) | _batch_norm("enc_eeg.0.tsconv.5")
    shapes |= _linear("enc_eeg.0.projection.0", 40, 40, 1, 1)
    return shapes | _linear("proj_eeg.0", 1024, 1440) | _linear("proj_eeg.1.fn.1", 1024, 1024)


def prior_shapes() -> dict[str, tuple[int, ...]]:
    """The keys of the published DiffusionPriorUNet at width 1024."""
    widths = (1024, 512, 256, 128, 64)
    shapes = _linear("input_layer.0", 1024, 1024) | _linear("input_layer.1", 1024)
    for side, order in (("encode", widths), ("decode", widths[::-1])):
        for index, (width, after) in enumerate(pairwise(order)):
            shapes |= _linear(f"{side}_time_embedding.{index}.linear_1", width, 512)
            shapes |= _linear(f"{side}_time_embedding.{index}.linear_2", width, width)
            shapes |= _linear(f"{side}_cond_embedding.{index}", width, 1024)
            shapes |= _linear(f"{side}_layers.{index}.0", after, width)
            shapes |= _linear(f"{side}_layers.{index}.1", after)
    return shapes | _linear("output_layer", 1024, 1024)


def summary(rows: torch.Tensor) -> dict[str, np.ndarray]:
    """What the golden numbers say about an output [B, D]."""
    values = rows.detach().double().numpy()
    return {
        "shape": np.array(values.shape),
        "first8": values[0, :8],
        "row_mean": values.mean(1),
        "row_std": values.std(1),
        "row_norm": np.linalg.norm(values, axis=1),
        "dot_idx": values @ np.sin(0.1 * np.arange(values.shape[1])),
    }


def assert_golden(rows: torch.Tensor, name: str, rtol: float) -> None:
    found = summary(rows)
    for key, expected in GOLDEN[name].items():
        # the numbers are rounded to 7 decimals
        np.testing.assert_allclose(found[key], expected, rtol=rtol, atol=1e-7, err_msg=key)
