"""Stage 3: EEG -> five predicted CLIP embeddings -> pictures, injected layer-wise into SDXL."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("generate")

import numpy as np
import torch

import controls
import fusion
import injection
import superpixel
import util
from ATMS_retrieval import Decoder, model_file
from dataset import (
    SIMULATED_NOTE,
    Stimulus,
    TestEEG,
    caption,
    locate_test_eeg,
    open_test,
    read_captions,
)
from modalities import MODALITIES, NAMES, recipes
from unet import Sampling
from util import UserError

THUMBNAIL_PX = 160
OVERVIEW_ROWS = 12


# ---------------------------------------------------------------- embeddings + recipes -> pictures


@dataclass(frozen=True)
class Task:
    """One picture to draw: the test ``row`` it shows and ``names``, the recipes that equal it."""

    row: int
    names: tuple[str, ...]
    scales: torch.Tensor  # [M, L]


def distinct_recipes(
    mode: str,
    preset: injection.InjectionMap,
    layers: Sequence[injection.Layer],
    strength: float,
    gains: torch.Tensor | None = None,
) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """(names, scales [M, L]) of the mode's recipes; recipes with equal scales are drawn once.

    ``gains`` [M]: instead of the registered ones.
    """
    distinct: dict[bytes, tuple[tuple[str, ...], torch.Tensor]] = {}
    for recipe in recipes(mode):
        table = injection.scales(recipe, preset, layers, strength, gains)
        key = table.numpy().tobytes()
        names = distinct[key][0] if key in distinct else ()
        distinct[key] = ((*names, recipe.name), table)
    return list(distinct.values())


def shard_rows(count: int, shard: str) -> list[int]:
    """Rows of the i-th of n parts; every row is in exactly one part."""
    index, parts = util.parse_shard(shard)
    return list(range(index - 1, count, parts))


@dataclass(frozen=True)
class Renderer:
    """SDXL with the adapter installed, and the drawing options that all pictures share."""

    pipe: Any
    injector: injection.Injector
    prompts: (
        injection.PromptEmbeds
    )  # encoded once: one for all rows, or one per row of the test set
    steps: int
    guidance: float
    size: int
    seed: int

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
        one = len(self.prompts.text) == 1
        return injection.draw(
            self.pipe,
            self.injector,
            embeddings[[places[row] for row in rows]],
            torch.stack([task.scales for task in tasks]),
            [util.seed_for(self.seed, "sdxl", ids[row]) for row in rows],
            self.prompts if one else self.prompts.chosen(rows),
            self.steps,
            self.guidance,
            self.size,
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


def short(name: str) -> str:
    """A recipe's or modality's name as people read it."""
    plain = name.replace("superpixel_", "")
    if plain.startswith("progressive_"):
        step, _, added = plain.removeprefix("progressive_").partition("_")
        return f"step {step}: {'+ ' if step != '1' else ''}{added}"
    return plain.replace("separate_", "only ")


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(maxsize=OVERVIEW_ROWS)
def stimulus_views(stimulus: Stimulus, slic_px: int) -> list[tuple[str, Any]]:
    """The stimulus and its superpixel versions, labelled."""
    from PIL import Image

    picture = superpixel.read_picture(stimulus.path)
    levels = superpixel.superpixels(superpixel.at_slic_size(picture, slic_px))
    return [
        ("stimulus", picture),
        *((short(name), Image.fromarray(pixels)) for name, pixels in levels.items()),
    ]


def contact_sheet(
    out: Path, folder: str, stimulus: Stimulus | None, slic_px: int, mode: str, marks: Sequence[str]
) -> Any:
    """One stimulus: what was seen, then each mode's pictures in a row."""
    rows = [("seen", stimulus_views(stimulus, slic_px))] if stimulus else []
    for part in ("separate", "fused", "progressive") if mode == "all" else (mode,):
        cells = [
            (short(recipe.name), _open(out / folder / marked(recipe.name, marks)))
            for recipe in recipes(part)
        ]
        rows.append((part, cells))
    return labelled_grid(rows, marked_title(folder, marks))


def overview(
    out: Path, test: TestEEG, rows: Sequence[int], slic_px: int, mode: str, marks: Sequence[str]
) -> Any:
    """The first stimuli below each other: what was seen, then one recipe per column."""
    lines = []
    for row in rows[:OVERVIEW_ROWS]:
        seen = stimulus_views(test.stimuli[row], slic_px) if test.stimuli else []
        drawn = [
            (short(recipe.name), _open(out / test.names[row] / marked(recipe.name, marks)))
            for recipe in recipes(mode)
        ]
        lines.append((test.names[row].split("_", 1)[-1].replace("_", " "), [*seen, *drawn]))
    return labelled_grid(lines, marked_title(f"subject {test.subject}: {mode}", marks))


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


def batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


def write_pictures(
    out: Path,
    journal: Path,
    done: set[tuple[int, str]],
    tasks: Sequence[Task],
    pictures: np.ndarray,
    test: TestEEG,
    about: Mapping[str, Any],
) -> None:
    """Save a batch under all its recipes' names and journal each picture after it is on disk."""
    marks = marks_of(about["prompt_source"], about["control"])
    note = "; ".join(args.MARKS[mark] for mark in marks) or "neutral prompt"
    for task, picture in zip(tasks, pictures, strict=True):
        for name in task.names:
            file = f"{test.names[task.row]}/{marked(name, marks)}"
            active = {recipe.name: recipe.active for recipe in recipes("all")}[name]
            save_picture(out / file, picture, note)
            util.append_jsonl(
                journal,
                {
                    "stimulus": test.ids[task.row],
                    "row": task.row,
                    "folder": test.names[task.row],
                    "recipe": name,
                    "active": active,
                    "file": file,
                    **about,
                },
            )
            done.add((test.ids[task.row], name))


@dataclass(frozen=True)
class Series:
    """What is drawn of every stimulus, in what batches, and how it is recorded."""

    mode: str
    injection: str
    strength: float
    prompt_source: str
    control: str | None
    seed: int
    batch_size: int
    slic_px: int  # of the superpixels on the contact sheets


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
    """Draw what is missing, batch by batch over stimuli and recipes, then the contact sheets.

    ``gains`` [n, M]: fusion weights of each row; None: the registered ones.
    """
    from tqdm import tqdm

    out, ids, marks = run.path, test.ids, marks_of(series.prompt_source, series.control)
    journal = out / f"images{part}.jsonl"
    preset = injection.load_injection(series.injection)
    layers = renderer.injector.layers
    tasks = [
        Task(row, names, table)
        for place, row in enumerate(rows)
        for names, table in distinct_recipes(
            series.mode, preset, layers, series.strength, None if gains is None else gains[place]
        )
    ]
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
    missing = pending(tasks, done, ids)
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc="drawing", unit="picture"
    ) as bar:
        for batch in batches(missing, series.batch_size):
            pictures = renderer.draw(batch, stacked, ids, places)
            write_pictures(out, journal, done, batch, pictures, test, about)
            bar.update(len(batch))
    view = (series.slic_px, series.mode, marks)
    save_sheet(out / f"overview{part}.png", overview(out, test, rows, *view))
    if len(recipes(series.mode)) == 1:  # the overview has it all
        return
    for row in tqdm(rows, desc="contact sheets", unit="sheet"):
        path = out / test.names[row] / marked("sheet", marks)
        if not path.exists():
            stimulus = test.stimuli[row] if test.stimuli else None
            save_sheet(path, contact_sheet(out, test.names[row], stimulus, *view))


def open_model(values: Any) -> tuple[Decoder, TestEEG]:
    """The decoder and the EEG it is to read, checked against each other and the adapter."""
    injection.load_injection(values.injection)
    decoder = Decoder.load(values.model_path, values.checkpoint)
    if decoder.bank is None:
        raise UserError(
            "--model_path",
            f"{values.model_path}: an encoder without priors",
            "a run of train.py",
            "train the priors with train.py --init_from that run",
        )
    injection.check_sdxl(values.sd_model_path)
    injection.check_ip_adapter(values.ip_adapter_path, decoder.bank.embed_dim)
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
    plan = (
        f"predict {len(MODALITIES)} embeddings of {len(rows)} stimuli seen by {test.subject}",
        f"draw {len(rows)} x {len(recipes(values.mode))} pictures of {values.size} px on {device}",
    )
    inputs = model_inputs(values, test)
    run = util.open_run(options, values.output_dir, inputs, plan, part.removeprefix("-"))
    if run.finished:
        return 0
    sampling = Sampling(
        values.prior_steps, values.prior_guidance, values.prior_sampler, values.prior_draws
    )
    embeddings = controls.predict(
        decoder.to(device),
        test,
        rows,
        sampling,
        values.seed,
        values.control,
        values.clip_feature_path,
    )
    gains = None
    if values.fusion_weights != "fixed":
        read = controls.controlled_eeg(test, values.control, values.seed)
        gains = fusion.gains_for(
            values.fusion_weights,
            decoder.calibration,
            decoder.bank,
            decoder.condition(read, rows).to(device),
            [test.ids[row] for row in rows],
            values.seed,
        )
    util.save_tensors(
        run.path / f"embeddings{part}.safetensors",
        embeddings | {"stimulus": torch.tensor([test.ids[row] for row in rows])},
        {"clip": decoder.clip, "normalised": False, "subject": test.subject},
    )
    pipe = injection.load_sdxl(
        values.sd_model_path, pick_dtype(values.precision, device), device, values.vae_path
    )
    injector = injection.Injector.install(
        pipe.unet, injection.read_ip_adapter(values.ip_adapter_path)
    )
    encoded = injection.encode_prompt(pipe, prompts, [values.negative_prompt] * len(prompts))
    renderer = Renderer(
        pipe, injector, encoded, values.steps, values.guidance, values.size, values.seed
    )
    series = Series(
        values.mode,
        values.injection,
        values.fusion_strength,
        values.prompt_source,
        values.control,
        values.seed,
        values.batch_size,
        values.superpixel_size,
    )
    render(series, run, renderer, embeddings, gains, test, rows, part)
    run.finish({"stimuli": len(rows), "recipes": len(recipes(values.mode))})
    print(f"pictures: {run.path}\noverview: {run.path / f'overview{part}.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
