"""Speed of training beside the loop that everyone writes, side by side in one run; start-up cost.

    python benchmarks/train.py --json train.json

"prior_bank": the five priors' losses and gradients at full size (D = 1024, 9.7 M parameters each)
against five networks one after another. "train_step": a whole step, from memory-mapped trials to
changed weights, against a DataLoader over trials in memory, the encoder's published layers, five
priors in turn and plain AdamW.
"open_ten_subjects": opening ten subjects of THINGS-EEG2's size (sparse files) until the first batch
can be read. EEG and targets are noise: nothing is learned here, only timed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset
import train
from datafiles import eeg_files, pickles
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import list_stimuli
from decoder.aligners import Alignment
from decoder.decoder import Decoder
from decoder.encoders import SpatioTemporalConvolution
from loss import Contrast, contrastive_total, prior_loss, prior_total
from masking import Masking
from modalities import NAMES
from rundirs.directory import RunDirectory
from rundirs.environment import environment
from rundirs.files import write_json
from rundirs.tensors import save_tensors
from sdxl.memory import main_memory_peak
from subject_layers.dropout import Dropout
from subject_layers.schedule import TRAIN_STEPS
from subject_layers.timesteps import timestep_features
from training import loop
from training.optimisation import Schedule
from training.processes import Processes
from training.settings import Computing, Procedure
from training.starting import new_decoder
from unet import DiffusionPriorUNet, PriorBank

DIM, CHANNELS, SAMPLES, RATE_HZ = 1024, 63, 250, 250
CONCEPTS, IMAGES, REPETITIONS = 1654, 10, 4
# (pictures of a concept, trials, channels, samples) of one person's training in other forms
OTHER_FORMS = {"things-meg": (12, 1, 271, 201), "alljoined": (10, 4, 32, 250)}
LARGE = 1024  # batch
SOME_ROWS = 414  # of a subject, for what reads everything: 1/40
GROWTH = (1, 2, 4)


# ---------------------------------------------------------------- timing


def alternated(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all in turn, after one round that is not counted."""
    from tqdm import tqdm

    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(rounds + 1), desc=" / ".join(calls), leave=False):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def row(found: Mapping[str, Sequence[float]], **more: Any) -> dict[str, Any]:
    """Milliseconds per step, medians; ratio: of the pairs that ran beside each other."""
    ours, baseline = (1000 * statistics.median(found[side]) for side in ("ours", "baseline"))
    ratios = [b / a for a, b in zip(found["ours"], found["baseline"], strict=True)]
    return {
        "ours": ours, "baseline": baseline, "ratio": statistics.median(ratios), "unit": "ms",
        "n": len(ratios), "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "threads": torch.get_num_threads(), **more,
    }  # fmt: skip


def machine(size: int = 1024) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes/s of a copy, as this machine does them now."""
    a, b = torch.randn(2, size, size)
    large = torch.randn(64 << 20)
    copy = torch.empty_like(large)
    calls = {"product": lambda: torch.mm(a, b), "copy": lambda: copy.copy_(large)}
    found = {name: min(values) for name, values in alternated(calls, 5).items()}
    return {
        "flops_per_s": 2 * size**3 / found["product"],
        "bytes_per_s": 2 * 4 * large.numel() / found["copy"],
    }


def floor_ms(weights: int, rows: int, passes: float, speed: Mapping[str, float]) -> float:
    """No step is faster: 6 FLOP per weight and row, or ``passes`` over the weights' bytes."""
    return 1000 * max(
        6 * weights * rows / speed["flops_per_s"], 4 * weights * passes / speed["bytes_per_s"]
    )


# ---------------------------------------------------------------- the loop everyone writes


class PublishedPrior(DiffusionPriorUNet):
    """The network as published: every row's timestep is embedded, those that repeat as well."""

    def embed_time(self, t: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        time = timestep_features(t, self.time_embed_dim).to(dtype)
        return [layer(time) for layer in (*self.encode_time_embedding, *self.decode_time_embedding)]


class FivePriors(nn.Module):
    """Five networks one after another, as published code has them."""

    def __init__(self, bank: PriorBank) -> None:
        super().__init__()
        state = bank.state_dict()
        self.space = bank  # its target statistics and noise schedule
        self.priors = nn.ModuleDict()
        for name in NAMES:
            prior, prefix = PublishedPrior(DIM, DIM, dropout=bank.dropout), f"priors.{name}."
            prior.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
            self.priors[name] = with_plain_dropout(prior)

    def losses(self, targets: Mapping[str, torch.Tensor], cond: torch.Tensor) -> dict[str, Any]:
        found, space = {}, self.space
        for name, prior in self.priors.items():
            clean = space.standardise(name, targets[name])
            t = torch.randint(TRAIN_STEPS, (len(clean),))
            noise = torch.randn_like(clean)
            keep = torch.rand(len(clean)) >= space.task.condition_dropout
            velocity = prior(space.add_noise(clean, noise, t), t, cond, keep)
            found[name] = prior_loss(velocity, space.velocity_of(clean, noise, t))
        return found


def with_plain_dropout(module: nn.Module) -> nn.Module:
    """The module with PyTorch's own dropout."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    return module


def random_targets(rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, DIM) for name in NAMES}


def prior_bank_row(batch: int, rounds: int, seed: int, speed: Mapping[str, float]) -> Any:
    """Forward and backward of the five priors; the optimiser is the same for both."""
    torch.manual_seed(seed)
    bank = PriorBank(DIM, DIM)
    five = FivePriors(bank)
    targets, cond = random_targets(batch), torch.randn(batch, DIM, requires_grad=True)
    draw = torch.Generator().manual_seed(seed)

    def step(losses: Mapping[str, Any], module: nn.Module) -> None:
        prior_total(losses).backward()
        cond.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    found = alternated(
        {
            "ours": lambda: step(bank.losses(targets, cond, draw), bank),
            "baseline": lambda: step(five.losses(targets, cond), five.priors),
        },
        rounds,
    )
    weights = sum(parameter.numel() for parameter in bank.parameters())
    # the weights are read forward and backward, their gradients written
    least = floor_ms(weights, batch, 3, speed)
    made = row(found, batch=batch, parameters=weights, floor_ms=least)
    return made | {"times_the_floor": made["ours"] / least}


# ---------------------------------------------------------------- a whole step


class Trials(torch.utils.data.Dataset):
    """Trials in memory, one item at a time: the mean over repetitions, as the common recipe."""

    def __init__(self, eeg: np.ndarray, targets: Mapping[str, torch.Tensor]) -> None:
        self.eeg, self.targets = torch.from_numpy(np.array(eeg)), targets

    def __len__(self) -> int:
        return len(self.eeg)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.eeg[index].mean(0), {name: rows[index] for name, rows in self.targets.items()}


class PublishedConvolution(nn.Module):
    """The encoder's convolution layer by layer, as published."""

    def __init__(self, ours: SpatioTemporalConvolution) -> None:
        super().__init__()
        self.tsconv, self.projection = ours.tsconv, ours.projection

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        maps = self.projection(self.tsconv(tokens[:, None]))
        return maps.squeeze(2).transpose(1, 2).flatten(1)


def as_published(encoder: nn.Module) -> nn.Module:
    """The encoder without this project's shortcuts. SystemExit if it computes anything else."""
    eeg, subject = torch.randn(2, CHANNELS, SAMPLES), torch.zeros(2, dtype=torch.long)
    encoder.eval()
    with torch.no_grad():
        ours = encoder(eeg, subject)
        encoder.enc_eeg[0] = PublishedConvolution(encoder.enc_eeg[0])
        published = with_plain_dropout(encoder).eval()(eeg, subject)
    if not torch.allclose(ours, published, atol=1e-4):
        raise SystemExit("the published form of the encoder computes something else")
    return encoder.train()


class Common:
    """DataLoader, five priors in turn, unfused AdamW, the loss read at every step."""

    def __init__(self, decoder: Decoder, data: dataset.TrainingData, batch: int) -> None:
        self.encoder, self.five = as_published(decoder.encoder), FivePriors(decoder.bank)
        self.parameters = [*self.encoder.parameters(), *self.five.priors.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4, foreach=False, fused=False)
        trials = Trials(data.recordings[0].eeg, data.targets)
        loader = torch.utils.data.DataLoader(trials, batch, shuffle=True, drop_last=True)
        self.batches = _endless(loader)

    def step(self) -> None:
        eeg, targets = next(self.batches)
        embedding = self.encoder(eeg, torch.zeros(len(eeg), dtype=torch.long))
        loss = prior_total(self.five.losses(targets, embedding)) + contrastive_total(
            embedding, targets, self.encoder.similarity_scale, Contrast(0.01), None
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=False)
        self.optimizer.step()
        loss.item()


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


class OurStep:
    """``training/loop.py``'s step on memory-mapped trials, one noise per sample like the other."""

    def __init__(self, decoder: Decoder, data: dataset.TrainingData, batch: int, out: Path) -> None:
        schedule = Schedule(
            epochs=1, batch_size=batch, learning_rate=1e-4, lr_eeg=None, schedule="constant",
            weight_decay=0.01, warmup_steps=0, grad_clip=1.0, ema_decay=0.0, seed=0,
            epochs_per_call=None, save_every=1, val_every=1,
        )  # fmt: skip
        computing = Computing("float32", 1, False, "auto", "none")
        objective = train.JointObjective(decoder, data, Contrast(0.01), 1.0, noise_draws=1)
        self.training = loop._Training(
            RunDirectory(out, "train"), decoder, objective,
            Procedure(schedule, computing, Masking()), Processes(0, 1, torch.device("cpu")), 1,
        )  # fmt: skip
        self.batches = (b for epoch in range(10**6) for b in data.batches(epoch, batch))

    def step(self) -> None:
        self.training.update(next(self.batches))


def train_step_row(batch: int, rounds: int, seed: int, speed: Mapping[str, float]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_subjects(root, 1, SOME_ROWS // IMAGES, dense=True)
        data = open_subjects(root, "average")
        models = [new_model(data, seed) for _ in range(2)]
        for model in models:
            model.train()
        ours, common = OurStep(models[0], data, batch, root), Common(models[1], data, batch)
        found = alternated({"ours": ours.step, "baseline": common.step}, rounds)
    weights = sum(parameter.numel() for parameter in models[0].parameters())
    # weights: read twice, written; gradients: written, read for the norm and by AdamW; its two
    # moments: read and written
    least = floor_ms(weights, batch, 10, speed)
    made = row(found, batch=batch, parameters=weights, floor_ms=least)
    return made | {"times_the_floor": made["ours"] / least}


def new_model(data: dataset.TrainingData, seed: int) -> Decoder:
    alignment = Alignment("prior", False, 0.1, "velocity", None)
    return new_decoder(data, seed, alignment, None)


# ---------------------------------------------------------------- opening subjects


def write_subjects(
    root: Path,
    subjects: int,
    concepts: int,
    size: tuple[int, int, int, int] | None = None,
    dense: bool = False,
) -> None:
    """DATA as a training finds it at its second start: pictures' names, copies, features.

    ``size``: as of OTHER_FORMS, default THINGS-EEG2's. The copies are as large as real ones, but
    empty (sparse), unless ``dense``.
    """
    images, repetitions, channels, samples = size or (IMAGES, REPETITIONS, CHANNELS, SAMPLES)
    for concept in range(1, concepts + 1):
        pictures = root / "training_images" / f"{concept:05d}_concept{concept}"
        pictures.mkdir(parents=True)
        for image in range(images):
            (pictures / f"{image}.jpg").touch()
    shape = (concepts * images, repetitions, channels, samples)
    names, times = [f"C{i}" for i in range(channels)], [i / RATE_HZ for i in range(samples)]
    for subject in range(1, subjects + 1):
        source = eeg_file(root, f"sub-{subject:02d}", "training")
        source.parent.mkdir(parents=True)
        source.write_text(f"stands for the published file of subject {subject}")
        copy = eeg_files.copy_of(source, eeg_files.cache_folder(root, None))
        copy.parent.mkdir(exist_ok=True)
        eeg = np.lib.format.open_memmap(copy, mode="w+", dtype=np.float32, shape=shape)
        if dense:
            eeg[:] = np.random.default_rng(subject).standard_normal(shape, dtype=np.float32)
        about = {
            "shape": shape, "channels": names, "times": times, "hash": f"subject {subject}",
            "pictures": None, "counts": None,
        }  # fmt: skip
        write_json(copy.with_suffix(".json"), about)
    stimuli = list_stimuli(root, "training")
    ids = torch.tensor([item.id for item in stimuli])
    save_tensors(
        root / "bank" / "training.safetensors",
        random_targets(len(ids)) | {"stimulus": ids},
        {"clip": {"model": "noise"}},
    )
    (root / "bank" / "DONE").write_text("{}")


def open_subjects(root: Path, trials: str) -> dataset.TrainingData:
    return dataset.open_training(dataset.DataChoice(root, root / "bank", trials, 0.05, 0))


def open_in_child(root: Path) -> dict[str, float]:
    """Seconds and peak MiB of opening a folder and reading one batch, in a fresh process."""
    command = [sys.executable, __file__, "--open", str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def opened(root: Path) -> dict[str, float]:
    """What a child measures."""
    from tqdm import tqdm  # noqa: F401 - counted as an import

    imported, started = main_memory_peak(), time.perf_counter()
    next(iter(open_subjects(root, "random").batches(0, 64)))
    seconds, peak = time.perf_counter() - started, main_memory_peak()
    return {"seconds": seconds, "mib": (peak - imported) / 2**20, "with_imports": peak / 2**20}


def everything_into_memory(root: Path, subjects: int) -> float:
    """Seconds to unpickle float64, cast and join, as the common recipe starts; of some rows."""
    shape = (SOME_ROWS, REPETITIONS, CHANNELS, SAMPLES)
    content = {"preprocessed_eeg_data": np.random.default_rng(0).standard_normal(shape)}
    path = root / "published.npy"
    path.write_bytes(pickle.dumps(content, protocol=4))
    started = time.perf_counter()
    parts = []
    for _ in range(subjects):
        eeg = pickles.read_pickled_dict(path)["preprocessed_eeg_data"]
        parts.append(torch.from_numpy(eeg).float())
    torch.cat(parts)
    return time.perf_counter() - started


def open_rows(subjects: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of seconds and MiB, with how they grow."""
    sizes: dict[str, tuple[int, tuple[int, int, int, int] | None]] = {
        name: (subjects, size) for name, size in OTHER_FORMS.items()
    }
    for factor in GROWTH:
        more = (IMAGES, factor * REPETITIONS, CHANNELS, SAMPLES)
        sizes |= {f"{factor}x subjects": (factor * subjects, None)}
        sizes |= {f"{factor}x trials": (subjects, more)}
    growth = {}
    for name, (people, size) in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            write_subjects(Path(folder), people, CONCEPTS, size)
            runs = [open_in_child(Path(folder)) for _ in range(3)]
        growth[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    with tempfile.TemporaryDirectory() as folder:
        scale = CONCEPTS * IMAGES / SOME_ROWS
        loaded = everything_into_memory(Path(folder), subjects) * scale
    ours = growth["1x subjects"]
    everything = subjects * CONCEPTS * IMAGES * REPETITIONS * CHANNELS * SAMPLES * 4 / 2**20
    common = {"n": 3, "subjects": subjects, "growth": growth}
    return (
        {"ours": ours["seconds"], "baseline": loaded, "ratio": loaded / ours["seconds"],
         "unit": "s", "baseline_measured_on_rows": SOME_ROWS, **common},
        {"ours": ours["mib"], "baseline": everything, "ratio": ours["mib"] / everything,
         "unit": "MiB", "baseline_is": "float32 bytes of all trials, computed",
         "with_imports": ours["with_imports"], **common},
    )  # fmt: skip


# ---------------------------------------------------------------- the table


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what | ours | baseline | ratio | unit | N |", "|---|---|---|---|---|---|"]
    for name, item in rows.items():
        lines.append(
            f"| {name} | {item['ours']:,.4g} | {item['baseline']:,.4g} | {item['ratio']:.3g} | "
            f"{item['unit']}, median | {item['n']} |"
        )
    return "\n".join(lines) + "\n"


def notes(rows: Mapping[str, Mapping[str, Any]], speed: Mapping[str, float]) -> str:
    lines = [
        "ratio: times faster than the baseline; for memory, ours / baseline.",
        f"Here {speed['flops_per_s'] / 1e9:.0f} GFLOP/s (product of 1024 x 1024) and "
        f"{speed['bytes_per_s'] / 1e9:.1f} GB/s (copy), {torch.get_num_threads()} threads.",
    ]
    for name, item in rows.items():
        if "floor_ms" in item:
            low, high = item["ratio_quartiles"]
            lines.append(
                f"{name}: floor {item['floor_ms']:.0f} ms by FLOPs and bytes, ours "
                f"{item['times_the_floor']:.2f} times that; ratio's quartiles {low:.2f}..{high:.2f}"
            )
        if name == "open_ten_subjects_seconds":
            grown = ", ".join(
                f"{label} {cost['seconds']:.2f} s {cost['mib']:.0f} MiB"
                for label, cost in item["growth"].items()
            )
            lines.append(f"Opening grows: {grown}.")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--json", type=Path, help="also write the rows here")
    add("--batch_size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add("--rounds", type=int, default=15, metavar="N", help="per row (default: %(default)s)")
    add("--subjects", type=int, default=10, metavar="N", help="to open (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--rows", nargs="+", metavar="NAME", help="only these; default: all")
    add("--open", type=Path, help=argparse.SUPPRESS)  # a child of open_rows
    given = parser.parse_args(argv)
    if min(given.batch_size, given.rounds, given.subjects) < 2:
        parser.error("all numbers from 2")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.open:
        print(json.dumps(opened(given.open)))
        return 0
    speed = machine()
    makers = {
        "prior_bank_step_b64": lambda: prior_bank_row(
            given.batch_size, given.rounds, given.seed, speed
        ),
        "prior_bank_step_b1024": lambda: prior_bank_row(
            LARGE, max(2, given.rounds // 3), given.seed, speed
        ),
        "train_step_b64": lambda: train_step_row(given.batch_size, given.rounds, given.seed, speed),
    }
    wanted = given.rows or [*makers, "open_ten_subjects"]
    rows = {name: make() for name, make in makers.items() if name in wanted}
    if "open_ten_subjects" in wanted:
        seconds, mib = open_rows(given.subjects)
        rows |= {"open_ten_subjects_seconds": seconds, "open_ten_subjects_rss_mb": mib}
    print(table(rows))
    print(notes(rows, speed))
    if given.json:
        write_json(given.json, {"rows": rows, "machine": speed, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
