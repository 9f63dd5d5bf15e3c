"""The next batch is read and copied to the device while the one before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dataset import Batch


def on_their_way(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` on ``device``, in their order, one ahead of the caller.

    By a thread: a GPU and its caller wait for neither the disk nor the copy. On a CPU, which would
    compete with itself, each when it is asked for. What reading raises is raised here, at its
    batch.
    """
    if device.type == "cpu":
        yield from batches
        return

    def fetch() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else batch.to(device)

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(fetch)
        while (batch := waiting.result()) is not None:
            waiting = thread.submit(fetch)
            yield batch
