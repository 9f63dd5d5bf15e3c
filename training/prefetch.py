"""The next batch is read and copied to the device while the one before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dataset import Batch


def on_their_way(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` on ``device``, in their order, one ahead of the caller.

    By a thread, from pinned memory: a GPU and its caller wait for neither the disk nor the copy. On
    a CPU, which would compete with itself, each when it is asked for. What reading raises is raised
    here, at its batch.
    """
    if device.type == "cpu":
        yield from batches
        return

    def fetch() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else moved(batch, device)

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(fetch)
        while (batch := waiting.result()) is not None:
            waiting = thread.submit(fetch)
            yield batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; from pinned memory, where there is one, without waiting."""
    return batch.mapped(lambda rows: _sent(rows, device))


def _sent(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and rows.is_cpu:
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)
