"""M networks alike as one: parameters [M, ...], inputs [M, B, ...], each product for all of them.

A GPU is bound by the number of small products, not by their size: five priors cost it little more
than one. The state dict stays that of M separate networks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Products(torch.autograd.Function):
    """x [M, B, I], weight [M, O, I], bias [M, O] -> [M, B, O].

    One batched product; on CPUs M in turn, written where they belong: a CPU is bound by the
    weights' bytes, and its batched product took up to twice as long (B = 64).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type != "cpu":
            return torch.baddbmm(bias[:, None], x, weight.mT)
        out = x.new_empty(*x.shape[:2], weight.shape[1])
        for m, rows in enumerate(x):
            torch.addmm(bias[m], rows, weight[m].T, out=out[m])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        if grad.device.type != "cpu":
            of_x = torch.bmm(grad, weight) if needs_x else None
            return of_x, torch.bmm(grad.mT, x), grad.sum(1)
        of_x = grad.new_empty(x.shape) if needs_x else None
        of_weight = torch.empty_like(weight)
        for m, rows in enumerate(grad):
            torch.mm(rows.T, x[m], out=of_weight[m])
            if of_x is not None:
                torch.mm(rows, weight[m], out=of_x[m])
        return of_x, of_weight, grad.sum(1)


class StackedLinear(nn.Module):
    """M linear layers: [M, B, I] -> [M, B, O]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):  # which knows no functions of our own
            dtype = torch.get_autocast_dtype(x.device.type)
            parts = tuple(part.to(dtype) for part in parts)
        return _Products.apply(*parts)


class StackedLayerNorm(nn.Module):
    """M layer norms: [M, B, W] -> the same."""

    def __init__(self, layers: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.eps = layers[0].eps
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None])


def stacked(modules: Sequence[nn.Module]) -> nn.Module:
    """One module that computes on [M, B, ...] what ``modules``, all of one build, do on [B, ...].

    Copies their linear layers and layer norms; of everything else it takes the first one's.
    """
    first = modules[0]
    if isinstance(first, nn.Linear):
        return StackedLinear(modules)
    if isinstance(first, nn.LayerNorm):
        return StackedLayerNorm(modules)
    made = copy.deepcopy(first)
    for name, _ in first.named_children():
        made.add_module(name, stacked([module.get_submodule(name) for module in modules]))
    return made


def keep_separate_state(module: nn.Module, names: Sequence[str]) -> None:
    """The state dict of a :func:`stacked` module becomes that of ``names``' own modules.

    So a file does not depend on how they are computed, and one of them loads alone.
    """

    def split(_module: nn.Module, state: dict, prefix: str, _local: dict) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            for name, part in zip(names, state.pop(key), strict=True):
                state[f"{prefix}{name}.{key.removeprefix(prefix)}"] = part

    def join(module: nn.Module, state: dict, prefix: str, *_rest: object) -> None:
        for key, _ in module.named_parameters():
            own = [f"{prefix}{name}.{key}" for name in names]
            if all(key in state for key in own):
                state[f"{prefix}{key}"] = torch.stack([state.pop(key) for key in own])

    module.register_state_dict_post_hook(split)
    module.register_load_state_dict_pre_hook(join)
