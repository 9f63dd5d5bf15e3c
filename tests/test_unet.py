"""The diffusion priors: the published numbers, rows that stay apart, conditions that count."""

from __future__ import annotations

import pytest
import torch
from helpers_golden import assert_golden, golden_input, golden_state, prior_shapes
from helpers_priors import (
    C,
    D,
    drawn_from,
    far_targets,
    normal,
    own_prior,
    small_bank,
    small_prior,
)  # fmt: skip

import unet
from decoder.aligners import aligner_from
from loss import LossTerms, prior_loss, prior_total
from modalities import MODALITIES, NAMES, QUANTITIES
from subject_layers import stacked
from subject_layers.schedule import TRAIN_STEPS, sampler_named
from subject_layers.timesteps import distinct_timesteps
from unet import DiffusionPriorUNet, PriorBank


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
        keep = torch.rand(len(clean), generator=generator) >= bank.task.condition_dropout
        kept = bank.alphas_cumprod[t][:, None].to(clean.dtype)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        losses[name] = prior_loss(prior(noisy, t, cond, keep), velocity)
    return losses


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
    prior, x, t, cond = small_prior(), normal(3, D), torch.tensor([0, 500, 999]), normal(3, C)
    without = prior(x, t)
    torch.testing.assert_close(prior(x, t, cond, torch.zeros(3, dtype=torch.bool)), without)
    assert (prior(x, t, torch.zeros(3, C)) - without).norm() > 0.01  # the biases
    for layer in (*prior.encode_cond_embedding, *prior.decode_cond_embedding):
        layer.weight.zero_()
        layer.bias.zero_()
    torch.testing.assert_close(prior(x, t, cond), without)


@torch.no_grad()
def test_keep_cond_is_per_row():
    prior, x, t, cond = small_prior(), normal(3, D), torch.tensor([1, 2, 3]), normal(3, C)
    mixed = prior(x, t, cond, torch.tensor([True, False, True]))
    torch.testing.assert_close(mixed[[0, 2]], prior(x, t, cond)[[0, 2]])
    torch.testing.assert_close(mixed[1], prior(x, t)[1])
    assert (prior(x, t, cond)[1] - prior(x, t)[1]).norm() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_each_row_depends_on_its_own_inputs(argument):
    """The first implementation trained every sample against every condition of the batch."""
    prior = small_prior()
    inputs = [normal(4, D), torch.tensor([0, 300, 600, 999]), normal(4, C)]
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
        small_prior()(torch.zeros(x), torch.zeros(t, dtype=torch.int64), torch.zeros(cond))


# --- targets ----------------------------------------------------------------------------------


def test_targets_are_standardised_and_restored():
    bank, targets = small_bank(), far_targets(64)
    for name in NAMES:
        unit = bank.standardise(name, targets[name])
        torch.testing.assert_close(unit.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
        torch.testing.assert_close(unit.std(0), torch.ones(D))
        torch.testing.assert_close(bank.restore(name, unit), targets[name])


def test_statistics_belong_to_the_modality_and_travel_with_the_model():
    bank = small_bank()
    features = {name: 10 * i + (i + 1) * normal(50, D) for i, name in enumerate(NAMES)}
    bank.fit_targets(features)
    copy = aligner_from(bank.config)
    copy.load_state_dict(bank.state_dict())
    for name in NAMES:
        torch.testing.assert_close(getattr(copy, f"{name}_mean"), features[name].mean(0))
        torch.testing.assert_close(getattr(copy, f"{name}_std"), features[name].std(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_modality_that_never_varies_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*dead"):
        small_bank().fit_targets(far_targets(8) | {name: torch.full((8, D), 0.3)})


def test_a_dimension_that_never_varies_is_not_blown_up():
    bank, targets = small_bank(), far_targets(64)
    targets["image"][:, 2] = 0.3
    bank.fit_targets(targets)
    assert bank.standardise("image", targets["image"]).abs().max() < 10


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"text: .* expected \[N, 6\]"):
        small_bank().fit_targets(far_targets(8) | {"text": torch.randn(8, D + 1)})


# --- five as one ------------------------------------------------------------------------------


def test_the_state_dict_is_that_of_five_priors():
    state = small_bank().state_dict()
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
    state = small_bank().state_dict()
    del state["priors.text.output_layer.weight"]
    with pytest.raises(RuntimeError, match=r"output_layer\.weight"):
        PriorBank(D, C).load_state_dict(state)


@pytest.mark.parametrize(("draws", "many"), [(1, unet.MANY_TIMESTEPS), (3, 24), (40, 1)])
def test_the_bank_equals_five_networks_in_turn(draws, many, monkeypatch):
    """Losses and gradients, in float64, to 1e-6: what makes it fast changes no number."""
    monkeypatch.setattr(unet, "MANY_TIMESTEPS", many)
    bank = small_bank(condition_dropout=0.3).double()
    priors = {name: own_prior(bank, name) for name in NAMES}
    targets = {name: rows.double() for name, rows in far_targets(8).items()}
    conds = [normal(8, C).double().requires_grad_() for _ in range(2)]
    ours = bank.losses(targets, conds[0], drawn_from(), draws)
    oracle = five_losses(bank, priors, targets, conds[1], drawn_from(), draws)
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
    distinct, place = distinct_timesteps(t)
    assert distinct.tolist() == [[3, 7, 0], [1, 2, 4]]
    assert torch.equal(distinct.flatten()[place], t)
    one, where = distinct_timesteps(t[1])
    assert torch.equal(one[where], t[1])


def test_the_batched_product_of_gpus_equals_the_one_of_cpus():
    """On the meta device there are shapes only; the numbers are compared by its formulas."""
    x, weight, bias = normal(5, 4, 3), normal(5, 2, 3, seed=1), normal(5, 2, seed=2)
    parts = [part.double().requires_grad_() for part in (x, weight, bias)]
    ours = stacked._Products.apply(*parts)
    gradient = normal(5, 4, 2, seed=3).double()
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
    bank, cond, targets = small_bank(), normal(8, C), far_targets(8)
    full = bank.losses(targets, cond, drawn_from())
    seen = []
    hook = bank.priors.output_layer.register_forward_hook(
        lambda _m, _i, out: seen.append(out.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bank.losses(targets, cond, drawn_from())
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
        small_bank(predicts=predicts, loss_on=loss_on).double(),
        normal(4, C),
        far_targets(4),
    )
    clean = bank.standardised(targets, cond)
    perfect = {}

    def answer(noisy, t, _cond, _keep):
        kept, lost = bank._shares(t, noisy)
        noise = (noisy - kept * clean) / lost
        perfect.update(noise=noise, embedding=clean, velocity=kept * noise - lost * clean)
        return perfect[predicts]

    monkeypatch.setattr(bank.priors, "forward", answer)
    for name, terms in bank.losses(targets, cond.double(), drawn_from()).items():
        assert terms.mse < 1e-12 and terms.cosine > 1 - 1e-9, name


# --- losses -----------------------------------------------------------------------------------


def _condition_gradient(bank: PriorBank, name: str, cond: torch.Tensor) -> torch.Tensor:
    cond = cond.clone().requires_grad_()
    losses = bank.losses(far_targets(len(cond)), cond, drawn_from())
    return torch.autograd.grad(losses[name].total, cond)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_condition_learns_from_each_prior(name):
    gradient = _condition_gradient(small_bank(), name, normal(4, C))
    assert (gradient.abs().sum(1) > 1e-7).all()


@pytest.mark.parametrize("name", NAMES)
def test_losses_keep_rows_apart(name):
    """The gradient of a row's condition does not know the other rows' conditions."""
    bank, cond = small_bank(), normal(4, C)
    before = _condition_gradient(bank, name, cond)
    cond[2] += 3
    after = _condition_gradient(bank, name, cond)
    torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]], rtol=1e-4, atol=1e-8)
    assert not torch.allclose(after[2], before[2], rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_targets_reach_their_own_loss_only(name):
    bank, cond, targets = small_bank(), normal(4, C), far_targets(4)
    before = bank.losses(targets, cond, drawn_from())
    after = bank.losses(targets | {name: targets[name] + 2}, cond, drawn_from())
    changed = {other for other in NAMES if before[other].total != after[other].total}
    assert changed == {name}


def test_every_prior_trains_with_its_registry_weight():
    bank, cond, targets = small_bank(), normal(8, C), far_targets(8)
    prior_total(bank.losses(targets, cond, drawn_from())).backward()
    joint = {key: value.grad for key, value in bank.named_parameters()}
    assert [key for key, gradient in joint.items() if gradient is None or not gradient.any()] == []
    alone = bank.losses(targets, cond, drawn_from())
    for modality in MODALITIES:
        place, weight = NAMES.index(modality.name), bank.priors.output_layer.weight
        own = torch.autograd.grad(alone[modality.name].total, weight, retain_graph=True)[0]
        torch.testing.assert_close(weight.grad[place], modality.loss_weight * own[place])
        assert not own[torch.arange(len(NAMES)) != place].any(), "it moves its own prior only"


def test_losses_are_drawn_from_the_generator():
    bank, cond, targets = small_bank(condition_dropout=0.5), normal(4, C), far_targets(4)
    first, same, other = (bank.losses(targets, cond, drawn_from(seed)) for seed in (0, 0, 1))
    for name in NAMES:
        assert torch.equal(first[name].total, same[name].total)
        assert first[name].total != other[name].total


@pytest.mark.parametrize(
    ("probability", "dropped"), [(0.0, (0, 0)), (0.5, (70, 130)), (1.0, (200, 200))]
)
def test_conditions_are_dropped_per_sample(probability, dropped):
    gradient = _condition_gradient(
        small_bank(condition_dropout=probability), "image", normal(200, C)
    )
    without = int((gradient.abs().sum(1) == 0).sum())
    assert dropped[0] <= without <= dropped[1]


@pytest.mark.parametrize("shape", [(4, 1, D), (3, D), (1, D)])
def test_targets_that_would_broadcast_are_refused(shape):
    targets = far_targets(4) | {"image": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"image: .* expected \[B, D\]"):
        small_bank().losses(targets, normal(4, C), drawn_from())


def test_noise_is_added_by_the_ddpm_schedule():
    bank, clean, noise = small_bank(), normal(3, D), normal(3, D, seed=1)
    noisy = bank.add_noise(clean, noise, torch.tensor([0, 500, TRAIN_STEPS - 1]))
    reference = sampler_named("ddim").add_noise(clean, noise, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(noisy, reference)
    assert (noisy[0] - clean[0]).norm() < 0.1 and (noisy[2] - noise[2]).norm() < 0.1


def test_losses_compare_the_velocity_or_the_noise_as_published():
    """On noise a row's squared error is a_t times that on velocity, hence the smaller loss here."""
    cond, targets = normal(64, C), far_targets(64)
    found = {
        kind: small_bank(loss_on=kind).losses(targets, cond, drawn_from())
        for kind in ("velocity", "noise")
    }
    bank, generator = small_bank(), drawn_from()
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
    bank, cond, targets = small_bank(), normal(4, C), far_targets(4)
    again = {name: rows.repeat_interleave(3, dim=0) for name, rows in targets.items()}
    wanted = bank.losses(again, cond.repeat_interleave(3, dim=0), drawn_from())
    found = bank.losses(targets, cond, drawn_from(), draws=3)
    for name in NAMES:
        torch.testing.assert_close(found[name].total, wanted[name].total)


def test_noise_follows_from_the_velocity_as_samplers_read_it():
    bank, clean, noise = small_bank(), normal(3, D), normal(3, D, seed=1)
    t = torch.tensor([0, 500, TRAIN_STEPS - 1])
    velocity = sampler_named("ddim").get_velocity(clean, noise, t)
    noisy = bank.add_noise(clean, noise, t)
    for quantity, true in (("noise", noise), ("embedding", clean), ("velocity", velocity)):
        found = bank.quantity_from(velocity, noisy, t, quantity)
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
