"""Batches on their way to a device: their order, one ahead, what reading raises, an early end.

The meta device stands for a GPU: it takes the same way but for pinned memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dataset import Batch
from training.prefetch import on_their_way

META, CPU = torch.device("meta"), torch.device("cpu")


def batch_of(rows: int) -> Batch:
    ids = torch.arange(rows)
    return Batch(torch.zeros(rows, 2, 3), ids, ids, {"image": torch.zeros(rows, 4)})


def read(sizes: list[int], seen: list[tuple[int, str]]) -> Iterator[Batch]:
    for size in sizes:
        seen.append((size, threading.current_thread().name))
        if size == 0:
            raise ValueError("cannot be read")
        yield batch_of(size)


def test_all_come_in_their_order_on_the_device() -> None:
    seen: list[tuple[int, str]] = []
    found = list(on_their_way(read([3, 1, 2], seen), META))
    assert [len(batch.eeg) for batch in found] == [3, 1, 2]
    for batch in found:
        tensors = (batch.eeg, batch.subject, batch.stimulus, *batch.targets.values())
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert threading.current_thread().name not in {name for _, name in seen}


def test_the_next_one_is_read_while_one_is_computed() -> None:
    seen: list[tuple[int, str]] = []
    ahead = on_their_way(read([1, 2, 3, 4], seen), META)
    next(ahead)
    next(ahead)  # what was asked for before is read: the second, and then the third begins
    ahead.close()
    assert 2 <= len(seen) <= 3


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    seen: list[tuple[int, str]] = []
    ahead = on_their_way(read([1, 2, 3], seen), CPU)
    assert len(next(ahead).eeg) == 1
    assert seen == [(1, threading.current_thread().name)]


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_what_reading_raises_is_raised_at_its_batch(device: torch.device) -> None:
    ahead = on_their_way(read([1, 0, 2], []), device)
    assert len(next(ahead).eeg) == 1
    with pytest.raises(ValueError, match="cannot be read"):
        next(ahead)


def test_a_moved_batch_holds_the_same() -> None:
    batch, other = batch_of(4), batch_of(4).to(CPU)
    assert torch.equal(batch.stimulus, other.stimulus) and other.targets.keys() == {"image"}
