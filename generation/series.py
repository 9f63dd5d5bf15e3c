"""What is drawn of every stimulus, and the loop that draws what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datafiles.eeg_files import SIMULATED_NOTE
from datafiles.pictures import read_picture
from datafiles.stimuli import leaks_blocks
from dataset import TestEEG
from generation import variants
from generation.renderer import Renderer, Task, drawn_batches, fitting_batch
from generation.sheets import (
    contact_sheet,
    draws_sheet,
    marked,
    overview,
    save_picture,
    save_sheet,
    stimulus_views,
)
from modalities import AUTO, MARKS, NAMES, marks_of
from rundirs.directory import RunDirectory
from rundirs.files import append_jsonl, read_jsonl
from rundirs.journal import drawn_already
from sdxl import injection_map

# (the draws of a picture, its stimulus, its row) -> (which one is kept, what it agreed by)
Keep = Callable[[Sequence[np.ndarray], int, int], tuple[int, list[float]]]


def pending(
    tasks: Sequence[Task], done: set[tuple[int, str]], ids: Sequence[int], draws: int = 1
) -> list[Task]:
    """Tasks of which some recipe is not on disk yet, each with all its draws."""
    lacking = [
        task for task in tasks if any((ids[task.row], name) not in done for name in task.names)
    ]
    return [replace(task, draw=draw) for task in lacking for draw in range(draws)]


DRAWS = "draws"  # folder of all draws of a picture, beside the one that is kept


def write_pictures(
    out: Path,
    journal: Path,
    done: set[tuple[int, str]],
    tasks: Sequence[Task],
    pictures: Sequence[np.ndarray],
    test: TestEEG,
    active: Mapping[str, Sequence[str]],
    about: Mapping[str, Any],
) -> None:
    """Save a batch under all its recipes' names and journal each picture after it is on disk.

    ``active``: {recipe: its modalities}.
    """
    marks = marks_of(about["prompt_source"], about["control"])
    note = "; ".join(MARKS[mark] for mark in marks) or "neutral prompt"
    for task, picture in zip(tasks, pictures, strict=True):
        for name in task.names:
            file = f"{test.names[task.row]}/{marked(name, marks)}"
            save_picture(out / file, picture, note)
            append_jsonl(
                journal,
                {
                    "stimulus": test.ids[task.row],
                    "row": task.row,
                    "folder": test.names[task.row],
                    "recipe": name,
                    "active": active[name],
                    "file": file,
                    **about,
                },
            )
            done.add((test.ids[task.row], name))


@dataclass(frozen=True)
class Predicted:
    """What was predicted from the EEG of some rows of a test set."""

    test: TestEEG
    rows: Sequence[int]
    embeddings: Mapping[str, torch.Tensor]  # {modality: [n, D]}
    gains: torch.Tensor | None  # fusion weights [n, M] of each row; None: the registered ones

    @cached_property
    def stacked(self) -> torch.Tensor:
        """[n, M, D], modalities in the registry's order."""
        return torch.stack([self.embeddings[name] for name in NAMES], dim=1)

    @cached_property
    def places(self) -> dict[int, int]:
        """{row of the test set: row here}."""
        return {row: place for place, row in enumerate(self.rows)}


@dataclass(frozen=True)
class Series:
    """What is drawn of every stimulus, in what batches; names as the flags of ``args.py``."""

    mode: str
    sweep: str | None
    injection: str
    fusion_strength: float
    prompt_source: str
    control: str | None
    seed: int
    batch_size: int | str  # auto: as many as fit
    superpixel_size: int  # of the contact sheets
    draws: int
    choose: str

    @property
    def marks(self) -> tuple[str, ...]:
        return marks_of(self.prompt_source, self.control)

    def about(self, test: TestEEG) -> dict[str, Any]:
        """What the journal says of every picture."""
        return {
            "subject": test.subject,
            "prompt_source": self.prompt_source,
            "control": self.control,
            "seed": self.seed,
            "injection": self.injection,
            **({"transductive": True} if test.transductive else {}),
            "simulated": (test.source.parent / SIMULATED_NOTE).exists(),
            "block_leak": bool(test.stimuli) and leaks_blocks(test.stimuli[0].data_path),
            **({} if self.draws == 1 else {"draws": self.draws, "choose": self.choose}),
        }

    @property
    def title(self) -> str:
        return f"sweep of {self.sweep}" if self.sweep else self.mode

    @cached_property
    def preset(self) -> injection_map.InjectionMap:
        return injection_map.load_injection(self.injection)

    def families(
        self, layers: Sequence[injection_map.Layer], gains: torch.Tensor | None
    ) -> list[variants.Family]:
        return variants.families(
            self.mode, self.sweep, self.preset, layers, self.fusion_strength, gains
        )

    def pictures(
        self, layers: Sequence[injection_map.Layer], gains: torch.Tensor | None
    ) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        """(names, scales [M, L]) of a row's distinct pictures; ``gains`` [M] of the row."""
        kinds = self.families(layers, gains)
        return variants.distinct([variant for kind in kinds for variant in kind.variants])

    def tasks(self, layers: Sequence[injection_map.Layer], predicted: Predicted) -> list[Task]:
        """Every distinct picture of every row."""
        if predicted.gains is None:  # the same for every row
            of_row = [self.pictures(layers, None)] * len(predicted.rows)
        else:
            of_row = [self.pictures(layers, own) for own in predicted.gains]
        return [
            Task(row, names, table)
            for row, pictures in zip(predicted.rows, of_row, strict=True)
            for names, table in pictures
        ]


def draw_series(
    series: Series, run: RunDirectory, renderer: Renderer, predicted: Predicted, keep: Keep
) -> None:
    """Draw what is missing, batch by batch over stimuli and recipes, then the sheets."""
    gains = predicted.gains
    kinds = series.families(renderer.injector.layers, None if gains is None else gains[0])
    draw_missing(series, run, renderer, predicted, kinds, keep)
    write_sheets(series, run, predicted, kinds)


def draw_missing(
    series: Series,
    run: RunDirectory,
    renderer: Renderer,
    predicted: Predicted,
    kinds: Sequence[variants.Family],
    keep: Keep,
) -> None:
    """The pictures that are not on disk yet, in batches of the given size or of what fits.

    Of several draws of a picture all are saved, and ``keep`` says which one counts.
    """
    from rundirs.progress import Progress

    test, journal = predicted.test, run.path / f"images{run.suffix}.jsonl"
    tasks = series.tasks(renderer.injector.layers, predicted)
    done = drawn_already(run.path, journal)
    missing = pending(tasks, done, test.ids, series.draws)
    active = {variant.name: variant.active for kind in kinds for variant in kind.variants}
    about = series.about(test)

    def draw(by: Renderer, batch: Sequence[Task]) -> np.ndarray:
        return by.draw(batch, predicted.stacked, test.ids, predicted.places)

    size, automatic = series.batch_size, series.batch_size == AUTO
    if automatic and missing:
        trial = [missing[k % len(missing)] for k in range(2)]
        where = predicted.stacked, test.ids, predicted.places
        size = fitting_batch(renderer, lambda by, n: by.latents(trial[:n], *where), len(missing))
    total = len(tasks) * series.draws
    before = total - len(missing)
    with Progress(total=total, initial=before, desc="drawing", unit="picture") as bar:
        made = drawn_batches(missing, size, lambda batch: draw(renderer, batch), automatic)
        for batch, pictures in together(made, series.draws):
            bar.update(len(batch))
            found: dict[str, Any] = {}
            if series.draws > 1:
                batch, pictures, found = kept_of(run.path, batch, pictures, test, series, keep)
            write_pictures(run.path, journal, done, batch, pictures, test, active, about | found)


def kept_of(
    out: Path,
    tasks: Sequence[Task],
    pictures: Sequence[np.ndarray],
    test: TestEEG,
    series: Series,
    keep: Keep,
) -> tuple[Sequence[Task], Sequence[np.ndarray], dict[str, Any]]:
    """The one of a picture's draws that is kept, and what the journal says of it; all are saved."""
    files, row = save_draws(out, tasks, pictures, test, series.marks), tasks[0].row
    chosen, agreements = keep(pictures, test.ids[row], row)
    about = {"draw": chosen, "agreements": agreements, "draw_files": files}
    return [tasks[chosen]], [pictures[chosen]], about


def together(
    made: Iterable[tuple[Sequence[Task], np.ndarray]], draws: int
) -> Iterator[tuple[Sequence[Task], Sequence[np.ndarray]]]:
    """Batches as they come, or one picture's draws at a time."""
    if draws == 1:
        yield from made
        return
    waiting: list[tuple[Task, np.ndarray]] = []
    for batch, pictures in made:
        waiting += zip(batch, pictures, strict=True)
        while len(waiting) >= draws:
            own, waiting = waiting[:draws], waiting[draws:]
            yield [task for task, _ in own], [picture for _, picture in own]


def save_draws(
    out: Path,
    tasks: Sequence[Task],
    pictures: Sequence[np.ndarray],
    test: TestEEG,
    marks: Sequence[str],
) -> list[str]:
    """Write all draws of one picture, under the first of its recipes' names; the files."""
    files = []
    for task, picture in zip(tasks, pictures, strict=True):
        name = marked(f"{task.names[0]}-{task.draw}", marks)
        files.append(f"{test.names[task.row]}/{DRAWS}/{name}")
        save_picture(out / files[-1], picture, f"draw {task.draw}, before one was chosen")
    return files


def write_sheets(
    series: Series, run: RunDirectory, predicted: Predicted, kinds: Sequence[variants.Family]
) -> None:
    """``overview.png`` of the first stimuli, and a contact sheet for each where there is more."""
    from rundirs.progress import Progress

    out, test, rows, marks = run.path, predicted.test, predicted.rows, series.marks

    def seen(row: int) -> list[tuple[str, Any]]:
        views = stimulus_views(test.stimuli[row], series.superpixel_size) if test.stimuli else []
        start = out / test.names[row] / marked("start", marks)
        return [*views, ("start", read_picture(start))] if start.exists() else list(views)

    sheet = overview(out, test, rows, seen, kinds, series.title, marks)
    save_sheet(out / f"overview{run.suffix}.png", sheet)
    if series.draws > 1:
        records = read_jsonl(out / f"images{run.suffix}.jsonl")
        last = kinds[-1].variants[-1].name
        sheet = draws_sheet(out, test, seen, [one for one in records if one["recipe"] == last])
        save_sheet(out / f"draws{run.suffix}.png", sheet)
    if series.sweep or len(kinds[0].variants) == 1:  # the overview has it all
        return
    for row in Progress(rows, desc="contact sheets", unit="sheet"):
        path = out / test.names[row] / marked("sheet", marks)
        if not path.exists():
            save_sheet(path, contact_sheet(out, test.names[row], seen(row), kinds, marks))
