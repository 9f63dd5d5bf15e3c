"""Several processes, accumulation, kills: the same numbers, and nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
import torch
from helpers_training import fit_in_child, fit_linear, training_data

import util
from rundirs.files import read_json, read_jsonl
from rundirs.tensors import load_tensors
from training.checkpoints import Checkpoints
from training.processes import Processes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two subjects, 24 training pictures; float32 copies made."""
    root = tmp_path_factory.mktemp("world") / "DATA"
    builders.write_pictures(root, training=12)
    for subject in range(2):
        builders.write_subject(root, subject)
    builders.write_bank(root / "bank", root)
    training_data(root)
    return root


def launched(processes: int, script: Path, *flags: object, port: int) -> None:
    command = [*LAUNCH, "--num_processes", str(processes), "--main_process_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *map(str, flags)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def result(out: Path, processes: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    tensors, header = load_tensors(out / "gradients.safetensors")
    assert header["processes"] == processes
    return tensors, header["losses"]


def test_two_processes_compute_what_one_does(world, tmp_path):
    """Losses and gradients of a step: contrast, noise and masks are those of the whole batch.

    Not the weights: where a gradient is all but 0, Adam's first step follows its sign.
    """
    steps = HERE / "helpers_training.py"
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, str(steps), str(world), str(one)], check=True, timeout=300)
    launched(2, steps, world, two, port=free_port())
    (gradients, losses), (others, other_losses) = result(one), result(two, processes=2)
    assert losses.keys() == other_losses.keys() and "contrast" in losses
    for name, value in losses.items():
        assert other_losses[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert gradients.keys() == others.keys()
    for name, value in gradients.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            others[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * scale, msg=name
        )


def test_training_runs_in_two_processes_and_writes_once(features, tmp_path):
    flags = features.train_flags(tmp_path / "run", "--epochs", 2)
    launched(2, ROOT / "train.py", *flags, port=free_port())
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2] and "val_loss" in records[-1]
    assert (tmp_path / "run" / "DONE").exists()
    assert len(read_json(tmp_path / "run" / "env.json")) == 1
    assert "in 2 processes" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_a_batch_that_cannot_be_shared_is_refused(features, tmp_path, capsys):
    import train

    assert train.main(features.train_flags(tmp_path / "run", "--accumulate", 3)) == 2
    assert "--batch_size" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_accumulated_parts_are_drawn_as_the_whole(world, tmp_path):
    """Without dropout and batch statistics, and but for the contrast, whose negatives are fewer."""
    from helpers_training import steps_of_the_real_model

    for parts in (1, 2):
        steps_of_the_real_model(world, tmp_path / str(parts), 1, parts)
    (_, whole), (_, halves) = result(tmp_path / "1"), result(tmp_path / "2")
    for name, value in whole.items():
        if name not in ("contrast", "loss"):
            assert halves[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert halves["contrast"] < whole["contrast"]


def test_one_process_asks_nobody():
    alone = Processes.join("cpu")
    assert alone.first and alone.any(True) and not alone.any(False)
    assert alone.mean([1.0, 2.0]) == [1.0, 2.0]


# --- kills --------------------------------------------------------------------------------------

KILLS, EPOCHS = 20, 60


def test_kills_at_any_moment_lose_nothing_beyond_the_last_checkpoint(world, tmp_path, monkeypatch):
    """20 times SIGTERM or SIGKILL; then the run ends as if it had never been stopped."""
    # its server, which imports torch once for all children, knows no other path
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{ROOT}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers_training"])
    run, lots, reached, saved = tmp_path / "run", random.Random(0), 0, []
    for number in range(KILLS):
        child = context.Process(target=fit_in_child, args=(str(world), str(run), EPOCHS))
        child.start()
        wait_for_checkpoint(run, child, beyond=reached)
        time.sleep(lots.uniform(0, 0.12))
        how = (signal.SIGTERM, signal.SIGKILL)[number % 2]
        if child.is_alive():
            os.kill(child.pid, how)
        child.join(60)
        assert child.exitcode in (0, util.PREEMPTED, -signal.SIGTERM, -signal.SIGKILL)
        loaded = Checkpoints(run / "checkpoints").load()
        assert loaded is not None and loaded[1]["step"] >= reached
        reached = loaded[1]["step"]
        saved.append(reached)
        if (run / "DONE").exists():
            break
    assert len(set(saved)) > 3, "the kills were to find the run at different steps"
    fit_linear(world, run, epochs=EPOCHS)
    whole = tmp_path / "whole"
    fit_linear(world, whole, epochs=EPOCHS)
    (one, _, state), (two, _, other) = (
        Checkpoints(out / "checkpoints").load() for out in (run, whole)
    )
    assert [name for name in two if not torch.equal(one[name], two[name])] == []
    assert state["step"] == other["step"] and state["best"] == other["best"]
    records = [read_jsonl(out / "metrics.jsonl") for out in (run, whole)]
    losses = [[(line["epoch"], line["loss"], line["select"]) for line in part] for part in records]
    assert losses[0] == losses[1]


def wait_for_checkpoint(run: Path, child, beyond: int) -> None:
    """Until the child has saved something new, or has ended."""
    started = time.monotonic()
    while child.is_alive() and time.monotonic() - started < 60:
        latest = run / "checkpoints" / "latest"
        if latest.is_symlink() and int(os.readlink(latest).removeprefix("step-")) > beyond:
            return
        time.sleep(0.005)
