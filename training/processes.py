"""The processes of one training run, as ``accelerate launch`` starts them; usually one.

Each computes its part of every batch. The first alone writes files and validates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import util
from rundirs.directory import Resolved, RunDirectory, open_run


@dataclass(frozen=True)
class Processes:
    """This process: the ``index``-th of ``count``, and where it computes."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Processes:
        """The processes that a launcher started, or this one alone. ``device``: the flag."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, util.pick_device(device))
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        return self.index == 0

    def any(self, here: bool) -> bool:
        """Whether it holds in any process, told to all of them."""
        if self.count == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def mean(self, values: list[float]) -> list[float]:
        """Over the processes, number by number."""
        if self.count == 1:
            return values
        found = torch.tensor(values, device=self.device)
        dist.all_reduce(found)
        return (found / self.count).tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def open_together(
    options: Resolved, inputs: Mapping[str, Any], plan: Iterable[str], processes: Processes
) -> RunDirectory:
    """:func:`open_run` in ``--output_dir`` by the first process; the others wait for it."""
    path = options.values.output_dir
    if processes.first:
        run = open_run(options, path, inputs, plan)
    elif options.values.dry_run:
        raise SystemExit(0)
    else:
        run = RunDirectory(path, options.stage)
    processes.wait()
    return run


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows [b, ...] of all processes [count * b, ...], in their order, with gradients.

    A loss of all rows that every process computes sends each process ``count`` times its gradient;
    DDP's mean over processes makes it the gradient of one loss.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
