"""Joint training: resume to the bit, preemption, gradients from all five, honest selection."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import builders
import pytest
import torch
from conftest import Chain

import ATMS_retrieval
import train
import util
from datafiles.stimuli import list_stimuli
from dataset import DataChoice, open_training
from decoder.aligners import Alignment
from decoder.decoder import Decoder
from loss import Contrast, contrastive_total
from modalities import NAMES
from rundirs.files import read_jsonl
from rundirs.tensors import load_tensors
from training import loop
from training.checkpoints import Checkpoints
from training.starting import new_decoder

# dropout, masks, trial subsets and EMA: everything that draws or remembers
EVERYTHING = (
    "--epochs",
    4,
    "--ema_decay",
    0.9,
    "--mask_channel",
    0.1,
    "--mask_time",
    0.1,
    "--mask_patch",
    0.1,
)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint: saved model, raw weights, optimizer."""
    model, _, state = Checkpoints(run / "checkpoints").load()
    moments = {
        f"adam.{index}.{name}": value
        for index, entry in state["optimizer"]["state"].items()
        for name, value in entry.items()
    }
    return model | {f"raw.{name}": value for name, value in state["raw"].items()} | moments


def assert_same_run(a: Path, b: Path) -> None:
    one, two = state_of(a), state_of(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    records = [
        [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in read_jsonl(run / "metrics.jsonl")
        ]
        for run in (a, b)
    ]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def uninterrupted(features: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(features.train_flags(out, *EVERYTHING)) == 0
    return out


def test_two_epochs_and_two_more_equal_four(
    features: Chain, uninterrupted: Path, tmp_path: Path
) -> None:
    command = features.train_flags(tmp_path / "run", *EVERYTHING, "--epochs_per_call", 2)
    assert train.main(command) == util.PREEMPTED
    assert not (tmp_path / "run" / "DONE").exists()
    assert train.main(command) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_signal_in_the_middle_of_an_epoch_loses_nothing(
    features: Chain, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop._Training.update

    def warned(self: loop._Training, *inputs: object) -> None:
        update(self, *inputs)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    command = features.train_flags(tmp_path / "run", *EVERYTHING)
    monkeypatch.setattr(loop._Training, "update", warned)
    assert train.main(command) == util.PREEMPTED
    assert Checkpoints(tmp_path / "run" / "checkpoints").load()[2]["step"] == 4
    monkeypatch.setattr(loop._Training, "update", update)
    assert train.main(command) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_death_between_record_and_checkpoint_is_repaired(
    features: Chain, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def dies(self: Checkpoints, step: int, *inputs: object, **named: object) -> None:
        if step > 4:
            raise OSError("disk gone")
        save(self, step, *inputs, **named)

    command = features.train_flags(tmp_path / "run", *EVERYTHING)
    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(OSError, match="disk gone"):
        train.main(command)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert train.main(command) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_torn_checkpoint_folder_is_ignored_and_replaced(
    uninterrupted: Path, tmp_path: Path
) -> None:
    model, _, state = Checkpoints(uninterrupted / "checkpoints").load()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, model, {}, state, best=True)
    (checkpoints.folder / "step-00000002").mkdir()  # killed before its pointer moved
    assert checkpoints.load()[2]["step"] == state["step"]
    checkpoints.save(2, model, {}, state, best=False)
    assert os.readlink(checkpoints.folder / "latest") == "step-00000002"
    assert os.readlink(checkpoints.folder / "best") == "step-00000001"


def test_a_finished_run_is_left_alone(features: Chain, uninterrupted: Path) -> None:
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in uninterrupted.glob("checkpoints/*/*")
    )
    assert train.main(features.train_flags(uninterrupted, *EVERYTHING)) == 0
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in uninterrupted.glob("checkpoints/*/*")
    )


def test_changed_options_are_refused_by_name(
    features: Chain, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train.main(features.train_flags(uninterrupted, *EVERYTHING, "--learning_rate", 3e-4)) == 2
    )
    message = capsys.readouterr().err
    assert "--learning_rate" in message and "0.0001 then, 0.0003 now" in message


def test_changed_features_are_refused(
    features: Chain, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = builders.copied_bank(features.features, tmp_path / "bank", scale=2.0)
    assert train.main([*chain.train_flags(chain.model), "--clip_feature_path", str(other)]) == 2
    assert "clip_features" in capsys.readouterr().err


def joint(features: Chain) -> tuple[train.JointObjective, object]:
    data = open_training(DataChoice(features.data, features.features, "average", 0.2, 0))
    alignment = Alignment(
        "prior", learned_weights=False, condition_dropout=0.0, predicts="velocity", loss_on=None
    )
    decoder = new_decoder(data, 0, alignment, None)
    return train.JointObjective(decoder, data, Contrast(0.01), 1.0, noise_draws=2), data


@pytest.mark.parametrize("part", [*(f"prior_{name}" for name in NAMES), "contrast"])
def test_gradients_reach_the_encoder_from_every_part(features: Chain, part: str) -> None:
    objective, data = joint(features)
    batch = next(iter(data.batches(0, 16)))
    objective.losses(batch, util.generator_for(0, "test"))[part].backward()
    encoder = objective.decoder.encoder
    gradients = {
        name: value.grad for name, value in encoder.named_parameters() if value.grad is not None
    }
    # the scale belongs to the contrast, the shared token to unknown subjects
    silent = [name for name, value in gradients.items() if not value.abs().max() > 0]
    assert [name for name in silent if "shared_embedding" not in name and "conv" not in name] == []
    assert any("proj_eeg" in name for name in gradients)


def test_positives_are_rows_of_the_same_concept(features: Chain) -> None:
    _, data = joint(features)
    batch = next(iter(data.batches(0, 24)))
    keys = {item.id: item.folder for item in list_stimuli(features.data, "training")}
    folders = [keys[one] for one in batch.stimulus.tolist()]
    assert data.groups(batch.stimulus, "pair") is None
    concepts = data.groups(batch.stimulus, "concept")
    together = (concepts[:, None] == concepts).tolist()
    assert together == [[one == other for other in folders] for one in folders]
    assert len(set(folders)) < len(set(batch.stimulus.tolist())) < len(folders)


def test_the_objective_groups_its_batch(features: Chain) -> None:
    objective, data = joint(features)
    objective.decoder.eval()
    batch = next(iter(data.batches(0, 24)))
    objective.contrast = Contrast(0.01, contrast_positives="concept")
    found = objective.losses(batch, util.generator_for(0, "test"))["contrast"]
    encoder, groups = objective.decoder.encoder, data.groups(batch.stimulus, "concept")
    given = (encoder(batch.eeg, batch.subject), batch.targets, encoder.similarity_scale)
    torch.testing.assert_close(found, contrastive_total(*given, Contrast(0.01), groups))
    assert not torch.allclose(found, contrastive_total(*given, Contrast(0.01), None), atol=1e-4)


def test_the_total_is_the_registry_sum_plus_the_contrast(features: Chain) -> None:
    objective, data = joint(features)
    objective.decoder.eval()
    parts = objective.losses(next(iter(data.batches(0, 16))), util.generator_for(0, "test"))
    weights = dict(zip(NAMES, (0.1, 0.1, 0.2, 0.3, 0.3), strict=True))
    expected = sum(weights[name] * parts[f"prior_{name}"] for name in NAMES)
    assert torch.allclose(parts["aligner"], expected)
    assert torch.allclose(parts["loss"], expected + parts["contrast"])


def test_metrics_name_every_modality_and_the_learning_rate(chain: Chain) -> None:
    records = read_jsonl(chain.model / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert record["lr"] == 1e-4
        for name in NAMES:
            assert {
                f"prior_{name}",
                f"cosine_{name}",
                f"val_prior_{name}",
                f"val_{name}_top5",
            } <= set(record)
    assert list((chain.model / "tensorboard").glob("events*"))


def test_best_is_the_epoch_with_the_lowest_held_out_loss_of_the_aligner(
    uninterrupted: Path,
) -> None:
    records = read_jsonl(uninterrupted / "metrics.jsonl")
    best = min(records, key=lambda record: record["val_aligner"])
    _, header = load_tensors(uninterrupted / "checkpoints" / "best" / "model.safetensors")
    assert header["step"] == best["step"]


def test_a_contrast_that_is_too_sure_of_itself_does_not_choose(features: Chain) -> None:
    objective, _ = joint(features)
    objective.decoder.eval()
    before = objective.validate()
    with torch.no_grad():
        objective.decoder.encoder.logit_scale += 2
    after = objective.validate()
    assert after["val_loss"] != before["val_loss"]
    assert after["select"] == before["select"] < 0


def test_training_never_opens_the_test_recording_or_bank(
    features: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (features.data / "Preprocessed_data_250Hz").glob("sub-*/preprocessed_eeg_test.npy"):
        path.rename(path.with_suffix(".away"))
    bank = features.features / "test.safetensors"
    bank.rename(bank.with_suffix(".away"))
    try:
        assert train.main(features.train_flags(tmp_path / "run", "--epochs", 1)) == 0
    finally:
        for path in (features.data / "Preprocessed_data_250Hz").glob("sub-*/*.away"):
            path.rename(path.with_suffix(".npy"))
        bank.with_suffix(".away").rename(bank)


def test_a_loss_that_explodes_stops_with_step_and_part(
    features: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = features.train_flags(tmp_path / "run", "--learning_rate", 1e30, "--grad_clip", 0)
    assert train.main(command) == 1
    message = capsys.readouterr().err
    assert "step " in message and "is not finite" in message
    assert any(name in message for name in (*NAMES, "contrast", "gradient"))


def test_the_model_file_alone_rebuilds_the_decoder(chain: Chain) -> None:
    decoder = Decoder.load(chain.model, "best")
    assert decoder.signal["subjects"] == ["sub-01", "sub-02"]
    assert decoder.bank is not None and decoder.subject_index("sub-02") == 1
    assert decoder.subject_index("sub-99") == -1


def test_dry_run_writes_nothing(
    features: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(features.train_flags(tmp_path / "run", "--dry_run")) == 0
    assert "dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_pretraining_then_joint_training_from_its_encoder(features: Chain, tmp_path: Path) -> None:
    encoder_run = tmp_path / "encoder"
    assert ATMS_retrieval.main(features.train_flags(encoder_run)) == 0
    donor = Decoder.load(encoder_run, "best")
    assert donor.bank is None
    data = open_training(DataChoice(features.data, features.features, "average", 0.2, 0))
    alignment = Alignment("prior", False, 0.1, "velocity", None)
    started = new_decoder(data, 0, alignment, donor)
    for name, value in donor.encoder.state_dict().items():
        assert torch.equal(value, started.encoder.state_dict()[name])


def test_the_run_explains_itself(chain: Chain) -> None:
    options = json.loads((chain.model / "options.json").read_text())
    assert options["stage"] == "train" and options["provenance"]["epochs"] == "command line"
    assert options["provenance"]["learning_rate"] == "default"
    assert set(json.loads((chain.model / "inputs.json").read_text())) == {
        "clip_features",
        "eeg_sub-01",
        "eeg_sub-02",
    }
    assert {"versions", "commit", "host"} <= set(
        json.loads((chain.model / "env.json").read_text())[0]
    )
