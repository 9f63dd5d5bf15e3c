"""How much memory drawing takes, and how many pictures fit at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def main_memory_peak() -> int:
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


def largest_batch(
    draw_rows: Callable[[int], object], most: int, device: torch.device, reserved: int = 0
) -> int:
    """How many rows fit, 1 to ``most``: judged by the memory that one row and two rows take.

    ``draw_rows(n)`` draws n rows. ``reserved``: bytes that something else will take. A tenth of
    what is free stays free.
    """
    if most < 3:
        return max(1, most)
    peaks = []
    for rows in (1, 2):
        forget_peak(device)
        try:
            draw_rows(rows)
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            return 1
        peaks.append(peak_memory(device))
    per_row = max(peaks[1] - peaks[0], 1 << 20)
    free = memory_limit(device) - peaks[1] - reserved
    return int(max(1, min(most, 2 + 0.9 * free // per_row)))


def forget_peak(device: torch.device) -> None:
    """Count the peak from here on. Where the system cannot, it stays the highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use: of the GPU by this process, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return main_memory_peak()


def memory_limit(device: torch.device) -> int:
    """Bytes that this process could have in use: what it has and what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return peak_memory(device) + free_memory()
