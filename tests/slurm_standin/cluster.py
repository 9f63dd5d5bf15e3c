"""A SLURM of one machine: ``sbatch`` files jobs, ``Cluster.run`` executes them as SLURM would.

As on a real cluster a script runs from a copy, in the folder it was submitted from, with the
environment of its submission; options of the command line win over ``#SBATCH`` lines; an option
that SLURM does not know is refused; what a job leaves running dies with it. The state is a folder
of JSON files, so that commands called by the jobs and the test see the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

COMMANDS = ("sbatch", "scontrol", "squeue", "scancel")
VALUED = [
    "array",
    "account",
    "cpus-per-task",
    "dependency",
    "export",
    "gres",
    "job-name",
    "kill-on-invalid-dep",
    "mem",
    "open-mode",
    "output",
    "partition",
    "signal",
    "time",
]
SWITCHES = ("parsable", "requeue")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


@dataclass
class Process:
    """A running task's script and its log."""

    popen: subprocess.Popen
    log: IO[bytes]


@dataclass
class Cluster:
    """``tasks``: "ID" or "ID_TASK" -> {state, restarts, code}; ``jobs``: ID -> what was asked."""

    root: Path
    running: dict[str, Process] = field(default_factory=dict)

    # ------------------------------------------------------------ what was submitted

    def _records(self, kind: str) -> dict[str, dict[str, Any]]:
        files = self.root.glob(f"{kind}/*.json")
        found = {path.stem: json.loads(path.read_text()) for path in files}
        return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split("_")]))

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return self._records("job")

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        return self._records("task")

    def named(self, name: str) -> str:
        """The id of the latest job of this name."""
        return [job for job, about in self.jobs.items() if about["options"]["job-name"] == name][-1]

    def states(self, name: str) -> list[str]:
        """States of all tasks of the latest job of this name."""
        job = self.named(name)
        return [about["state"] for task, about in self.tasks.items() if task.split("_")[0] == job]

    def mark(self, task: str, **changes: Any) -> None:
        write(self.root / "task" / f"{task}.json", self.tasks[task] | changes)

    def submit(self, script: Path, options: dict[str, str]) -> str:
        for folder in ("job", "task", "spool"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        job = str(1000 + 100 * len(self.jobs))
        shutil.copy(script, self.root / "spool" / job)
        array = options.get("array", "").split("%")[0]
        low, _, high = array.partition("-")
        numbers = range(int(low), int(high or low) + 1) if array else [None]
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_")
        }
        about = {"options": options, "environment": environment, "folder": os.getcwd()}
        write(self.root / "job" / f"{job}.json", about)
        for number in numbers:
            task = job if number is None else f"{job}_{number}"
            write(
                self.root / "task" / f"{task}.json", {"state": "PENDING", "restarts": 0, "code": 0}
            )
        return job

    # ------------------------------------------------------------ what is executed

    def run(self, at_once: int = 2, watch: Callable[[Cluster], None] = lambda _: None) -> None:
        """Execute all tasks until none can start. ``watch`` is called all the time."""
        while True:
            for task in list(self.running):
                self._collect(task)
            if len(self.running) < at_once:
                self._start_next(at_once)
            if not self.running:
                return
            watch(self)
            time.sleep(0.05)

    def _start_next(self, at_once: int) -> None:
        """Start what may start, in order of submission; give up what never may."""
        jobs, tasks = self.jobs, self.tasks
        for task, about in tasks.items():
            if about["state"] != "PENDING" or len(self.running) >= at_once:
                continue
            options = jobs[task.split("_")[0]]["options"]
            needed = self._needed(task, options.get("dependency", ""), tasks)
            if any(state in ("FAILED", "CANCELLED") for state in needed):
                if options["kill-on-invalid-dep"] == "yes":
                    self.mark(task, state="CANCELLED")
                    about["state"] = "CANCELLED"  # so that those after it are given up, too
            elif all(state == "COMPLETED" for state in needed):
                self._start(task)

    @staticmethod
    def _needed(task: str, dependency: str, tasks: dict[str, dict[str, Any]]) -> list[str]:
        """States of all tasks that this one waits for."""
        number, states = task.partition("_")[2], []
        for condition in filter(None, dependency.split(",")):
            kind, *others = condition.split(":")
            for other in others:
                members = [name for name in tasks if name.split("_")[0] == other]
                if kind == "aftercorr":
                    members = [f"{other}_{number}"]
                states += [tasks[name]["state"] for name in members]
        return states

    def _start(self, task: str) -> None:
        job, _, number = task.partition("_")
        about = self.jobs[job]
        environment = about["environment"] | {
            "SLURM_JOB_ID": str(int(job) + int(number or 0)),
            "SLURM_JOB_NAME": self._option(task, "job-name"),
            "SLURM_SUBMIT_DIR": about["folder"],
            "SLURM_CPUS_PER_TASK": self._option(task, "cpus-per-task"),
        }
        if number:
            tasks = sum(name.startswith(f"{job}_") for name in self.tasks)
            environment |= {
                "SLURM_ARRAY_JOB_ID": job,
                "SLURM_ARRAY_TASK_ID": number,
                "SLURM_ARRAY_TASK_COUNT": str(tasks),
            }
        if self.tasks[task]["restarts"]:
            environment["SLURM_RESTART_COUNT"] = str(self.tasks[task]["restarts"])
        log = open(self._log(task), "ab")  # noqa: SIM115 - closed in _collect
        self.mark(task, state="RUNNING")
        popen = subprocess.Popen(
            ["bash", str(self.root / "spool" / job)],
            cwd=about["folder"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.running[task] = Process(popen, log)

    def _option(self, task: str, name: str) -> str:
        return self.jobs[task.split("_")[0]]["options"].get(name, "")

    def _log(self, task: str) -> Path:
        job, _, number = task.partition("_")
        known = {"%": "%", "x": self._option(task, "job-name"), "A": job, "j": job, "a": number}
        return Path(re.sub("%(.)", lambda found: known[found[1]], self._option(task, "output")))

    def log(self, name: str, number: int | None = None) -> str:
        job = self.named(name)
        return self._log(f"{job}_{number}" if number else job).read_text()

    def _collect(self, task: str) -> None:
        process = self.running[task]
        code = process.popen.poll()
        if code is None:
            return
        self.kill(task)  # what it left running
        process.log.close()
        del self.running[task]
        about = self.tasks[task]
        if about["state"] == "REQUEUED":
            self.mark(task, state="PENDING", restarts=about["restarts"] + 1)
        elif about["state"] == "RUNNING":
            self.mark(task, state="FAILED" if code else "COMPLETED", code=code)

    def warn(self, task: str, number: int = signal.SIGUSR1) -> None:
        """Signal the batch shell only, as --signal=B:... does."""
        self.running[task].popen.send_signal(number)

    def kill(self, task: str) -> None:
        """SIGKILL everything in the task's session, as when memory is exhausted."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running[task].popen.pid, signal.SIGKILL)


# ---------------------------------------------------------------- the commands


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, has_value, value = words.pop(0).removeprefix("--").partition("=")
        if name in SWITCHES and not has_value:
            options[name] = "yes"
        elif name in VALUED:
            options[name] = value if has_value else words.pop(0)
        else:
            raise SystemExit(f"sbatch: unrecognized option '--{name}'")
    return options, words


def sbatch(cluster: Cluster, words: list[str]) -> str:
    typed, (script, *_) = parse(words)
    lines = Path(script).read_text().splitlines()
    if not lines[0].startswith("#!"):
        raise SystemExit("sbatch: error: This does not look like a batch script")
    options: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith("#"):
            break  # SLURM reads no further
        if line.startswith("#SBATCH "):
            options |= parse(line.split()[1:])[0]
    options |= typed
    if options.get("export") != "ALL":
        raise SystemExit("stand-in: only --export=ALL")
    if options.get("partition") == "full" and options["job-name"] == "generate":
        raise SystemExit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    for other in re.findall(r"\d+", options.get("dependency", "")):
        if other not in cluster.jobs:
            raise SystemExit("sbatch: error: Job dependency problem")
    return cluster.submit(Path(script), options)


def scontrol(cluster: Cluster, words: list[str]) -> str:
    verb, task = words
    if verb != "requeue" or task not in cluster.tasks:  # the bare id of an array is the whole array
        raise SystemExit(f"scontrol: stand-in refuses {words}")
    if not cluster.tasks[task]["state"] == "RUNNING":
        raise SystemExit("scontrol: job is not running")
    cluster.mark(task, state="REQUEUED")
    return ""


def squeue(cluster: Cluster, words: list[str]) -> str:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    shown = [
        (task, about)
        for task, about in cluster.tasks.items()
        if about["state"] not in ENDED and task == given.get("jobs", task)
    ]
    field = {"%T": lambda task, about: about["state"], "%F": lambda task, _: task.split("_")[0]}
    return "\n".join(field[given["format"]](task, about) for task, about in shown)


def scancel(cluster: Cluster, words: list[str]) -> str:
    for task in cluster.tasks:
        if task in words or task.split("_")[0] in words:
            cluster.mark(task, state="CANCELLED")
    return ""


def install(folder: Path, state: Path) -> Cluster:
    """Put the four commands into ``folder``; they act on the cluster whose state is ``state``."""
    folder.mkdir()
    for name in COMMANDS:
        command = folder / name
        call = f'"{sys.executable}" "{Path(__file__).resolve()}" "{state}" {name}'
        command.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
        command.chmod(0o755)
    return Cluster(state)


if __name__ == "__main__":
    state, name, *arguments = sys.argv[1:]
    answer = globals()[name](Cluster(Path(state)), arguments)
    if answer:
        print(answer)
