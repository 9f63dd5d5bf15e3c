"""Samples of the priors: whose noise they have, guidance, draws, and what a trained bank gives."""

from __future__ import annotations

import pytest
import torch
from helpers_priors import C, D, drawn_from, normal, own_prior, small_bank

from loss import prior_total
from modalities import NAMES
from unet import PriorBank


def _passes(bank: PriorBank, guidance: float) -> list[int]:
    """Rows of the priors' forward passes during two steps for three rows."""
    sizes = []
    hook = bank.priors.output_layer.register_forward_hook(
        lambda _m, _i, out: sizes.append(out.shape[1])
    )
    bank.sample(normal(3, C), 2, guidance, [0, 1, 2])
    hook.remove()
    return sizes


def test_guidance_of_one_costs_one_pass():
    bank = small_bank().eval()
    assert _passes(bank, 1.0) == [3, 3]
    assert _passes(bank, 3.0) == [6, 6]


@torch.no_grad()
def test_guidance_is_the_stated_combination():
    bank, x, cond = (
        small_bank().eval(),
        normal(len(NAMES) * 4, D).view(len(NAMES), 4, D),
        normal(4, C),
    )
    t = torch.full((len(NAMES), 1), 30)
    conditions = bank.priors.embed_condition(cond)
    for place, name in enumerate(NAMES):
        prior = own_prior(bank, name)
        given, free = prior(x[place], t[0].expand(4), cond), prior(x[place], t[0].expand(4))
        for guidance in (0.0, 1.0, 3.0):
            expected = free + guidance * (given - free)
            found = bank._guided(x, t, conditions, guidance, None)[place]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_belongs_to_its_condition_and_seed(sampler, guidance):
    bank, cond, seeds = small_bank().eval(), normal(4, C), [11, 12, 13, 14]
    whole = bank.sample(cond, 4, guidance, seeds, sampler)
    alone = bank.sample(cond[2:3], 4, guidance, seeds[2:3], sampler)
    turned = bank.sample(cond.flip(0), 4, guidance, seeds[::-1], sampler)
    for name in NAMES:
        torch.testing.assert_close(whole[name][2:3], alone[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[name].flip(0), turned[name], rtol=1e-4, atol=1e-4)


def test_several_draws_are_averaged():
    """Their mean moves less with the seed than one draw, and belongs to its row alone."""
    bank, seeds = small_bank().eval(), list(range(16))
    cond = normal(1, C).repeat(len(seeds), 1)
    spread = {}
    for draws in (1, 16):
        made = bank.sample(cond, 4, 1.0, seeds, "ddim", draws)["image"]
        assert made.shape == (len(seeds), D)
        spread[draws] = float(made.std(dim=0).mean())
        alone = bank.sample(cond[:1], 4, 1.0, [5], "ddim", draws)["image"]
        torch.testing.assert_close(alone[0], made[5], rtol=1e-4, atol=1e-4)
    assert 0 < spread[16] < 0.5 * spread[1]


def test_one_row_s_condition_moves_its_own_sample_only():
    bank, cond = small_bank().eval(), normal(4, C)
    before = bank.sample(cond, 4, 1.0, [1, 2, 3, 4])
    cond[1] += 3
    after = bank.sample(cond, 4, 1.0, [1, 2, 3, 4])
    for name in NAMES:
        moved = (after[name] - before[name]).norm(dim=1)
        assert moved[1] > 1e-2
        assert (moved[[0, 2, 3]] < 1e-4).all()


def test_seeds_and_modalities_have_their_own_noise():
    bank = small_bank().eval()
    same = normal(1, C).repeat(2, 1)
    samples = bank.sample(same, 4, 1.0, [1, 2])
    for name in NAMES:
        assert (samples[name][0] - samples[name][1]).norm() > 0.1
    equal = bank.sample(same, 4, 1.0, [7, 7])
    torch.testing.assert_close(equal["image"][0], equal["image"][1])
    units = [bank.standardise(name, samples[name])[0] for name in NAMES]
    assert all((units[0] - unit).norm() > 0.1 for unit in units[1:])


def test_wrong_requests_are_refused():
    bank = small_bank().eval()
    with pytest.raises(ValueError, match="3 seeds"):
        bank.sample(normal(4, C), 2, 1.0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        bank.sample(normal(4, 1, C), 2, 1.0, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="expected dpm or ddim"):
        bank.sample(normal(1, C), 2, 1.0, [1], "euler")


# --- a trained bank ----------------------------------------------------------------------------

WIDE, STEPS = 8, 500


def _linear_targets(cond: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each modality a rotation of the condition, deviation 4, around its own mean, +20 or -20."""
    return {
        name: 20.0 * (-1) ** i + 4 * cond @ torch.linalg.qr(normal(WIDE, WIDE, seed=50 + i))[0]
        for i, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    bank = PriorBank(WIDE, WIDE, dropout=0.0, hidden_dim=(128, 64))
    cond, draw = normal(2048, WIDE), drawn_from()
    targets = _linear_targets(cond)
    bank.fit_targets(targets)
    optimiser = torch.optim.Adam(bank.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(cond), (128,), generator=draw)
        batch = {name: target[rows] for name, target in targets.items()}
        optimiser.zero_grad()
        prior_total(bank.losses(batch, cond[rows], draw)).backward()
        optimiser.step()
        schedule.step()
    return bank.eval()


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a * b).sum() / (a.norm() * b.norm())).item()


@pytest.mark.parametrize(("sampler", "steps"), [("dpm", 10), ("ddim", 20)])
def test_samples_recover_un_normalised_targets_from_the_condition(trained, sampler, steps):
    """Networks that predict noise gave samples 10 times too large here, correlated by 0.2."""
    cond = normal(128, WIDE, seed=9)
    targets = _linear_targets(cond)
    samples = trained.sample(cond, steps, 1.0, range(128), sampler)
    shuffled = trained.sample(cond.roll(1, 0), steps, 1.0, range(128), sampler)
    for name in NAMES:
        assert _correlation(samples[name], targets[name]) > 0.9
        assert abs(_correlation(shuffled[name], targets[name])) < 0.2
        assert abs(samples[name].mean() - targets[name].mean()) < 0.5
        assert 0.85 < samples[name].std(0).mean() / targets[name].std(0).mean() < 1.15


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_samples_are_not_clipped(trained, sampler):
    """A clip of x0 to +-1, diffusers' default, would end at one standard deviation."""
    samples = trained.sample(normal(64, WIDE, seed=9), 10, 1.0, range(64), sampler)
    for name in NAMES:
        beyond = trained.standardise(name, samples[name]).abs()
        assert 0.2 < (beyond > 1).float().mean() < 0.45  # 0.32 of a normal distribution
        assert beyond.max() > 2
        assert (samples[name].abs() > 1).float().mean() > 0.99


def test_guidance_moves_samples_away_from_the_unconditional(trained):
    cond = normal(64, WIDE, seed=9)
    free, plain, guided_twice = (
        trained.sample(cond, 10, guidance, range(64)) for guidance in (0.0, 1.0, 2.0)
    )
    for name, target in _linear_targets(cond).items():
        assert abs(_correlation(free[name], target)) < 0.3 < _correlation(plain[name], target)
        spread = [sample[name].std(0).mean() for sample in (plain, guided_twice)]
        assert spread[1] > 1.1 * spread[0]
