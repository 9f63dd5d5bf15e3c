"""Checkpoints are found by what they hold, whatever a copy made of the links; nothing is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import builders
import pytest
import torch
from helpers_training import Regression, fit_linear

import util
from decoder.decoder import model_file
from rundirs import checkpoints
from rundirs.files import read_jsonl
from rundirs.tensors import load_tensors, save_tensors, tensors_header
from training.checkpoints import Checkpoints

EPOCHS, BEFORE = 6, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return builders.write_world(tmp_path_factory.mktemp("engine") / "DATA")


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory) -> Path:
    """A run that stopped half way; its best is not its latest."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        scores = iter([0.0, 2.0, 1.0, 0.5, 0.4, 0.3])
        patch.setattr(Regression, "validate", lambda self: {"select": next(scores)})
        with pytest.raises(util.Preempted):
            fit_linear(world, run, epochs=EPOCHS, epochs_per_call=BEFORE)
    assert os.readlink(run / "checkpoints" / "best") != os.readlink(run / "checkpoints" / "latest")
    return run


def without_links(run: Path, copy: Path) -> None:
    """As ``cp`` to a file system that has none, or ``rsync`` without ``-l``."""
    shutil.copytree(run, copy, symlinks=True)
    for name in ("best", "latest"):
        (copy / "checkpoints" / name).unlink()


def links_followed(run: Path, copy: Path) -> None:
    """As ``cp -rL``, ``scp -r`` or a browser's download."""
    shutil.copytree(run, copy)
    assert not (copy / "checkpoints" / "best").is_symlink()


def only_followed(run: Path, copy: Path) -> None:
    """The same, of a person who took ``best`` and ``latest`` alone."""
    links_followed(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)


def links_as_texts(run: Path, copy: Path) -> None:
    """As git and Windows write them."""
    without_links(run, copy)
    for name in ("best", "latest"):
        target = os.readlink(run / "checkpoints" / name)
        (copy / "checkpoints" / name).write_text(target)


COPIES = (without_links, links_followed, only_followed, links_as_texts)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_run_goes_on_where_it_was(world, begun, tmp_path, monkeypatch, copied):
    run, straight = tmp_path / "copy", tmp_path / "straight"
    copied(begun, run)
    shutil.copytree(begun, straight, symlinks=True)
    best = load_tensors(model_file(begun, "best"))
    found, records = load_tensors(model_file(run, "best")), read_jsonl(begun / "metrics.jsonl")
    assert found[1] == best[1] and all(torch.equal(found[0][k], v) for k, v in best[0].items())
    for one in (run, straight):
        monkeypatch.setattr(Regression, "validate", lambda self: {"select": 0.5})
        fit_linear(world, one, epochs=EPOCHS)
    assert read_jsonl(run / "metrics.jsonl")[:BEFORE] == records
    assert len(read_jsonl(run / "metrics.jsonl")) == EPOCHS
    for name in ("best", "latest"):
        one, two = (load_tensors(model_file(of, name)) for of in (run, straight))
        assert one[1] == two[1] and all(torch.equal(one[0][k], v) for k, v in two[0].items())
        assert (run / "checkpoints" / name).is_symlink()
    assert load_tensors(model_file(run, "best"))[1]["step"] == best[1]["step"]


def test_the_newest_whole_one_is_taken(world, begun, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(begun, run, symlinks=True)
    latest = (run / "checkpoints" / "latest").resolve()
    (latest / "state.pt").write_bytes((latest / "state.pt").read_bytes()[:999])
    _, header, state = Checkpoints(run / "checkpoints").load()
    best = tensors_header(model_file(run, "best"))
    assert header["step"] == state["step"] == best["step"]
    (run / "checkpoints" / "best" / "state.pt").unlink()
    with pytest.raises(util.DataError, match="copy it again"):
        fit_linear(world, run, epochs=EPOCHS)
    assert len(read_jsonl(run / "metrics.jsonl")) == BEFORE, "nothing is forgotten by a refusal"


def test_what_another_call_wrote_is_not_removed(begun, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(begun, run, symlinks=True)
    old = run / "checkpoints" / "step-00000001"
    shutil.copytree(run / "checkpoints" / "best", old)
    kept = Checkpoints(run / "checkpoints")
    kept.prepare()
    model, header, state = kept.load()
    for step in (90, 91, 92):
        kept.save(step, model, header, state | {"step": step}, best=False)
    found = {place.name for place in checkpoints.step_folders(run / "checkpoints")}
    best = os.readlink(run / "checkpoints" / "best")
    assert found == {"step-00000001", best, "step-00000092"}, "its own, and what it went on from"


def test_two_models_of_one_step_are_refused(begun, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    state, header = load_tensors(run / "checkpoints" / "best" / "model.safetensors")
    changed = {name: value + 1 for name, value in state.items()}
    save_tensors(run / "checkpoints" / "best" / "model.safetensors", changed, header)
    with pytest.raises(util.DataError, match="another model than that of step-"):
        Checkpoints(run / "checkpoints").prepare()


def test_where_links_cannot_be_made_texts_lead_to_the_checkpoints(
    world, begun, tmp_path, monkeypatch, caplog
):
    def refused(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(util.LOG, "propagate", True)
    fit_linear(world, tmp_path / "run", epochs=2)
    place = tmp_path / "run" / "checkpoints"
    assert (place / "latest").read_text().strip() == checkpoints.step_folders(place)[0].name
    assert model_file(tmp_path / "run", "latest").is_file()
    assert "links cannot be made here" in caplog.records[0].getMessage(), "before the first step"
    caplog.clear()
    Checkpoints(place).prepare()
    assert "by what it holds" not in caplog.text, "a text is as good as a link there"


def test_a_death_in_the_first_validation_costs_no_training(world, tmp_path, monkeypatch):
    validate, whole, run = Regression.validate, tmp_path / "whole", tmp_path / "run"
    fit_linear(world, whole, epochs=3)

    def out_of_memory(self):
        raise torch.OutOfMemoryError("20 GB")

    monkeypatch.setattr(Regression, "validate", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fit_linear(world, run, epochs=3)
    steps = Checkpoints(run / "checkpoints").load()[2]["step"]
    assert steps > 0 and not (run / "metrics.jsonl").exists()
    monkeypatch.setattr(Regression, "validate", validate)
    fit_linear(world, run, epochs=3)
    records = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(one)]
        for one in (run / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert records[0] == records[1] and len(records[0]) == 3
    for name in ("best", "latest"):
        one, two = (load_tensors(model_file(of, name)) for of in (run, whole))
        assert all(torch.equal(one[0][k], v) for k, v in two[0].items())
