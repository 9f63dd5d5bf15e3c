"""The diffusion priors: the published numbers, rows that stay apart, conditions that count."""

from __future__ import annotations

import pytest
import torch
from helpers_golden import assert_golden, golden_input, golden_state, prior_shapes

import unet
from decoder.aligners import aligner_from
from loss import LossTerms, prior_loss, prior_total
from modalities import MODALITIES, NAMES, QUANTITIES
from subject_layers import stacked
from unet import TRAIN_STEPS, DiffusionPriorUNet, PriorBank, sampler_named

D, C = 6, 5


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _prior() -> DiffusionPriorUNet:
    torch.manual_seed(0)
    return DiffusionPriorUNet(D, C, hidden_dim=(16, 8, 4)).eval()


def _bank(**options) -> PriorBank:
    """Untrained, without dropout unless asked for; targets far from mean 0 and deviation 1."""
    torch.manual_seed(0)
    bank = PriorBank(D, C, **{"dropout": 0.0, "condition_dropout": 0.0} | options)
    bank.fit_targets(_targets(64))
    return bank


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


def five_losses(
    bank: PriorBank,
    priors: dict[str, DiffusionPriorUNet],
    targets: dict[str, torch.Tensor],
    cond: torch.Tensor,
    generator: torch.Generator,
    draws: int,
) -> dict[str, LossTerms]:
    """The oracle: five networks one after another, each sample repeated ``draws`` times."""
    losses, cond = {}, cond.repeat_interleave(draws, dim=0)
    for name, prior in priors.items():
        clean = bank.standardise(name, targets[name]).repeat_interleave(draws, dim=0)
        t = torch.randint(TRAIN_STEPS, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        keep = torch.rand(len(clean), generator=generator) >= bank.condition_dropout
        kept = bank.alphas_cumprod[t][:, None].to(clean.dtype)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        losses[name] = prior_loss(prior(noisy, t, cond, keep), velocity)
    return losses


def _targets(rows: int) -> dict[str, torch.Tensor]:
    return {name: 5 + 3 * _normal(rows, D, seed=i) for i, name in enumerate(NAMES)}


# --- one prior --------------------------------------------------------------------------------


def test_golden_numbers_and_names_of_the_published_prior():
    prior = DiffusionPriorUNet()
    shapes = {key: tuple(value.shape) for key, value in prior.state_dict().items()}
    assert shapes == prior_shapes()
    assert sum(parameter.numel() for parameter in prior.parameters()) == 9_675_648
    prior.load_state_dict(golden_state(prior_shapes(), torch.float32))
    prior.eval()
    noisy, condition = (
        golden_input(number, scale, (3, 1024), torch.float32)
        for number, scale in ((3, 1.7320508), (4, 0.5))
    )
    with torch.no_grad():
        output = prior(noisy, torch.tensor([0, 250, 999]), condition)
    assert_golden(output, "prior_float32", rtol=1e-5)


@torch.no_grad()
def test_no_condition_leaves_its_bias_out_too():
    prior, x, t, cond = _prior(), _normal(3, D), torch.tensor([0, 500, 999]), _normal(3, C)
    without = prior(x, t)
    torch.testing.assert_close(prior(x, t, cond, torch.zeros(3, dtype=torch.bool)), without)
    assert (prior(x, t, torch.zeros(3, C)) - without).norm() > 0.01  # the biases
    for layer in (*prior.encode_cond_embedding, *prior.decode_cond_embedding):
        layer.weight.zero_()
        layer.bias.zero_()
    torch.testing.assert_close(prior(x, t, cond), without)


@torch.no_grad()
def test_keep_cond_is_per_row():
    prior, x, t, cond = _prior(), _normal(3, D), torch.tensor([1, 2, 3]), _normal(3, C)
    mixed = prior(x, t, cond, torch.tensor([True, False, True]))
    torch.testing.assert_close(mixed[[0, 2]], prior(x, t, cond)[[0, 2]])
    torch.testing.assert_close(mixed[1], prior(x, t)[1])
    assert (prior(x, t, cond)[1] - prior(x, t)[1]).norm() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_each_row_depends_on_its_own_inputs(argument):
    """The first implementation trained every sample against every condition of the batch."""
    prior = _prior()
    inputs = [_normal(4, D), torch.tensor([0, 300, 600, 999]), _normal(4, C)]
    before = prior(*inputs)
    inputs[argument] = inputs[argument].clone()
    inputs[argument][2] = 7
    moved = (prior(*inputs) - before).norm(dim=1)
    assert moved[2] > 1e-2
    assert (moved[[0, 1, 3]] < 1e-6).all()


@pytest.mark.parametrize(
    ("x", "t", "cond"),
    [
        ((4, 1, D), (4,), (4, C)),
        ((4, D), (4,), (4, 1, C)),
        ((4, D + 1), (4,), (4, C)),
        ((4, D), (4, 1), (4, C)),
        ((4, D), (), (4, C)),
        ((4, D), (4,), (1, C)),
        ((4, D), (4,), (4, C + 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(x, t, cond):
    with pytest.raises(ValueError, match="expected"):
        _prior()(torch.zeros(x), torch.zeros(t, dtype=torch.int64), torch.zeros(cond))


# --- targets ----------------------------------------------------------------------------------


def test_targets_are_standardised_and_restored():
    bank, targets = _bank(), _targets(64)
    for name in NAMES:
        unit = bank.standardise(name, targets[name])
        torch.testing.assert_close(unit.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
        torch.testing.assert_close(unit.std(0), torch.ones(D))
        torch.testing.assert_close(bank.restore(name, unit), targets[name])


def test_statistics_belong_to_the_modality_and_travel_with_the_model():
    bank = _bank()
    features = {name: 10 * i + (i + 1) * _normal(50, D) for i, name in enumerate(NAMES)}
    bank.fit_targets(features)
    copy = aligner_from(bank.config)
    copy.load_state_dict(bank.state_dict())
    for name in NAMES:
        torch.testing.assert_close(getattr(copy, f"{name}_mean"), features[name].mean(0))
        torch.testing.assert_close(getattr(copy, f"{name}_std"), features[name].std(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_modality_that_never_varies_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*dead"):
        _bank().fit_targets(_targets(8) | {name: torch.full((8, D), 0.3)})


def test_a_dimension_that_never_varies_is_not_blown_up():
    bank, targets = _bank(), _targets(64)
    targets["image"][:, 2] = 0.3
    bank.fit_targets(targets)
    assert bank.standardise("image", targets["image"]).abs().max() < 10


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"text: .* expected \[N, 6\]"):
        _bank().fit_targets(_targets(8) | {"text": torch.randn(8, D + 1)})


# --- five as one ------------------------------------------------------------------------------


def test_the_state_dict_is_that_of_five_priors():
    state = _bank().state_dict()
    wanted = {f"priors.{name}.{key}" for name in NAMES for key in _names_of_one(D, C)}
    assert {key for key in state if key.startswith("priors.")} == wanted
    other = PriorBank(D, C)
    other.load_state_dict(state)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not torch.equal(state["priors.text.output_layer.weight"],
                           state["priors.image.output_layer.weight"])  # fmt: skip


def _names_of_one(embed_dim: int, cond_dim: int) -> set[str]:
    return set(DiffusionPriorUNet(embed_dim, cond_dim).state_dict())


def test_a_state_dict_without_a_prior_s_weights_is_refused():
    state = _bank().state_dict()
    del state["priors.text.output_layer.weight"]
    with pytest.raises(RuntimeError, match=r"output_layer\.weight"):
        PriorBank(D, C).load_state_dict(state)


@pytest.mark.parametrize(("draws", "many"), [(1, unet.MANY_TIMESTEPS), (3, 24), (40, 1)])
def test_the_bank_equals_five_networks_in_turn(draws, many, monkeypatch):
    """Losses and gradients, in float64, to 1e-6: what makes it fast changes no number."""
    monkeypatch.setattr(unet, "MANY_TIMESTEPS", many)
    bank = _bank(condition_dropout=0.3).double()
    priors = {name: own_prior(bank, name) for name in NAMES}
    targets = {name: rows.double() for name, rows in _targets(8).items()}
    conds = [_normal(8, C).double().requires_grad_() for _ in range(2)]
    ours = bank.losses(targets, conds[0], _generator(), draws)
    oracle = five_losses(bank, priors, targets, conds[1], _generator(), draws)
    prior_total(ours).backward()
    prior_total(oracle).backward()
    for name in NAMES:
        torch.testing.assert_close(ours[name].total, oracle[name].total, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours[name].cosine, oracle[name].cosine, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(conds[0].grad, conds[1].grad, rtol=1e-6, atol=1e-9)
    stacks = dict(bank.priors.named_parameters())
    for place, prior in enumerate(priors.values()):
        for key, weight in prior.named_parameters():
            torch.testing.assert_close(stacks[key].grad[place], weight.grad, rtol=1e-6, atol=1e-9)


def test_equal_timesteps_are_embedded_once():
    t = torch.tensor([[7, 3, 7, 7], [1, 2, 4, 1]])
    distinct, place = unet.distinct_timesteps(t)
    assert distinct.tolist() == [[3, 7, 0], [1, 2, 4]]
    assert torch.equal(distinct.flatten()[place], t)
    one, where = unet.distinct_timesteps(t[1])
    assert torch.equal(one[where], t[1])


def test_the_batched_product_of_gpus_equals_the_one_of_cpus():
    """On the meta device there are shapes only; the numbers are compared by its formulas."""
    x, weight, bias = _normal(5, 4, 3), _normal(5, 2, 3, seed=1), _normal(5, 2, seed=2)
    parts = [part.double().requires_grad_() for part in (x, weight, bias)]
    ours = stacked._Products.apply(*parts)
    gradient = _normal(5, 4, 2, seed=3).double()
    found = torch.autograd.grad(ours, parts, gradient)
    batched = torch.baddbmm(parts[2][:, None], parts[0], parts[1].mT)
    wanted = torch.autograd.grad(batched, parts, gradient)
    torch.testing.assert_close(ours, batched)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    meta = [part.detach().to("meta").requires_grad_() for part in parts]
    out = stacked._Products.apply(*meta)
    made = torch.autograd.grad(out, meta, torch.empty_like(out))
    assert [part.shape for part in made] == [part.shape for part in parts]


def test_mixed_precision_computes_the_products_in_it():
    bank, cond, targets = _bank(), _normal(8, C), _targets(8)
    full = bank.losses(targets, cond, _generator())
    seen = []
    hook = bank.priors.output_layer.register_forward_hook(
        lambda _m, _i, out: seen.append(out.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bank.losses(targets, cond, _generator())
    hook.remove()
    assert seen == [torch.bfloat16]
    prior_total(half).backward()
    assert bank.priors.output_layer.weight.grad.dtype == torch.float32
    for name in NAMES:
        torch.testing.assert_close(half[name].total, full[name].total, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("predicts", QUANTITIES)
@pytest.mark.parametrize("loss_on", QUANTITIES)
def test_whatever_is_predicted_a_perfect_network_has_no_loss(predicts, loss_on, monkeypatch):
    bank, cond, targets = (
        _bank(predicts=predicts, loss_on=loss_on).double(),
        _normal(4, C),
        _targets(4),
    )
    clean = bank.standardised(targets, cond)
    perfect = {}

    def answer(noisy, t, _cond, _keep):
        kept, lost = bank._shares(t, noisy)
        noise = (noisy - kept * clean) / lost
        perfect.update(noise=noise, embedding=clean, velocity=kept * noise - lost * clean)
        return perfect[predicts]

    monkeypatch.setattr(bank.priors, "forward", answer)
    for name, terms in bank.losses(targets, cond.double(), _generator()).items():
        assert terms.mse < 1e-12 and terms.cosine > 1 - 1e-9, name


# --- losses -----------------------------------------------------------------------------------


def _condition_gradient(bank: PriorBank, name: str, cond: torch.Tensor) -> torch.Tensor:
    cond = cond.clone().requires_grad_()
    losses = bank.losses(_targets(len(cond)), cond, _generator())
    return torch.autograd.grad(losses[name].total, cond)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_condition_learns_from_each_prior(name):
    gradient = _condition_gradient(_bank(), name, _normal(4, C))
    assert (gradient.abs().sum(1) > 1e-7).all()


@pytest.mark.parametrize("name", NAMES)
def test_losses_keep_rows_apart(name):
    """The gradient of a row's condition does not know the other rows' conditions."""
    bank, cond = _bank(), _normal(4, C)
    before = _condition_gradient(bank, name, cond)
    cond[2] += 3
    after = _condition_gradient(bank, name, cond)
    torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]], rtol=1e-4, atol=1e-8)
    assert not torch.allclose(after[2], before[2], rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_targets_reach_their_own_loss_only(name):
    bank, cond, targets = _bank(), _normal(4, C), _targets(4)
    before = bank.losses(targets, cond, _generator())
    after = bank.losses(targets | {name: targets[name] + 2}, cond, _generator())
    changed = {other for other in NAMES if before[other].total != after[other].total}
    assert changed == {name}


def test_every_prior_trains_with_its_registry_weight():
    bank, cond, targets = _bank(), _normal(8, C), _targets(8)
    prior_total(bank.losses(targets, cond, _generator())).backward()
    joint = {key: value.grad for key, value in bank.named_parameters()}
    assert [key for key, gradient in joint.items() if gradient is None or not gradient.any()] == []
    alone = bank.losses(targets, cond, _generator())
    for modality in MODALITIES:
        place, weight = NAMES.index(modality.name), bank.priors.output_layer.weight
        own = torch.autograd.grad(alone[modality.name].total, weight, retain_graph=True)[0]
        torch.testing.assert_close(weight.grad[place], modality.loss_weight * own[place])
        assert not own[torch.arange(len(NAMES)) != place].any(), "it moves its own prior only"


def test_losses_are_drawn_from_the_generator():
    bank, cond, targets = _bank(condition_dropout=0.5), _normal(4, C), _targets(4)
    first, same, other = (bank.losses(targets, cond, _generator(seed)) for seed in (0, 0, 1))
    for name in NAMES:
        assert torch.equal(first[name].total, same[name].total)
        assert first[name].total != other[name].total


@pytest.mark.parametrize(
    ("probability", "dropped"), [(0.0, (0, 0)), (0.5, (70, 130)), (1.0, (200, 200))]
)
def test_conditions_are_dropped_per_sample(probability, dropped):
    gradient = _condition_gradient(_bank(condition_dropout=probability), "image", _normal(200, C))
    without = int((gradient.abs().sum(1) == 0).sum())
    assert dropped[0] <= without <= dropped[1]


@pytest.mark.parametrize("shape", [(4, 1, D), (3, D), (1, D)])
def test_targets_that_would_broadcast_are_refused(shape):
    targets = _targets(4) | {"image": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"image: .* expected \[B, D\]"):
        _bank().losses(targets, _normal(4, C), _generator())


def test_noise_is_added_by_the_ddpm_schedule():
    bank, clean, noise = _bank(), _normal(3, D), _normal(3, D, seed=1)
    noisy = bank.add_noise(clean, noise, torch.tensor([0, 500, TRAIN_STEPS - 1]))
    reference = sampler_named("ddim").add_noise(clean, noise, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(noisy, reference)
    assert (noisy[0] - clean[0]).norm() < 0.1 and (noisy[2] - noise[2]).norm() < 0.1


def test_losses_compare_the_velocity_or_the_noise_as_published():
    """On noise a row's squared error is a_t times that on velocity, hence the smaller loss here."""
    cond, targets = _normal(64, C), _targets(64)
    found = {
        kind: _bank(loss_on=kind).losses(targets, cond, _generator())
        for kind in ("velocity", "noise")
    }
    bank, generator = _bank(), _generator()
    t = torch.randint(1000, (64,), generator=generator)
    noise = torch.randn(64, D, generator=generator)
    clean = bank.standardise(NAMES[0], targets[NAMES[0]])
    noisy = bank.add_noise(clean, noise, t)
    with torch.no_grad():
        velocity = own_prior(bank, NAMES[0])(noisy, t, cond)
    error = (velocity - sampler_named("ddim").get_velocity(clean, noise, t)).square().mean(1)
    for kind, weight in (("velocity", torch.ones(64)), ("noise", bank.alphas_cumprod[t])):
        wanted = (weight * error).mean()
        torch.testing.assert_close(found[kind][NAMES[0]].mse, wanted, rtol=1e-4, atol=1e-6)


def test_draws_show_each_sample_at_several_noises():
    bank, cond, targets = _bank(), _normal(4, C), _targets(4)
    again = {name: rows.repeat_interleave(3, dim=0) for name, rows in targets.items()}
    wanted = bank.losses(again, cond.repeat_interleave(3, dim=0), _generator())
    found = bank.losses(targets, cond, _generator(), draws=3)
    for name in NAMES:
        torch.testing.assert_close(found[name].total, wanted[name].total)


def test_noise_follows_from_the_velocity_as_samplers_read_it():
    bank, clean, noise = _bank(), _normal(3, D), _normal(3, D, seed=1)
    t = torch.tensor([0, 500, TRAIN_STEPS - 1])
    velocity = sampler_named("ddim").get_velocity(clean, noise, t)
    noisy = bank.add_noise(clean, noise, t)
    for quantity, true in (("noise", noise), ("embedding", clean), ("velocity", velocity)):
        found = bank.quantity_from(velocity, noisy, t, quantity)
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


# --- samples ----------------------------------------------------------------------------------


def _passes(bank: PriorBank, guidance: float) -> list[int]:
    """Rows of the priors' forward passes during two steps for three rows."""
    sizes = []
    hook = bank.priors.output_layer.register_forward_hook(
        lambda _m, _i, out: sizes.append(out.shape[1])
    )
    bank.sample(_normal(3, C), 2, guidance, [0, 1, 2])
    hook.remove()
    return sizes


def test_guidance_of_one_costs_one_pass():
    bank = _bank().eval()
    assert _passes(bank, 1.0) == [3, 3]
    assert _passes(bank, 3.0) == [6, 6]


@torch.no_grad()
def test_guidance_is_the_stated_combination():
    bank, x, cond = _bank().eval(), _normal(len(NAMES) * 4, D).view(len(NAMES), 4, D), _normal(4, C)
    t = torch.full((len(NAMES), 1), 30)
    conditions = bank.priors.embed_condition(cond)
    for place, name in enumerate(NAMES):
        prior = own_prior(bank, name)
        given, free = prior(x[place], t[0].expand(4), cond), prior(x[place], t[0].expand(4))
        for guidance in (0.0, 1.0, 3.0):
            expected = free + guidance * (given - free)
            found = bank._guided(x, t, conditions, guidance)[place]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_belongs_to_its_condition_and_seed(sampler, guidance):
    bank, cond, seeds = _bank().eval(), _normal(4, C), [11, 12, 13, 14]
    whole = bank.sample(cond, 4, guidance, seeds, sampler)
    alone = bank.sample(cond[2:3], 4, guidance, seeds[2:3], sampler)
    turned = bank.sample(cond.flip(0), 4, guidance, seeds[::-1], sampler)
    for name in NAMES:
        torch.testing.assert_close(whole[name][2:3], alone[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[name].flip(0), turned[name], rtol=1e-4, atol=1e-4)


def test_several_draws_are_averaged():
    """Their mean moves less with the seed than one draw, and belongs to its row alone."""
    bank, seeds = _bank().eval(), list(range(16))
    cond = _normal(1, C).repeat(len(seeds), 1)
    spread = {}
    for draws in (1, 16):
        made = bank.sample(cond, 4, 1.0, seeds, "ddim", draws)["image"]
        assert made.shape == (len(seeds), D)
        spread[draws] = float(made.std(dim=0).mean())
        alone = bank.sample(cond[:1], 4, 1.0, [5], "ddim", draws)["image"]
        torch.testing.assert_close(alone[0], made[5], rtol=1e-4, atol=1e-4)
    assert 0 < spread[16] < 0.5 * spread[1]


def test_one_row_s_condition_moves_its_own_sample_only():
    bank, cond = _bank().eval(), _normal(4, C)
    before = bank.sample(cond, 4, 1.0, [1, 2, 3, 4])
    cond[1] += 3
    after = bank.sample(cond, 4, 1.0, [1, 2, 3, 4])
    for name in NAMES:
        moved = (after[name] - before[name]).norm(dim=1)
        assert moved[1] > 1e-2
        assert (moved[[0, 2, 3]] < 1e-4).all()


def test_seeds_and_modalities_have_their_own_noise():
    bank = _bank().eval()
    same = _normal(1, C).repeat(2, 1)
    samples = bank.sample(same, 4, 1.0, [1, 2])
    for name in NAMES:
        assert (samples[name][0] - samples[name][1]).norm() > 0.1
    equal = bank.sample(same, 4, 1.0, [7, 7])
    torch.testing.assert_close(equal["image"][0], equal["image"][1])
    units = [bank.standardise(name, samples[name])[0] for name in NAMES]
    assert all((units[0] - unit).norm() > 0.1 for unit in units[1:])


def test_wrong_requests_are_refused():
    bank = _bank().eval()
    with pytest.raises(ValueError, match="3 seeds"):
        bank.sample(_normal(4, C), 2, 1.0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        bank.sample(_normal(4, 1, C), 2, 1.0, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="expected dpm or ddim"):
        bank.sample(_normal(1, C), 2, 1.0, [1], "euler")


# --- a trained bank ----------------------------------------------------------------------------

WIDE, STEPS = 8, 500


def _linear_targets(cond: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each modality a rotation of the condition, deviation 4, around its own mean, +20 or -20."""
    return {
        name: 20.0 * (-1) ** i + 4 * cond @ torch.linalg.qr(_normal(WIDE, WIDE, seed=50 + i))[0]
        for i, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    bank = PriorBank(WIDE, WIDE, dropout=0.0, condition_dropout=0.1, hidden_dim=(128, 64))
    cond, draw = _normal(2048, WIDE), _generator()
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
    cond = _normal(128, WIDE, seed=9)
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
    samples = trained.sample(_normal(64, WIDE, seed=9), 10, 1.0, range(64), sampler)
    for name in NAMES:
        beyond = trained.standardise(name, samples[name]).abs()
        assert 0.2 < (beyond > 1).float().mean() < 0.45  # 0.32 of a normal distribution
        assert beyond.max() > 2
        assert (samples[name].abs() > 1).float().mean() > 0.99


def test_guidance_moves_samples_away_from_the_unconditional(trained):
    cond = _normal(64, WIDE, seed=9)
    free, plain, guided_twice = (
        trained.sample(cond, 10, guidance, range(64)) for guidance in (0.0, 1.0, 2.0)
    )
    for name, target in _linear_targets(cond).items():
        assert abs(_correlation(free[name], target)) < 0.3 < _correlation(plain[name], target)
        spread = [sample[name].std(0).mean() for sample in (plain, guided_twice)]
        assert spread[1] > 1.1 * spread[0]
