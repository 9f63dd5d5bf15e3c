"""Stage 3: EEG -> five predicted CLIP embeddings -> pictures, injected layer-wise into SDXL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("generate")

import numpy as np
import torch

import util
from ATMS_retrieval import Decoder, model_file
from datafiles import superpixel
from datafiles.eeg_files import SIMULATED_NOTE
from datafiles.pictures import read_picture
from datafiles.stimuli import Stimulus, caption, read_captions
from dataset import TestEEG, locate_test_eeg, open_test
from decoder import controls, fusion, low_level
from generation import variants
from modalities import MODALITIES, NAMES, recipes
from sdxl import injection_map, sampler
from unet import Sampling
from util import UserError

THUMBNAIL_PX = 160
OVERVIEW_ROWS = 12
MOST_ON_CPU = 32  # pictures at once: more are no faster there


# ---------------------------------------------------------------- embeddings + recipes -> pictures


@dataclass(frozen=True)
class Task:
    """One picture to draw: the test ``row`` it shows and ``names``, the recipes that equal it."""

    row: int
    names: tuple[str, ...]
    scales: torch.Tensor  # [M, L]


def shard_rows(count: int, shard: str) -> list[int]:
    """Rows of the i-th of n parts; every row is in exactly one part."""
    index, parts = util.parse_shard(shard)
    return list(range(index - 1, count, parts))


@dataclass(frozen=True)
class Renderer:
    """SDXL with the adapter installed, and the drawing options that all pictures share."""

    pipe: Any
    injector: injection_map.Injector
    prompts: sampler.PromptEmbeds  # encoded once: for all rows, or one per row of the test set
    how: sampler.Denoising
    seed: int
    starts: torch.Tensor | None = None  # [n, 4, h, w]: latents of what each embedding row begins as

    def draw(
        self,
        tasks: Sequence[Task],
        embeddings: torch.Tensor,
        ids: Sequence[int],
        places: Mapping[int, int],
    ) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of embeddings [n, M, D].

        ``places``: test row -> embedding row; ``ids``: the stimulus of each test row.
        """
        rows = [task.row for task in tasks]
        at = [places[row] for row in rows]
        one = len(self.prompts.text) == 1
        return sampler.draw(
            self.pipe,
            self.injector,
            embeddings[at],
            torch.stack([task.scales for task in tasks]),
            [util.seed_for(self.seed, "sdxl", ids[row]) for row in rows],
            self.prompts if one else self.prompts.chosen(rows),
            self.how,
            None if self.starts is None else self.starts[at],
        )


# ---------------------------------------------------------------- pictures -> disk


def marks_of(prompt_source: str, control: str | None) -> tuple[str, ...]:
    """Keys of args.MARKS for pictures that do not show what was decoded from the EEG alone."""
    return tuple(name for name in (prompt_source, control) if name in args.MARKS)


def marked(name: str, marks: Sequence[str]) -> str:
    """A file's name with its marks."""
    return "_".join((name, *marks)) + ".png"


def marked_title(title: str, marks: Sequence[str]) -> str:
    return "   ".join((title, *(f"[{args.MARKS[mark]}]" for mark in marks)))


def save_picture(path: Path, picture: np.ndarray, note: str) -> None:
    """Write uint8 [H, W, 3] as PNG with a note in its metadata, atomically."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", note)
    with util.atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format="PNG", pnginfo=info)


def labelled_grid(rows: Sequence[tuple[str, Sequence[tuple[str, Any]]]], title: str) -> Any:
    """A PIL sheet: titled rows of (label, PIL picture)."""
    from PIL import Image, ImageDraw, ImageFont

    cell, text, left, top = THUMBNAIL_PX, 18, 96, 28
    columns = max(len(cells) for _, cells in rows)
    sheet = Image.new(
        "RGB", (left + columns * (cell + 6), top + len(rows) * (cell + text + 8)), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((6, 6), title, fill="black", font=ImageFont.load_default(15))
    for line, (name, cells) in enumerate(rows):
        y = top + line * (cell + text + 8)
        pen.multiline_text((6, y + text + 4), name.replace(" ", "\n"), fill="black", font=font)
        for column, (label, picture) in enumerate(cells):
            x = left + column * (cell + 6)
            pen.text((x, y + 2), label, fill="black", font=font)
            sheet.paste(picture.convert("RGB").resize((cell, cell)), (x, y + text))
    return sheet


@functools.lru_cache(maxsize=OVERVIEW_ROWS)
def stimulus_views(stimulus: Stimulus, slic_px: int) -> list[tuple[str, Any]]:
    """The stimulus and its superpixel versions, labelled."""
    from PIL import Image

    picture = read_picture(stimulus.path)
    levels = superpixel.superpixels(superpixel.at_slic_size(picture, slic_px))
    return [
        ("stimulus", picture),
        *((variants.short(name), Image.fromarray(pixels)) for name, pixels in levels.items()),
    ]


def drawn_cells(
    out: Path, folder: str, kinds: Sequence[variants.Family], marks: Sequence[str]
) -> list[tuple[str, Any]]:
    """(label, picture) of every variant of some families, from disk."""
    return [
        (variant.label, read_picture(out / folder / marked(variant.name, marks)))
        for kind in kinds
        for variant in kind.variants
    ]


def contact_sheet(
    out: Path,
    folder: str,
    seen: Sequence[tuple[str, Any]],
    kinds: Sequence[variants.Family],
    marks: Sequence[str],
) -> Any:
    """One stimulus: what was seen, then each family's pictures in a row."""
    rows = [("seen", seen)] if seen else []
    rows += [(kind.name, drawn_cells(out, folder, [kind], marks)) for kind in kinds]
    return labelled_grid(rows, marked_title(folder, marks))


def overview(
    out: Path,
    test: TestEEG,
    rows: Sequence[int],
    seen: Callable[[int], Sequence[tuple[str, Any]]],
    kinds: Sequence[variants.Family],
    title: str,
    marks: Sequence[str],
) -> Any:
    """The first stimuli below each other: what was seen, then one variant per column.

    A sweep's families stand in a row each, beside the stimulus, of fewer stimuli.
    """
    stacked = title.startswith("sweep") and len(kinds) > 1
    shown = rows[: OVERVIEW_ROWS // len(kinds) if stacked else OVERVIEW_ROWS]
    lines = []
    for row in shown:
        name = test.names[row].split("_", 1)[-1].replace("_", " ")
        if stacked:
            for kind in kinds:
                cells = drawn_cells(out, test.names[row], [kind], marks)
                lines.append((f"{kind.name}: {name}", [*seen(row)[:1], *cells]))
        else:
            lines.append((name, [*seen(row), *drawn_cells(out, test.names[row], kinds, marks)]))
    return labelled_grid(lines, marked_title(f"subject {test.subject}: {title}", marks))


def save_sheet(path: Path, sheet: Any) -> None:
    with util.atomic_write(path, "wb") as file:
        sheet.save(file, format="PNG")


# ---------------------------------------------------------------- the stage


def oracle_prompts(captions: Path | None, stimuli: Sequence[Stimulus] | None) -> list[str]:
    """The stimuli's own captions, for ``--prompt_source oracle``. Raises UserError / DataError."""
    if stimuli is None:
        raise UserError(
            "--prompt_source oracle",
            "no stimuli beside the EEG",
            "test_images/",
            "give --data_path",
        )
    known = read_captions(captions)
    return [caption(item, known, args.TEXT_TEMPLATE) for item in stimuli]


def model_inputs(values: Any, test: TestEEG) -> dict[str, str]:
    """Identity of everything that determines the pictures beside the options."""
    model = model_file(values.model_path, values.checkpoint)
    sdxl = Path(values.sd_model_path)
    files = sorted(sdxl.rglob("*.safetensors")) if sdxl.is_dir() else [sdxl]
    return {
        "eeg": test.hash,
        "model": util.file_hash(model),
        "ip_adapter": util.file_hash(values.ip_adapter_path),
        "sdxl": util.json_hash(
            [[str(file.relative_to(sdxl)), util.file_hash(file)] for file in files]
        ),
        "captions": util.file_hash(values.captions) if values.captions else "",
        "vae": str(values.vae_path or ""),
        "low_level": util.file_hash(values.model_path / low_level.FILE)
        if values.init == "superpixel"
        else "",
    }


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return names.get(precision, torch.float16 if device.type == "cuda" else torch.float32)


def pending(tasks: Sequence[Task], done: set[tuple[int, str]], ids: Sequence[int]) -> list[Task]:
    """Tasks of which some recipe is not on disk yet."""
    return [task for task in tasks if any((ids[task.row], name) not in done for name in task.names)]


def drawn_already(out: Path, journal: Path) -> set[tuple[int, str]]:
    """(stimulus, recipe) of the pictures that the journal lists and the disk has."""
    return {
        (record["stimulus"], record["recipe"])
        for record in util.read_jsonl(journal)
        if (out / record["file"]).exists()
    }


def drawn_batches(
    tasks: Sequence[Task], size: int, draw: Callable[[Sequence[Task]], np.ndarray], halve: bool
) -> Iterator[tuple[Sequence[Task], np.ndarray]]:
    """(tasks, pictures) of every batch. ``halve``: from where the GPU's memory does not suffice.

    Raises UserError where it does not and the size is given, or is 1.
    """
    start = 0
    while start < len(tasks):
        batch = tasks[start : start + size]
        try:
            pictures = draw(batch)
        except torch.cuda.OutOfMemoryError as error:
            if not halve or len(batch) == 1:
                raise util.UserError(
                    "--batch_size",
                    f"{len(batch)} pictures at once do not fit ({error})",
                    "what the GPU's free memory holds",
                    "give --batch_size auto, a smaller --size, or --offload",
                ) from None
            size = len(batch) // 2
            torch.cuda.empty_cache()
            util.LOG.warning("out of memory: going on with batches of %d", size)
            continue
        yield batch, pictures
        start += len(batch)


def write_pictures(
    out: Path,
    journal: Path,
    done: set[tuple[int, str]],
    tasks: Sequence[Task],
    pictures: np.ndarray,
    test: TestEEG,
    active: Mapping[str, Sequence[str]],
    about: Mapping[str, Any],
) -> None:
    """Save a batch under all its recipes' names and journal each picture after it is on disk.

    ``active``: {recipe: its modalities}.
    """
    marks = marks_of(about["prompt_source"], about["control"])
    note = "; ".join(args.MARKS[mark] for mark in marks) or "neutral prompt"
    for task, picture in zip(tasks, pictures, strict=True):
        for name in task.names:
            file = f"{test.names[task.row]}/{marked(name, marks)}"
            save_picture(out / file, picture, note)
            util.append_jsonl(
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
class Series:
    """What is drawn of every stimulus, in what batches, and how it is recorded."""

    mode: str
    sweep: str | None
    injection: str
    strength: float
    prompt_source: str
    control: str | None
    seed: int
    batch_size: int | None  # None: as many as fit
    slic_px: int  # of the superpixels on the contact sheets

    @property
    def title(self) -> str:
        return f"sweep of {self.sweep}" if self.sweep else self.mode

    @cached_property
    def preset(self) -> injection_map.InjectionMap:
        return injection_map.load_injection(self.injection)

    def families(
        self, layers: Sequence[injection_map.Layer], gains: torch.Tensor | None
    ) -> list[variants.Family]:
        return variants.families(self.mode, self.sweep, self.preset, layers, self.strength, gains)

    def pictures(
        self, layers: Sequence[injection_map.Layer], gains: torch.Tensor | None
    ) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        """(names, scales [M, L]) of a row's distinct pictures; ``gains`` [M] of the row."""
        kinds = self.families(layers, gains)
        return variants.distinct([variant for kind in kinds for variant in kind.variants])

    def tasks(
        self, layers: Sequence[injection_map.Layer], gains: torch.Tensor | None, rows: Sequence[int]
    ) -> list[Task]:
        """Every distinct picture of every row. ``gains`` [n, M] of each row; None: registered."""
        if gains is None:  # the same for every row
            of_row = [self.pictures(layers, None)] * len(rows)
        else:
            of_row = [self.pictures(layers, own) for own in gains]
        return [
            Task(row, names, table)
            for row, pictures in zip(rows, of_row, strict=True)
            for names, table in pictures
        ]


def fitting_batch(renderer: Renderer, draw: Callable[[Renderer, int], object], most: int) -> int:
    """How many pictures fit at once; on a CPU no more than help."""
    device = renderer.pipe._execution_device
    quick = replace(renderer, how=replace(renderer.how, steps=1, strength=1.0))
    limit = most if device.type == "cuda" else min(most, MOST_ON_CPU)
    found = sampler.largest_batch(lambda rows: draw(quick, rows), limit, device)
    util.LOG.info("batch size %d", found)
    return found


def render(
    series: Series,
    run: util.RunDirectory,
    renderer: Renderer,
    embeddings: Mapping[str, torch.Tensor],
    gains: torch.Tensor | None,
    test: TestEEG,
    rows: Sequence[int],
    part: str,
) -> None:
    """Draw what is missing, batch by batch over stimuli and recipes, then the sheets.

    ``gains`` [n, M]: fusion weights of each row; None: the registered ones.
    """
    from tqdm import tqdm

    out, ids, layers = run.path, test.ids, renderer.injector.layers
    journal = out / f"images{part}.jsonl"
    tasks = series.tasks(layers, gains, rows)
    done = drawn_already(out, journal)
    about = {
        "subject": test.subject,
        "prompt_source": series.prompt_source,
        "control": series.control,
        "seed": series.seed,
        "injection": series.injection,
        "simulated": (test.source.parent / SIMULATED_NOTE).exists(),
    }
    stacked = torch.stack([embeddings[name] for name in NAMES], dim=1)
    places = {row: place for place, row in enumerate(rows)}
    kinds = series.families(layers, None if gains is None else gains[0])
    active = {variant.name: variant.active for kind in kinds for variant in kind.variants}
    missing = pending(tasks, done, ids)

    def draw(by: Renderer, batch: Sequence[Task]) -> np.ndarray:
        return by.draw(batch, stacked, ids, places)

    size, automatic = series.batch_size, series.batch_size is None
    if automatic and missing:
        trial = [missing[k % len(missing)] for k in range(2)]
        size = fitting_batch(renderer, lambda by, n: draw(by, trial[:n]), len(missing))
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc="drawing", unit="picture"
    ) as bar:
        made = drawn_batches(missing, size or 1, lambda batch: draw(renderer, batch), automatic)
        for batch, pictures in made:
            write_pictures(out, journal, done, batch, pictures, test, active, about)
            bar.update(len(batch))
    write_sheets(series, out, test, rows, kinds, part)


def write_sheets(
    series: Series,
    out: Path,
    test: TestEEG,
    rows: Sequence[int],
    kinds: Sequence[variants.Family],
    part: str,
) -> None:
    """``overview.png`` of the first stimuli, and a contact sheet for each where there is more."""
    from tqdm import tqdm

    marks = marks_of(series.prompt_source, series.control)

    def seen(row: int) -> list[tuple[str, Any]]:
        views = stimulus_views(test.stimuli[row], series.slic_px) if test.stimuli else []
        start = out / test.names[row] / marked("start", marks)
        return [*views, ("start", read_picture(start))] if start.exists() else list(views)

    sheet = overview(out, test, rows, seen, kinds, series.title, marks)
    save_sheet(out / f"overview{part}.png", sheet)
    if series.sweep or len(kinds[0].variants) == 1:  # the overview has it all
        return
    for row in tqdm(rows, desc="contact sheets", unit="sheet"):
        path = out / test.names[row] / marked("sheet", marks)
        if not path.exists():
            save_sheet(path, contact_sheet(out, test.names[row], seen(row), kinds, marks))


# ---------------------------------------------------------------- coarse starts


def coarse_starts(
    decoder: Decoder,
    head: low_level.LowLevelHead,
    test: TestEEG,
    rows: Sequence[int],
    seed: int,
    control: str | None,
) -> torch.Tensor:
    """Coarse pictures [n, 3, GRID, GRID] to start from, or what a control puts in their place."""
    if control == "true_embedding":
        return low_level.coarse_pictures([test.stimuli[row] for row in rows])
    if control == "mean_embedding":
        return head.mean_picture().expand(len(rows), -1, -1, -1)
    read = controls.controlled_eeg(test, control, seed)
    return head.predict(low_level.test_features(decoder, read, rows), test.subject)


def encode_starts(
    pipe: Any,
    coarse: torch.Tensor,
    size_px: int,
    out: Path,
    test: TestEEG,
    rows: Sequence[int],
    marks: Sequence[str],
) -> torch.Tensor:
    """Latents [n, 4, h, w] of coarse pictures, which are saved as ``start.png``, too."""
    note = "; ".join(args.MARKS[mark] for mark in marks) or "predicted from EEG"
    latents = []
    for row, small in zip(rows, coarse, strict=True):
        large = low_level.enlarged(small[None], size_px)
        pixels = (large[0] * 255).round().byte().permute(1, 2, 0).numpy()
        save_picture(out / test.names[row] / marked("start", marks), pixels, note)
        latents.append(sampler.encode_pictures(pipe, large))
    return torch.cat(latents)


# ---------------------------------------------------------------- opening


def open_model(values: Any) -> tuple[Decoder, TestEEG]:
    """The decoder and the EEG it is to read, checked against each other and the adapter."""
    injection_map.load_injection(values.injection)
    decoder = Decoder.load(values.model_path, values.checkpoint)
    if decoder.bank is None:
        raise UserError(
            "--model_path",
            f"{values.model_path}: an encoder without priors",
            "a run of train.py",
            "train the priors with train.py --init_from that run",
        )
    if values.init == "superpixel":
        low_level.load_head(values.model_path)
    injection_map.check_sdxl(values.sd_model_path)
    injection_map.check_ip_adapter(values.ip_adapter_path, decoder.bank.embed_dim)
    file, subject, data_path = locate_test_eeg(values.eeg_data, values.subject, values.data_path)
    test = open_test(
        file,
        subject,
        data_path,
        values.cache_dir,
        decoder.signal["channels"],
        decoder.signal["times"],
    )
    return decoder, test


def open_renderer(values: Any, device: torch.device, prompts: Sequence[str]) -> Renderer:
    """SDXL with the adapter, the scheduler and the options of this call."""
    pipe = injection_map.load_sdxl(
        values.sd_model_path,
        pick_dtype(values.precision, device),
        "cpu" if values.offload else device,
        values.vae_path,
    )
    sampler.set_scheduler(pipe, values.scheduler, values.timestep_spacing)
    injector = injection_map.Injector.install(
        pipe.unet, injection_map.read_ip_adapter(values.ip_adapter_path)
    )
    if values.offload:
        pipe.enable_model_cpu_offload(device=device)
    if values.compile:
        pipe.unet.compile()
    encoded = sampler.encode_prompt(pipe, list(prompts), [values.negative_prompt] * len(prompts))
    how = sampler.Denoising(
        values.steps,
        values.guidance,
        values.size,
        tuple(values.guidance_interval),
        values.init_strength if values.init == "superpixel" else 1.0,
    )
    return Renderer(pipe, injector, encoded, how, values.seed)


def predicted_gains(
    values: Any, decoder: Decoder, test: TestEEG, rows: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Fusion weights [n, M] of ``--fusion_weights``; None for the registered ones."""
    if values.fusion_weights == "fixed":
        return None
    read = controls.controlled_eeg(test, values.control, values.seed)
    return fusion.gains_for(
        values.fusion_weights,
        decoder.calibration,
        decoder.bank,
        decoder.condition(read, rows).to(device),
        [test.ids[row] for row in rows],
        values.seed,
    )


def draw_run(
    values: Any,
    run: util.RunDirectory,
    decoder: Decoder,
    test: TestEEG,
    rows: Sequence[int],
    prompts: Sequence[str],
    part: str,
) -> None:
    """Predict, save the predictions, draw."""
    device = util.pick_device(values.device)
    sampling = Sampling(
        values.prior_steps,
        values.prior_guidance,
        values.prior_sampler,
        values.prior_draws,
        values.restore_variance,
    )
    given = (decoder.to(device), test, rows)
    embeddings = controls.predict(
        *given, sampling, values.seed, values.control, values.clip_feature_path
    )
    gains = predicted_gains(values, *given, device)
    coarse = None
    if values.init == "superpixel":
        head = low_level.load_head(values.model_path)
        coarse = coarse_starts(decoder, head, test, rows, values.seed, values.control)
    util.save_tensors(
        run.path / f"embeddings{part}.safetensors",
        embeddings | {"stimulus": torch.tensor([test.ids[row] for row in rows])},
        {"clip": decoder.clip, "normalised": False, "subject": test.subject},
    )
    renderer = open_renderer(values, device, prompts)
    if coarse is not None:
        marks = marks_of(values.prompt_source, values.control)
        starts = encode_starts(renderer.pipe, coarse, values.size, run.path, test, rows, marks)
        renderer = replace(renderer, starts=starts)
    series = Series(
        values.mode,
        values.sweep,
        values.injection,
        values.fusion_strength,
        values.prompt_source,
        values.control,
        values.seed,
        None if values.batch_size == args.AUTO else values.batch_size,
        values.superpixel_size,
    )
    render(series, run, renderer, embeddings, gains, test, rows, part)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures of this shard, or go on drawing, or do nothing when they are finished."""
    options = args.resolve("generate", argv)
    values = options.values
    device = util.pick_device(values.device)
    decoder, test = open_model(values)
    oracle = values.prompt_source == "oracle"
    prompts = oracle_prompts(values.captions, test.stimuli) if oracle else [values.prompt]
    rows = shard_rows(min(values.max_stimuli or len(test.eeg), len(test.eeg)), values.shard)
    part = "" if values.shard == "1/1" else f"-{values.shard.replace('/', '-of-')}"
    what = f"a sweep of {values.sweep}" if values.sweep else f"{len(recipes(values.mode))} pictures"
    plan = (
        f"predict {len(MODALITIES)} embeddings of {len(rows)} stimuli seen by {test.subject}",
        f"draw {what} of {values.size} px of each of {len(rows)} on {device}",
    )
    inputs = model_inputs(values, test)
    run = util.open_run(
        options, values.output_dir, inputs, plan, part.removeprefix("-"), shared=True
    )
    if run.finished:
        return 0
    if not rows:  # more shards than stimuli: this one has nothing to do
        run.finish({"stimuli": 0, "what": what})
        return 0
    draw_run(values, run, decoder, test, rows, prompts, part)
    run.finish({"stimuli": len(rows), "what": what})
    print(f"pictures: {run.path}\noverview: {run.path / f'overview{part}.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
