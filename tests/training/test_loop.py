"""The training loop's options: schedules, groups, precision, dropout, what it tells."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import builders
import helpers_training
import pytest
import torch
from helpers_training import (
    COMPUTING,
    MASKING,
    SCHEDULE,
    Linear,
    Regression,
    fit_linear,
    training_data,
)  # fmt: skip

import util
from rundirs.directory import RunDirectory
from rundirs.files import read_jsonl
from subject_layers.dropout import Dropout
from training import loop, monitor, optimisation
from training.checkpoints import Checkpoints
from training.optimisation import Schedule
from training.processes import Processes
from training.settings import Computing, Procedure


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return builders.write_world(tmp_path_factory.mktemp("engine") / "DATA")


# --- learning rates -----------------------------------------------------------------------------


def test_the_cosine_schedule_warms_up_and_ends_at_nothing():
    schedule = Schedule(**SCHEDULE | {"schedule": "cosine", "warmup_steps": 10})
    shares = [schedule.share(step, 110) for step in range(110)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1 and shares[60] == pytest.approx(0.5) and shares[-1] < 1e-3
    assert shares[10:] == sorted(shares[10:], reverse=True)
    constant = Schedule(**SCHEDULE | {"warmup_steps": 10})
    assert {constant.share(step, 110) for step in range(10, 110)} == {1.0}


def test_the_encoder_may_learn_at_its_own_rate(world):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    model = Linear(training_data(world))
    before = {name: value.clone() for name, value in model.named_parameters()}
    schedule = Schedule(**SCHEDULE | {"lr_eeg": 1e-4, "weight_decay": 0.0})
    optimizer = optimisation.new_optimizer(model, schedule)
    optimisation.set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        wanted = 0.5 * (1e-4 if name.startswith("encoder") else SCHEDULE["learning_rate"])
        torch.testing.assert_close(before[name] - value, torch.full_like(value, wanted),
                                   rtol=1e-2, atol=1e-6)  # fmt: skip


def test_what_is_frozen_is_left_out_and_nothing_decays_then(world):
    model = Linear(training_data(world))
    model.encoder.requires_grad_(False)  # by its own choice, as pre-trained weights are
    (group,) = optimisation.new_optimizer(model, Schedule(**SCHEDULE)).param_groups
    assert group["weight_decay"] == SCHEDULE["weight_decay"] > 0
    model.adapted = "subject_layers"
    (group,) = optimisation.new_optimizer(model, Schedule(**SCHEDULE)).param_groups
    assert group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(p) for p in model.head.parameters()]


# --- one run ------------------------------------------------------------------------------------


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("precision", "kind", "wanted"),
    [("float32", "cuda", "high"), ("bfloat16", "cuda", "high"),
     ("float32-strict", "cuda", "highest"), ("float32", "cpu", "highest")],
)  # fmt: skip
def test_float32_is_rounded_on_a_gpu_unless_it_must_not_be(precision, kind, wanted):
    assert loop.rounding(precision, torch.device(kind)) == wanted
    torch.set_float32_matmul_precision(wanted)  # PyTorch knows the word
    torch.set_float32_matmul_precision("highest")


def test_strict_float32_is_float32_on_a_cpu(world, tmp_path):
    models = [
        fit_linear(world, tmp_path / precision, epochs=1, precision=precision)
        for precision in ("float32", "float32-strict")
    ]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("precision", "apart"), [("bfloat16", 0.05), ("float16", 0.1)])
def test_lower_precision_learns_about_the_same(world, tmp_path, precision, apart):
    """Weights stay float32; float16 finds its scale of the loss by skipping steps at first."""
    fit_linear(world, tmp_path / "full", epochs=6)
    model = fit_linear(world, tmp_path / "low", epochs=6, precision=precision)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    full, low = losses_of(tmp_path / "full"), losses_of(tmp_path / "low")
    assert low != full and low == pytest.approx(full, rel=apart)
    _, _, state = Checkpoints(tmp_path / "low" / "checkpoints").load()
    assert bool(state["scaler"]) == (precision == "float16")


def test_a_compiled_run_computes_the_same(world, tmp_path, monkeypatch):
    """Compiled by dynamo with the eager backend: no compiler is needed for that."""
    compiled, compile_module = [], torch.nn.Module.compile

    def eagerly(self, *rest):
        compiled.append(self)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    fit_linear(world, tmp_path / "plain", epochs=2)
    fit_linear(world, tmp_path / "compiled", epochs=2, compile=True)
    assert len(compiled) == 1
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"))
    torch._dynamo.reset()


@pytest.mark.parametrize("trials", ["average", "random", "single"])
def test_eeg_held_on_the_device_gives_the_same_batches(world, trials):
    data = training_data(world, trials=trials, channels=["Pz", "Cz"])
    held = data.held_on(torch.device("cpu"))
    assert held.held_bytes == sum(eeg.numel() * 4 for eeg in held.held)
    for one, two in zip(data.batches(1, 4), held.batches(1, 4), strict=True):
        torch.testing.assert_close(one.eeg, two.eeg)
        assert torch.equal(one.stimulus, two.stimulus)


def test_parts_of_batches_are_the_batches(world):
    data = training_data(world, subjects=["sub-01"])
    whole = list(data.batches(0, 4))
    halves = [list(data.batches(0, 4, part=util.Part(index, 2))) for index in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.eeg, torch.cat([part.eeg for part in parts]))
    with pytest.raises(ValueError, match="equally"):
        next(data.batches(0, 4, part=util.Part(0, 3)))


# --- what it tells ------------------------------------------------------------------------------


class Stuck(Regression):
    """Nothing is learned: the loss has no gradient that moves anything."""

    def losses(self, batch, generator, part=util.WHOLE):
        loss = super().losses(batch, generator, part)["loss"]
        return {"loss": 0 * loss + 3.0}


@pytest.mark.parametrize(("kind", "verdict"), [(Regression, " falls"), (Stuck, "DOES NOT FALL")])
def test_the_first_minute_says_whether_anything_is_learned(
    world, tmp_path, caplog, monkeypatch, kind, verdict
):
    monkeypatch.setattr(monitor, "SANITY_STEPS", 8)
    monkeypatch.setattr(util.LOG, "propagate", True)
    data = training_data(world)
    model = Linear(data)
    run = RunDirectory(tmp_path / "run", "train")
    run.path.mkdir()
    with caplog.at_level(logging.INFO, util.LOG.name):
        loop.fit(
            run, model, kind(model, data), data,
            Procedure(Schedule(**SCHEDULE), Computing(**COMPUTING), MASKING),
            Processes(0, 1, torch.device("cpu")),
        )  # fmt: skip
    # a set: another test may have left a second listener
    (line,) = {text for text in caplog.messages if text.startswith("sanity")}
    assert "after 8 steps" in line and verdict in line


def test_looking_at_the_first_batch_changes_nothing(world, tmp_path, monkeypatch):
    fit_linear(world, tmp_path / "looked")
    monkeypatch.setattr(monitor, "Sanity", lambda *_: None)
    fit_linear(world, tmp_path / "not")
    assert losses_of(tmp_path / "looked") == losses_of(tmp_path / "not")


def test_losses_are_read_rarely_but_none_is_lost():
    rare, often = monitor.Ledger(16), monitor.Ledger(1)
    for step in range(40):
        for ledger in (rare, often):
            ledger.add(step, {"loss": torch.tensor(0.1 * step)}, torch.tensor(1.0))
    rare.read()
    assert rare.sums == often.sums and rare.last == often.last
    rare.add(40, {"loss": torch.tensor(float("nan"))}, torch.tensor(1.0))
    with pytest.raises(util.DataError, match="step 40"):
        rare.read()


def test_a_tracker_that_is_not_there_is_told(world, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(util.UserError, match="pip install trackio"):
        fit_linear(world, tmp_path / "run", report_to="trackio")


def test_a_tracker_hears_every_epoch(world, tmp_path, monkeypatch):
    """A module with the three functions that wandb and trackio share."""
    import sys
    import types

    heard = []
    tracker = types.SimpleNamespace(
        init=lambda **given: heard.append(given["name"]),
        log=lambda record, step: heard.append((step, record["loss"])),
        finish=lambda: heard.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    fit_linear(world, tmp_path / "run", report_to="trackio")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert heard == ["run", *((item["step"], item["loss"]) for item in records), "finished"]


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)  # not a multiple of the lots drawn at once
    y = Dropout(p)(x)
    y.sum().backward()
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.002)
    assert float(y.detach().mean()) == pytest.approx(1, abs=0.004)
    assert torch.equal(x.grad, y.detach()), "the gradient passes where the value did"
    rows, columns = (y.detach() == 0).float().mean(1), (y.detach() == 0).float().mean(0)
    for shares in (rows, columns):  # no stripes
        assert float((shares - p).abs().max()) < 0.08


def test_dropout_is_seeded_and_only_for_training():
    x, layer = torch.randn(50, 50), Dropout(0.3)
    torch.manual_seed(1)
    one = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), one) and not torch.equal(layer(x), one)
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()


def test_dataclasses_take_their_flags():
    import args

    words = ["--data_path", "D", "--clip_feature_path", "F", "--output_dir", "O"]
    schedule = args.resolve("train", words).settings(Schedule)
    assert schedule == replace(schedule, learning_rate=1e-4, schedule="constant", lr_eeg=None)


# --- an end that validation finds ---------------------------------------------------------------


class Scripted(Regression):
    """``select`` as written down, epoch by epoch, whatever is learned."""

    scores = (1.0, 3.0, 2.0, 4.0, 3.5, 3.9, 4.0, 5.0, 6.0)

    def __init__(self, model, data) -> None:
        super().__init__(model, data)
        self.told = 0

    def validate(self) -> dict[str, float]:
        self.told += 1
        return {"select": self.scores[self.told - 1]}


@pytest.mark.parametrize(("patience", "epochs", "best"), [(1, 3, 2), (2, 6, 4), (3, 7, 4)])
def test_training_ends_when_validation_gets_no_better(
    world, tmp_path, monkeypatch, patience, epochs, best
):
    monkeypatch.setattr(helpers_training, "Regression", Scripted)
    fit_linear(world, tmp_path / "run", epochs="auto", patience=patience)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, epochs + 1))
    steps = records[0]["step"]
    folders = {name: (tmp_path / "run" / "checkpoints" / name).resolve().name
               for name in ("best", "latest")}  # fmt: skip
    assert folders["best"].endswith(f"{best * steps:08d}")
    assert folders["latest"].endswith(f"{epochs * steps:08d}")
    before = sorted((tmp_path / "run").rglob("*"))
    fit_linear(world, tmp_path / "run", epochs="auto", patience=patience)
    assert sorted((tmp_path / "run").rglob("*")) == before, "a second call does nothing"


def test_it_ends_at_the_same_epoch_however_often_it_was_stopped(world, tmp_path):
    whole = fit_linear(world, tmp_path / "whole", epochs="auto", patience=2)
    for _ in range(60):
        try:
            resumed = fit_linear(
                world, tmp_path / "parts", epochs="auto", patience=2, epochs_per_call=1
            )
            break
        except util.Preempted:
            continue
    one, other = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [r["epoch"] for r in one] == [r["epoch"] for r in other]
    assert 2 < len(one) < 60
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_kill_between_the_last_epoch_and_the_end_trains_no_more(world, tmp_path):
    fit_linear(world, tmp_path / "run", epochs="auto", patience=2)
    before = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run" / "DONE").unlink()
    fit_linear(world, tmp_path / "run", epochs="auto", patience=2)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == before
    assert (tmp_path / "run" / "DONE").exists()
