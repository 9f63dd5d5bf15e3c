"""Pictures on disk and the sheets that show them side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datafiles import superpixel
from datafiles.pictures import read_picture
from datafiles.stimuli import Stimulus, concept_of_folder
from dataset import TestEEG
from generation import variants
from modalities import MARKS, marks_of
from rundirs.files import atomic_write

THUMBNAIL_PX = 160
OVERVIEW_ROWS = 12


def marked(name: str, marks: Sequence[str]) -> str:
    """A file's name with its marks."""
    return "_".join((name, *marks)) + ".png"


def marked_title(title: str, marks: Sequence[str]) -> str:
    return "   ".join((title, *(f"[{MARKS[mark]}]" for mark in marks)))


def save_picture(path: Path, picture: np.ndarray, note: str) -> None:
    """Write uint8 [H, W, 3] as PNG with a note in its metadata, atomically."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", note)
    with atomic_write(path, "wb") as file:
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
        name = concept_of_folder(test.names[row]).replace("_", " ")
        if stacked:
            for kind in kinds:
                cells = drawn_cells(out, test.names[row], [kind], marks)
                lines.append((f"{kind.name}: {name}", [*seen(row)[:1], *cells]))
        else:
            lines.append((name, [*seen(row), *drawn_cells(out, test.names[row], kinds, marks)]))
    return labelled_grid(lines, marked_title(f"subject {test.subject}: {title}", marks))


def draws_sheet(
    out: Path,
    test: TestEEG,
    seen: Callable[[int], Sequence[tuple[str, Any]]],
    records: Sequence[Mapping[str, Any]],
) -> Any:
    """All draws of one recipe, of the first stimuli, with what each agreed by; the kept one first.

    ``records``: of the journal.
    """
    by_row = {record["row"]: record for record in records}
    lines = []
    for row in sorted(by_row)[:OVERVIEW_ROWS]:
        record = by_row[row]
        cells = [*seen(row)[:1], ("kept", read_picture(out / record["file"]))]
        for draw, file in enumerate(record["draw_files"]):
            agreed = f": {record['agreements'][draw]:.3f}" if record["agreements"] else ""
            kept = " (kept)" if draw == record["draw"] else ""
            cells.append((f"{draw}{agreed}{kept}", read_picture(out / file)))
        lines.append((concept_of_folder(test.names[row]).replace("_", " "), cells))
    how = f"{records[0]['recipe']}, {records[0]['draws']} draws, one kept by {records[0]['choose']}"
    marks = marks_of(records[0]["prompt_source"], records[0]["control"])
    return labelled_grid(lines, marked_title(f"subject {test.subject}: {how}", marks))


def save_sheet(path: Path, sheet: Any) -> None:
    with atomic_write(path, "wb") as file:
        sheet.save(file, format="PNG")
