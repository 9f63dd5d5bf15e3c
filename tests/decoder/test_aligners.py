"""Aligners: each learns from the EEG embedding, comes back from its file, and draws pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import normal
from conftest import Chain
from torch import nn

import args
import evaluate
import generate
import train
import util
from decoder import aligners, fusion
from decoder.aligners import ALIGNERS, Alignment, aligner_from, new_aligner
from decoder.atms import ATMS, ATMSSizes
from decoder.decoder import Decoder
from loss import prior_loss, prior_total
from modalities import MODALITIES, NAMES, QUANTITIES
from rundirs.files import read_jsonl
from rundirs.tensors import load_tensors, save_tensors
from subject_layers.skip import add_skip
from unet import PriorBank, PriorTask, Sampling, TargetSpace

KINDS = tuple(ALIGNERS)
REGRESSIONS = ("mlp", "none")
D = 6
WIDE = 32
SMALL = {"prior": {"hidden_dim": [64, 32]}, "mlp": {"hidden_dim": 64}, "none": {}}
ONCE = Sampling(steps=5, guidance=1.0, sampler="ddim")
SIGNAL = {"channels": ["Pz"] * 5, "times": list(range(80)), "subjects": ["sub-01"]}


def targets_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same rotation of x for all, deviation 4, around each modality's own mean."""
    turned = 4 * x @ torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=50))[0]
    return {name: 20.0 * (i - 2) + turned for i, name in enumerate(NAMES)}


def untrained(kind: str, learned_weights: bool = False) -> TargetSpace:
    torch.manual_seed(0)
    config = {"kind": kind, "embed_dim": D, "cond_dim": D, "learned_weights": learned_weights}
    aligner = aligner_from(config | SMALL[kind]).eval()
    aligner.fit_targets(targets_of(normal(64, D)))
    return aligner


def sampled(aligner: TargetSpace, cond: torch.Tensor) -> dict[str, torch.Tensor]:
    return aligner.sample(cond, ONCE.steps, ONCE.guidance, range(len(cond)), ONCE.sampler)


# --- the registry -----------------------------------------------------------------------------


def test_the_flags_offer_what_there_is() -> None:
    actions = args.STAGES["train"]().actions()
    assert tuple(actions["aligner"].choices) == KINDS
    assert actions["prior_predicts"].choices == actions["prior_loss"].choices == QUANTITIES


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_flags_of_the_priors_are_refused_beside_other_aligners(kind, capsys) -> None:
    given = ["--data_path", "D", "--clip_feature_path", "F", "--output_dir", "O"]
    for flag in ("--prior_loss", "--prior_predicts"):
        with pytest.raises(SystemExit) as stop:
            args.resolve("train", [*given, "--aligner", kind, flag, "noise"])
        assert stop.value.code == 2
        assert f"{flag} is of --aligner prior" in capsys.readouterr().err


def test_priors_are_compared_on_what_they_predict_unless_told_otherwise() -> None:
    for predicts in QUANTITIES:
        for loss_on in (None, "noise"):
            bank = new_aligner(D, D, Alignment("prior", False, 0.1, predicts, loss_on), seed=0)
            assert (bank.task.predicts, bank.task.loss_on) == (predicts, loss_on or predicts)


def test_an_encoder_of_another_width_needs_an_aligner() -> None:
    how = Alignment("none", False, 0.1, "velocity", None)
    with pytest.raises(util.UserError, match="width"):
        new_aligner(D, D + 1, how, seed=0)
    assert new_aligner(D, D, how, seed=0).kind == "none"


# --- learning ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*REGRESSIONS, "prior"])
def learned(request) -> tuple[nn.Linear, TargetSpace]:
    """An encoder, here one layer, and an aligner, trained together; priors predict embeddings."""
    torch.manual_seed(0)
    plain = {"dropout": 0.0}
    more = {"mlp": plain, "prior": plain | {"predicts": "embedding", "loss_on": "embedding"}}
    config = {"kind": request.param, "embed_dim": D, "cond_dim": D, **SMALL[request.param]}
    aligner, encoder = aligner_from(config | more.get(request.param, {})), nn.Linear(D, D)
    x, draw = normal(1024, D), torch.Generator().manual_seed(0)
    targets = targets_of(x)
    aligner.fit_targets(targets)
    optimiser = torch.optim.Adam([*encoder.parameters(), *aligner.parameters()], 1e-2)
    for _ in range(300):
        rows = torch.randint(len(x), (128,), generator=draw)
        batch = {name: target[rows] for name, target in targets.items()}
        optimiser.zero_grad()
        prior_total(aligner.losses(batch, encoder(x[rows]), draw)).backward()
        optimiser.step()
    return encoder, aligner.eval()


@torch.no_grad()
def test_targets_are_recovered_from_their_own_condition_only(learned) -> None:
    encoder, aligner = learned
    x = normal(128, D, seed=9)
    targets, cond = targets_of(x), encoder(x)
    own, shuffled = sampled(aligner, cond), sampled(aligner, cond.roll(1, 0))
    for name in NAMES:
        truth = aligner.standardise(name, targets[name])
        for found, low, high in ((own, 0.9, 1.0), (shuffled, -0.2, 0.2)):
            unit = aligner.standardise(name, found[name])
            assert low < torch.cosine_similarity(unit, truth).mean() < high
        assert (own[name].mean() - targets[name].mean()).abs() < 0.5, "un-normalised"


@torch.no_grad()
@pytest.mark.parametrize("kind", REGRESSIONS)
def test_a_regression_s_loss_is_that_of_its_standardised_prediction(kind) -> None:
    aligner, cond = untrained(kind), normal(8, D, seed=3)
    targets = targets_of(normal(8, D, seed=4))
    found = aligner.losses(targets, cond, torch.Generator())
    predicted = sampled(aligner, cond)
    for name in NAMES:
        unit = aligner.standardise(name, predicted[name])
        wanted = prior_loss(unit, aligner.standardise(name, targets[name]))
        torch.testing.assert_close(found[name].total, wanted.total, rtol=1e-4, atol=1e-5)
        if kind == "none":
            torch.testing.assert_close(unit, cond, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_each_row_depends_on_its_own_condition(kind) -> None:
    aligner, cond = untrained(kind), normal(4, D).requires_grad_()
    (gradient,) = torch.autograd.grad(aligner.predict(cond)[:, 2].sum(), cond)
    assert gradient[2].abs().min() > 0 and not gradient[[0, 1, 3]].any()


def test_the_heads_are_separate_and_the_trunk_is_shared() -> None:
    mlp, cond = untrained("mlp"), normal(8, D)
    targets = targets_of(normal(8, D, seed=4))
    for place, modality in enumerate(MODALITIES):
        terms = mlp.losses(targets, cond, torch.Generator())[modality.name]
        heads, trunk = torch.autograd.grad(terms.total, [mlp.heads.weight, mlp.trunk[0].weight])
        assert [bool(own.any()) for own in heads] == [i == place for i in range(len(NAMES))]
        assert trunk.any()


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_wrong_shapes_are_refused(kind) -> None:
    aligner = untrained(kind)
    with pytest.raises(ValueError, match="3 seeds"):
        aligner.sample(normal(4, D), 1, 1.0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"image: .* expected \[B, D\]"):
        targets = targets_of(normal(4, D)) | {"image": torch.zeros(1, D)}
        aligner.losses(targets, normal(4, D), torch.Generator())


# --- files ------------------------------------------------------------------------------------


def saved(run: Path, aligner: TargetSpace, **header: object) -> Decoder:
    """A decoder written to ``run``; ``header`` replaces entries of its header."""
    torch.manual_seed(1)
    decoder = Decoder(
        ATMS(5, 80, 1, D, ATMSSizes(width=80)), aligner, SIGNAL, {"model": "M"}
    ).eval()
    decoder.held_out = aligners.held_out_rows(normal(100, D, seed=7))
    path = run / "checkpoints" / "best" / "model.safetensors"
    save_tensors(path, decoder.state_dict(), decoder.header() | header)
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("learned_weights", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_comes_back_with_its_aligner(kind, learned_weights, tmp_path) -> None:
    aligner, cond = untrained(kind, learned_weights), normal(3, D)
    decoder, loaded = saved(tmp_path, aligner), Decoder.load(tmp_path, "best")
    assert type(loaded.bank) is ALIGNERS[kind]
    assert loaded.bank.config == aligner.config
    assert (loaded.bank.log_variance is not None) is learned_weights
    assert loaded.held_out == decoder.held_out
    before, after = sampled(aligner, cond), sampled(loaded.bank, cond)
    assert all(torch.equal(before[name], after[name]) for name in NAMES)


def test_old_headers_mean_priors_and_unknown_ones_are_refused(tmp_path) -> None:
    aligner = untrained("prior")
    old = {key: value for key, value in aligner.config.items() if key != "kind"}
    saved(tmp_path, aligner, bank=old)
    assert isinstance(Decoder.load(tmp_path, "best").bank, PriorBank)
    saved(tmp_path, aligner, bank=old | {"kind": "oracle"})
    with pytest.raises(util.DataError, match="prior, mlp, none"):
        Decoder.load(tmp_path, "best")


# --- variance restoration ---------------------------------------------------------------------


def spread(aligner: TargetSpace, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """[M]: standard deviation over rows of standardised predictions."""
    units = [aligner.standardise(name, rows) for name, rows in found.items()]
    return torch.stack([unit.var(dim=0).mean().sqrt() for unit in units])


def predicted(
    aligner: TargetSpace, cond: torch.Tensor, *, restore: bool, draws: int = 1
) -> dict[str, torch.Tensor]:
    how = Sampling(ONCE.steps, ONCE.guidance, ONCE.sampler, draws, restore)
    held_out = 0.3 * normal(64, D, seed=7)
    return aligners.predict_from_condition(aligner, cond, range(len(cond)), how, 0, held_out)


@pytest.mark.parametrize(("kind", "draws"), [("mlp", 1), ("none", 1), ("prior", 8)])
def test_restored_predictions_spread_like_training_targets(kind, draws) -> None:
    aligner, cond = untrained(kind), 0.3 * normal(256, D, seed=8)
    plain, restored = (
        predicted(aligner, cond, restore=restore, draws=draws) for restore in (False, True)
    )
    assert spread(aligner, plain).max() < 0.6
    assert (spread(aligner, restored) - 1).abs().max() < 0.2
    for name in NAMES:  # about the training mean, by one factor
        a, b = aligner.standardise(name, plain[name]), aligner.standardise(name, restored[name])
        factor = (b / a).median()
        torch.testing.assert_close(b, factor * a, rtol=1e-3, atol=1e-3)


def test_the_factor_is_measured_on_held_out_rows_alone() -> None:
    """Whatever else is predicted beside it, a row comes out the same: no test row is counted."""
    aligner, cond = untrained("mlp"), normal(5, D, seed=8)
    whole = predicted(aligner, cond, restore=True)
    alone = predicted(aligner, cond[:1], restore=True)
    for name in NAMES:
        torch.testing.assert_close(whole[name][:1], alone[name], rtol=1e-4, atol=1e-4)


def test_models_without_held_out_rows_cannot_restore() -> None:
    how = Sampling(1, 1.0, "ddim", restore_variance=True)
    with pytest.raises(util.UserError, match="val_fraction"):
        aligners.predict_from_condition(untrained("mlp"), normal(2, D), [0, 1], how, 0, None)


def test_held_out_rows_are_few_and_from_everywhere() -> None:
    rows = aligners.held_out_rows(torch.arange(1000.0)[:, None])
    assert len(rows) == aligners.HELD_OUT_ROWS and (rows[0], rows[-1]) == ([0.0], [999.0])
    assert aligners.held_out_rows(torch.arange(3.0)[:, None]) == [[0.0], [1.0], [2.0]]


# --- fusion weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_confidence_without_noise_is_the_validated_skill(kind) -> None:
    aligner, cond = untrained(kind), normal(16, D)
    drawn = fusion.repeated_samples(aligner, cond, range(16))
    assert all(rows.shape == (1, 16, D) for rows in drawn.values())
    truth = {name: rows[0] + (i + 1) * normal(16, D, seed=i) for i, (name, rows) in
             enumerate(drawn.items())}  # fmt: skip
    calibration = fusion.calibrate(drawn, truth)
    gains = [
        fusion.gains_for(mode, calibration, aligner, cond, range(16), 0)
        for mode in ("validated", "confidence")
    ]
    torch.testing.assert_close(*gains)
    assert gains[0][0, 0] > gains[0][0, -1] > 0


# --- the stages -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_train_and_generate_with_each_aligner(features: Chain, tmp_path: Path, kind) -> None:
    model, images = tmp_path / "model", tmp_path / "images"
    more = ("--aligner", kind, "--epochs", 1, "--target_mse", 0.1,
            "--contrast_positives", "concept", "--contrast_normalise", "targets")  # fmt: skip
    assert train.main(features.train_flags(model, *more)) == 0
    record = read_jsonl(model / "metrics.jsonl")[-1]
    assert record["target_mse"] > 0 and record["val_target_mse"] > 0
    scores = tmp_path / "scores"
    flags = features.evaluate_flags(scores, "--restore_variance", "--model_path", model)
    assert evaluate.main(flags) == 0
    assert f"own aligner predicts: {kind}" in (scores / "table.md").read_text(encoding="utf-8")
    flags = features.generate_flags(images, "--mode", "fused", "--restore_variance",
                                    "--fusion_weights", "confidence")  # fmt: skip
    assert generate.main([*flags, "--model_path", str(model)]) == 0
    assert len(list(images.glob("*/fused.png"))) == 2
    found, _ = load_tensors(images / "embeddings.safetensors")
    aligner = Decoder.load(model, "best").bank
    units = torch.stack([aligner.standardise(name, found[name]) for name in NAMES])
    assert (units[:, 0] - units[:, 1]).norm(dim=1).min() > 1e-3, "rows differ"
    stretched = units / units.norm(dim=2, keepdim=True)
    apart = (stretched[0] - stretched[1:]).norm(dim=2).min()
    assert apart < 1e-3 if kind == "none" else apart > 1e-2


# --- the encoder's output as a start ----------------------------------------------------------


def drawn_near(cond: torch.Tensor, gains: list[float]) -> dict[str, torch.Tensor]:
    """Targets that are a gain times the condition and noise, of unit variance."""
    return {
        name: gain * cond + (1 - gain**2) ** 0.5 * normal(len(cond), WIDE, seed=10 + i)
        for i, (name, gain) in enumerate(zip(NAMES, gains, strict=True))
    }


def fitted(kind: str, skip: bool, cond, targets, steps: int) -> aligners.TargetSpace:
    torch.manual_seed(0)
    config = {"kind": kind, "embed_dim": WIDE, "cond_dim": WIDE, "learned_weights": False}
    aligner = aligner_from(config | SMALL[kind] | {"skip": skip})
    aligner.fit_targets(targets)
    optimizer = torch.optim.Adam(aligner.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        terms = aligner.losses(targets, cond, generator, 2)
        optimizer.zero_grad()
        sum(of.total for of in terms.values()).backward()
        optimizer.step()
    return aligner.eval()


def agreement_with(aligner, cond, targets) -> float:
    made = aligner.sample(cond, 10, 1.0, range(len(cond)), draws=4)
    unit = [(aligner.standardise(n, made[n]), aligner.standardise(n, targets[n])) for n in NAMES]
    return float(torch.stack([torch.cosine_similarity(*pair).mean() for pair in unit]).mean())


@pytest.mark.parametrize("kind", ["prior", "mlp"])
def test_a_skip_decodes_unseen_pictures_from_a_few_pairs(kind) -> None:
    """What the encoder knows already needs no data."""
    gains = [0.9, 0.8, 0.7, 0.6, 0.5]
    cond, unseen = normal(40, WIDE, seed=1), normal(200, WIDE, seed=2)
    seen, truth = drawn_near(cond, gains), drawn_near(unseen, gains)
    found = {
        skip: agreement_with(fitted(kind, skip, cond, seen, 150), unseen, truth)
        for skip in (False, True)
    }
    assert found[True] > found[False] + 0.1 and found[True] > 0.4


@pytest.mark.parametrize("kind", ["prior", "mlp"])
def test_gains_are_fitted_modality_by_modality(kind) -> None:
    gains = [0.9, 0.0, 0.7, -0.6, 0.3]
    cond = normal(400, WIDE, seed=1)
    aligner = fitted(kind, True, cond, drawn_near(cond, gains), 3)
    assert aligner.skip.gain.tolist() == pytest.approx(gains, abs=0.05)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_skip_is_the_posterior_mean_about_the_estimate(quantity) -> None:
    """At pure noise the estimate itself; without noise nothing, whatever the networks predict."""
    bank = PriorBank(WIDE, WIDE, PriorTask(predicts=quantity, loss_on=quantity, skip=True)).eval()
    noisy, estimate = normal(len(NAMES), 3, WIDE, seed=1), normal(len(NAMES), 3, WIDE, seed=2)
    t = torch.tensor([1, 400, 999]).expand(len(NAMES), -1)
    kept, lost = bank._shares(t, noisy)
    plain = {"velocity": 0 * noisy, "embedding": kept * noisy, "noise": lost * noisy}[quantity]
    output = add_skip(plain, estimate, (kept, lost), quantity)
    clean = bank.quantity_from(bank.velocity_from(output, noisy, t), noisy, t, "embedding")
    wanted = kept * noisy + lost**2 * estimate
    torch.testing.assert_close(clean, wanted, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("kind", ["prior", "mlp"])
def test_a_skip_is_kept_in_the_config_and_left_out_where_widths_differ(kind) -> None:
    how = Alignment(kind, False, 0.1, "velocity", None, skip=True)
    made = new_aligner(WIDE, WIDE, how, seed=0)
    again = aligner_from(made.config)
    again.load_state_dict(made.state_dict())
    assert again.skip is not None
    assert new_aligner(WIDE, WIDE + 1, how, seed=0).skip is None
    old = {name: value for name, value in made.config.items() if name != "skip"}
    assert aligner_from(old).skip is None, "a model from before"
