"""What every stage shares: errors and exit codes, the log, seeds, devices, parts of a batch."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

LOG = logging.getLogger("eeg2image")
# of --precision: what autocast computes products in; float32 needs none
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKOUT = Path(__file__).resolve().parent  # the scripts, configs/ and all packages
PREEMPTED = 75  # EX_TEMPFAIL: saved and stopped on a signal; the same command goes on
CLAIM_SECONDS = 120  # that a stage waits for another process in its output directory
_LONGEST = 2000  # characters of what a message says was found


def _for_terminal(found: object) -> str:
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
            f"{where}\n  found:    {_for_terminal(found)}\n"
            f"  expected: {expected}\n  cure:     {cure}"
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
        if error.__cause__ is not None:  # what a library raised: for its makers, in the file only
            LOG.debug("%s", "".join(traceback.format_exception(error.__cause__)).rstrip())
    else:  # before a run directory was opened
        sys.stderr.write(f"error: {error}\n")


_BEGUN = [time.monotonic()]  # when the stage that is running was called


def seconds_so_far() -> float:
    """Since the running stage was called."""
    return time.monotonic() - _BEGUN[0]


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Turn a stage's ``main`` into one that returns exit codes: 2 user error, 1 data error."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _close_log()  # of a run that another caller began and left open
        _BEGUN[0] = time.monotonic()
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
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setLevel(logging.INFO)
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        _LOG_HANDLERS.append(handler)


@contextlib.contextmanager
def foreign_errors_logged(path: Path) -> Iterator[None]:
    """Before a run is opened: an error with a library's as its cause goes to this file, too."""
    try:
        yield
    except StageError as error:
        if error.__cause__ is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            start_log(path)
        raise


def claim_log(meanwhile: Callable[[], None]) -> None:
    """Keep the run that is logged for this process, until it closes the log or ends, however.

    Waits for another one that has it: a server may take a minute to see that a machine has died.
    ``meanwhile`` is called every second of that, and may raise.
    Raises BlockingIOError if it goes on. File systems that know no locks are left without.
    """
    import fcntl

    file = _log_file()
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
            meanwhile()
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            return


def release_log() -> None:
    """Let other processes have the run, too: see :func:`claim_log`."""
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(_log_file(), fcntl.LOCK_UN)


def _log_file() -> IO[str]:
    (file,) = (one.stream for one in _LOG_HANDLERS if isinstance(one, logging.FileHandler))
    return file


def _close_log() -> None:
    while _LOG_HANDLERS:
        handler = _LOG_HANDLERS.pop()
        LOG.removeHandler(handler)
        handler.close()


# ---------------------------------------------------------------- parts of a batch


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


def pick_device(name: str) -> torch.device:
    """``auto`` = CUDA if there is one, else CPU. UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected, cure = "auto, cpu, cuda, cuda:N or mps", "name one of these"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError("--device", name, expected, cure) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError("--device", name, expected, cure)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                "--device",
                f"{name}, and torch sees {count} CUDA devices",
                "a CUDA device that torch can see",
                "use --device cpu, or install a torch build for this GPU's driver"
                if not count
                else f"use one of cuda:0 to cuda:{count - 1}",
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "--device", name, "a Mac whose GPU torch can use", "use --device cpu, or auto"
        )
    return device


def sent(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on a device; to a GPU from pinned memory, from where alone copying does not wait."""
    if device.type != "cuda":
        return rows.to(device)
    return (rows.pin_memory() if rows.is_cpu else rows).to(device, non_blocking=True)


def grouped(flat: Mapping[str, Any], name: str, kind: type[Any]) -> dict[str, Any]:
    """``flat`` as keywords, those that are fields of the dataclass ``kind`` as one: ``name``."""
    inner = {field.name for field in fields(kind)} & flat.keys()
    rest = {key: value for key, value in flat.items() if key not in inner}
    return rest | {name: kind(**{key: flat[key] for key in inner})}


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once, sorted."""
    return sorted(name for name, number in Counter(names).items() if number > 1)
