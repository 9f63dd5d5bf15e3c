"""Small priors and their targets, for the tests of unet.py."""

from __future__ import annotations

import torch
from builders import normal

from modalities import NAMES
from unet import DiffusionPriorUNet, PriorBank

D, C = 6, 5


def drawn_from(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_prior() -> DiffusionPriorUNet:
    torch.manual_seed(0)
    return DiffusionPriorUNet(D, C, hidden_dim=(16, 8, 4)).eval()


def small_bank(**options) -> PriorBank:
    """Untrained, without dropout unless asked for; targets far from mean 0 and deviation 1."""
    torch.manual_seed(0)
    bank = PriorBank.from_config(
        {"embed_dim": D, "cond_dim": C, "dropout": 0.0, "condition_dropout": 0.0} | options
    )
    bank.fit_targets(far_targets(64))
    return bank


def far_targets(rows: int) -> dict[str, torch.Tensor]:
    return {name: 5 + 3 * normal(rows, D, seed=i) for i, name in enumerate(NAMES)}


def own_prior(bank: PriorBank, name: str) -> DiffusionPriorUNet:
    """A modality's prior as a network of its own, from the bank's state dict."""
    prefix = f"priors.{name}."
    state = {
        key.removeprefix(prefix): value
        for key, value in bank.state_dict().items()
        if key.startswith(prefix)
    }
    prior = DiffusionPriorUNet(bank.embed_dim, bank.cond_dim, bank.hidden_dim, dropout=0.0)
    prior.to(state["output_layer.weight"].dtype).load_state_dict(state)
    return prior.eval()
