"""Time and accuracy of the scores against the libraries of the field, side by side in one run.

python benchmarks/metrics.py --json metrics.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics
from rundirs.environment import environment
from rundirs.files import write_json

PICTURES, DIMENSIONS = 200, 2048  # of the test set, and of FID's Inception


class Features(torch.nn.Module):
    """Hands features through to torchmetrics, which expects a network."""

    num_features = DIMENSIONS

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(-1, DIMENSIONS)


def torchmetrics_fid(truth: torch.Tensor, drawn: torch.Tensor) -> float:
    """FID of features by torchmetrics, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(1, 1, DIMENSIONS))
    metric.set_dtype(torch.float64)
    metric.update(truth, real=True)
    metric.update(drawn, real=False)
    return float(metric.compute())


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def fid_200(repeats: int, seed: int) -> dict[str, Any]:
    """FID of 200 against 200 pictures' features; both sides alternate. Ends if they disagree.

    Features have a 1/k spectrum and a total variance of 100, as Inception's have about.
    """
    draw = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, DIMENSIONS + 1).double()
    deviations = (100 * spectrum / spectrum.sum()).sqrt()
    truth, drawn = (
        scale * torch.randn(PICTURES, DIMENSIONS, generator=draw).double() * deviations + shift
        for scale, shift in ((1.0, 0.0), (1.2, 0.02))
    )
    sides = {
        "ours": lambda: metrics.frechet_distance(truth, drawn),
        "baseline": lambda: torchmetrics_fid(truth, drawn),
    }
    for side in sides.values():  # imports and first calls
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, float] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            taken, values[name] = timed(side)
            seconds[name].append(taken)
    apart = abs(values["ours"] / values["baseline"] - 1)
    if apart > 1e-6:
        raise SystemExit(f"FID differs from torchmetrics by {apart:.1e}: {values}")
    ours, baseline = (statistics.median(seconds[name]) for name in ("ours", "baseline"))
    return {"ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": "s", "n": repeats,
            "fid": values["ours"], "relative_difference": apart, "pictures": PICTURES,
            "dimensions": DIMENSIONS, "threads": torch.get_num_threads()}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--repeats", type=int, default=5, metavar="N",
        help="of each side (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    rows = {"fid_200": fid_200(given.repeats, given.seed)}
    print("| what | ours | torchmetrics | times faster | unit | N |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['ours']:.4f} | {row['baseline']:.3f} | {row['ratio']:.0f} "
            f"| {row['unit']}, median | {row['n']} |"
        )
    row = rows["fid_200"]
    print(f"\nFID {row['fid']:.6f}, relative difference {row['relative_difference']:.1e}")
    if given.json:
        write_json(given.json, {"rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
