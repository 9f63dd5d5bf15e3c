"""Fusion weights follow what decodes; learned loss weights learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain

import generate
import loss
import train
from decoder import fusion
from decoder.aligners import aligner_from
from decoder.decoder import Decoder
from generation.renderer import Renderer
from modalities import MODALITIES, NAMES
from rundirs.files import read_json
from rundirs.tensors import load_tensors, save_tensors

K, N, D = fusion.SAMPLES, 64, 32


def samples_of(truth: torch.Tensor, noise: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """[K, N, D]: truth plus per-stimulus noise of the given size [N]."""
    generator = torch.Generator().manual_seed(seed)
    return truth + noise[:, None] * torch.randn(K, *truth.shape, generator=generator)


def test_agreement_is_the_mean_cosine_of_pairs() -> None:
    drawn = torch.randn(5, 3, D, generator=torch.Generator().manual_seed(0))
    for row in range(3):
        pairs = [
            float(torch.cosine_similarity(drawn[i, row], drawn[j, row], dim=0))
            for i in range(5)
            for j in range(i)
        ]
        assert float(fusion.agreement(drawn)[row]) == pytest.approx(sum(pairs) / 10, abs=1e-5)
    assert fusion.agreement(drawn[:1].expand(5, -1, -1)).tolist() == pytest.approx([1.0] * 3)


def test_confidence_follows_agreement_where_agreement_tells_skill() -> None:
    truth = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    noise = torch.linspace(0.1, 8, N)
    drawn = {name: samples_of(truth, noise) for name in NAMES}
    calibration = fusion.calibrate(drawn, dict.fromkeys(NAMES, truth))
    gains = fusion.confident_gains(calibration, drawn)
    assert gains.shape == (N, len(NAMES))
    assert gains[:8].min() > gains[-8:].max()


def test_where_agreement_misleads_the_line_is_flat() -> None:
    truth = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    wrong = torch.randn(1, N, D, generator=torch.Generator().manual_seed(2)).expand(K, -1, -1)
    certain = torch.arange(N) < N // 2  # of something false
    drawn = torch.where(certain[:, None], wrong, samples_of(truth, torch.full((N,), 3.0)))
    calibration = fusion.calibrate({"image": drawn}, {"image": truth})["image"]
    assert calibration["slope"] == 0
    assert calibration["intercept"] == calibration["skill"]


def test_validated_gains_rank_modalities_by_skill() -> None:
    truth = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    drawn = {
        name: samples_of(truth, torch.full((N,), float(1 + 4 * i))) for i, name in enumerate(NAMES)
    }
    gains = fusion.validated_gains(fusion.calibrate(drawn, dict.fromkeys(NAMES, truth)))
    assert gains.tolist() == sorted(gains.tolist(), reverse=True)
    assert gains[0] > 2 * gains[-1] > 0


def test_training_leaves_a_calibration_in_the_checkpoint(chain: Chain) -> None:
    calibration = Decoder.load(chain.model, "best").calibration
    assert calibration is not None and set(calibration) == set(NAMES)
    assert all(-1 <= of["skill"] <= 1 and of["slope"] >= 0 for of in calibration.values())


@pytest.fixture(scope="module")
def calibrated(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the calibration of one that learned something."""
    file = Path("checkpoints") / "best" / "model.safetensors"
    tensors, header = load_tensors(chain.model / file)
    header["calibration"] = {
        name: {"skill": 0.2 + 0.1 * i, "slope": 1.0, "intercept": 0.1 * i}
        for i, name in enumerate(NAMES)
    }
    run = tmp_path_factory.mktemp("calibrated")
    save_tensors(run / file, tensors, header)
    return run


def drawn_scales(
    chain: Chain, model: Path, run: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Scales [tasks, M, L] of the fused pictures of two stimuli, without drawing them."""
    seen = []

    def note(self, tasks, *_) -> None:
        seen.extend(task.scales for task in tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Renderer, "draw", note)
    more = ("--mode", "fused", "--fusion_weights", kind, "--model_path", str(model))
    flags = chain.generate_flags(run, *more)
    with pytest.raises(KeyboardInterrupt):
        generate.main.__wrapped__(flags)
    return torch.stack(seen)


def test_every_kind_keeps_the_total_and_shares_it_differently(
    chain: Chain, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("fixed", "validated", "confidence")
    scales = {
        kind: drawn_scales(chain, calibrated, tmp_path / kind, kind, monkeypatch) for kind in kinds
    }
    for kind in kinds:
        total = scales[kind].sum(dim=1)
        assert torch.allclose(total, torch.ones_like(total)), kind
    assert not torch.allclose(scales["fixed"], scales["validated"], atol=1e-3)
    assert torch.equal(scales["validated"][0], scales["validated"][1])
    assert not torch.equal(scales["confidence"][0], scales["confidence"][1])


def test_without_held_out_concepts_only_fixed_weights(chain: Chain, tmp_path, capsys) -> None:
    model = tmp_path / "model"
    assert train.main(chain.train_flags(model, "--val_fraction", 0, "--epochs", 1)) == 0
    flags = ("--mode", "fused", "--fusion_weights", "validated", "--model_path", str(model))
    assert generate.main(chain.generate_flags(tmp_path / "run", *flags)) == 2
    assert "--val_fraction" in capsys.readouterr().err


def terms(values: list[float]) -> dict[str, loss.LossTerms]:
    made = {}
    for name, value in zip(NAMES, values, strict=True):
        made[name] = loss.LossTerms(*(torch.tensor(value) for _ in range(3)))
    return made


def test_learned_weights_start_even_and_turn_away_from_noise() -> None:
    log_variance = torch.zeros(len(NAMES), requires_grad=True)
    values = [0.2, 0.5, 1.0, 2.0, 4.0]
    total = loss.prior_total(terms(values), log_variance)
    assert total.item() == pytest.approx(sum(values) / 5)
    for _ in range(2000):
        total = loss.prior_total(terms(values), log_variance)
        (gradient,) = torch.autograd.grad(total, log_variance)
        log_variance = (log_variance - 0.5 * gradient).detach().requires_grad_(True)
    assert log_variance.exp().tolist() == pytest.approx(values, rel=1e-2)  # the optimum
    fixed = sum(item.loss_weight * value for item, value in zip(MODALITIES, values, strict=True))
    assert float(loss.prior_total(terms(values))) == pytest.approx(fixed)


def test_uncertainty_weights_are_trained_and_saved(chain: Chain, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert train.main(chain.train_flags(model, "--loss_weights", "uncertainty")) == 0
    bank = Decoder.load(model, "latest").bank
    assert bank.log_variance.abs().min() > 0
    assert Decoder.load(chain.model, "latest").bank.log_variance is None
    assert read_json(model / "options.json")["options"]["loss_weights"] == "uncertainty"
    assert aligner_from(bank.config).log_variance is not None
