"""The report: any subset of runs, the right picture at the right place, marks, escaping, size."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from PIL import Image

import report
import util
from datafiles.datasets.things_eeg2 import EEG_FOLDER
from datafiles.eeg_files import eeg_file
from datafiles.stimuli import list_stimuli
from modalities import NAMES, SITES, recipes
from reporting import thumbnails
from reporting.figures import eeg, scores, training
from reporting.figures import injection_map as injection_figures
from reporting.figures.injection_map import site_scales
from reporting.figures.scores import rank_counts
from reporting.material import Scores
from reporting.page import embedded_json
from reporting.tables import confusions, picture_table
from reporting.thumbnails import PICTURE_BUDGET, make_thumbnails
from reporting.words import ORACLE, plain
from rundirs.files import append_jsonl, read_json, read_jsonl, write_json
from sdxl import injection_map

METRICS = {
    "pixcorr": ("PixCorr", "higher", 0.0, True),
    "ssim": ("SSIM", "higher", None, True),
    "lpips": ("LPIPS", "lower", None, True),
    "clip": ("CLIP two-way", "higher", 0.5, True),
    "fid": ("FID", "lower", None, False),
}
QUERIES = ("encoder -> image", *(f"prior {name}" for name in NAMES), "fused priors")
CHANNELS = ("Fz", "Cz", "Pz", "O1", "O2")


# ---------------------------------------------------------------- a small set of runs


@dataclass(frozen=True)
class Runs:
    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def report(self, *names: str, out: str = "page.html", more: Sequence[object] = ()) -> Path:
        """Make a page of the named runs; its path."""
        output = self.root / out
        flags = ["--runs", *(self.root / name for name in names), "--output", output, *more]
        assert report.main([str(flag) for flag in flags]) == 0
        return output


ALL = ("model", "images", "shuffled_eeg", "true_embedding", "scores")


def colours(*names: object) -> np.ndarray:
    """Four colours that belong to a picture: uint8 [2, 2, 3]."""
    return util.numpy_generator_for(0, *names).integers(0, 256, (2, 2, 3)).astype(np.uint8)


def write_blocks(path: Path, blocks: np.ndarray, px: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize((px, px), resample=0).save(path)


def write_run(path: Path, stage: str, options: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    provenance = dict.fromkeys(options, "default")
    write_json(
        path / "options.json", {"stage": stage, "options": options, "provenance": provenance}
    )
    write_json(path / "env.json", [{"commit": "c0ffee", "started": "2026-01-01", "slurm": {}}])
    write_json(path / "inputs.json", {"eeg": "e" * 64})
    write_json(path / "DONE", {})
    return path


def write_training(path: Path, data: Path, epochs: int = 3) -> None:
    write_run(path, "train", {"data_path": str(data), "seed": 3, "time_window": [0.0, 0.1]})
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch, "step": epoch, "loss": 1 / epoch, "contrast": 2 / epoch}
        for place, name in enumerate(NAMES):
            record |= {f"prior_{name}": 1 / epoch + place, f"val_prior_{name}": 1.1 / epoch}
            record |= {f"val_{name}_skill": 0.1 * epoch, f"val_{name}_top1": 0.1 * epoch}
        record |= {"val_loss": 1.5 / epoch, "val_gallery": 20, "best_so_far": True}
        append_jsonl(path / "metrics.jsonl", record)


def write_drawing(
    path: Path,
    data: Path,
    mode: str = "all",
    control: str | None = None,
    prompt_source: str = "neutral",
    **options: Any,
) -> None:
    """A generate.py run whose pictures carry ``colours(run, recipe, key)``."""
    given = {"data_path": str(data), "injection": "intent", "control": control, "seed": 5}
    write_run(path, "generate", given | {"prompt_source": prompt_source} | options)
    for row, stimulus in enumerate(list_stimuli(data, "test")):
        for recipe in recipes(mode):
            file = f"{stimulus.folder}/{recipe.name}.png"
            # the last progressive step is the fused picture, as with the registered map
            name = "fused" if recipe.name == f"progressive_5_{NAMES[-1]}" else recipe.name
            write_blocks(path / file, colours(path.name, name, stimulus.key))
            record = {
                "stimulus": stimulus.id, "row": row, "folder": stimulus.folder,
                "recipe": recipe.name, "active": recipe.active, "file": file, "subject": "sub-01",
                "prompt_source": prompt_source, "control": control, "seed": 5,
                "injection": "intent",
            }  # fmt: skip
            append_jsonl(path / "images.jsonl", record)


def score(value: float, n: int, nan: int = 0) -> dict[str, Any]:
    return {
        "value": value, "interval": [value - 0.05, value + 0.05], "nan": nan, "n": n,
        "other_stimulus": value / 2,
    }  # fmt: skip


def write_scores(
    path: Path, data: Path, drawings: dict[str, Path], simulated: bool = False, **more: Any
) -> None:
    """An evaluate.py run. ``drawings``: {label: run}; score of stimulus k = k / N."""
    write_run(path, "evaluate", {"data_path": str(data), "images": None, "seed": 7})
    stimuli = list_stimuli(data, "test")
    draw = np.random.default_rng(1)
    rows, per_picture = [], []
    for label, run in drawings.items():
        records = read_jsonl(run / "images.jsonl")
        for place, name in enumerate(dict.fromkeys(record["recipe"] for record in records)):
            scores = {metric: score(0.4 + 0.03 * place, len(stimuli)) for metric in METRICS}
            scores["fid"] |= {"interval": None, "other_stimulus": None}
            about = {key: records[0][key] for key in ("prompt_source", "control")}
            rows.append(
                {"images": label, "recipe": name, **about, "n": len(stimuli), "scores": scores}
            )
            for k, item in enumerate(stimuli):
                values = {metric: k / len(stimuli) for metric in METRICS if metric != "fid"}
                per_picture.append(
                    {"images": label, "recipe": name, "stimulus": item.id, "picture": item.key,
                     "concept": item.concept, **values}
                )  # fmt: skip
    ranks = []
    for query in QUERIES:
        for item in stimuli:
            rank = int(draw.integers(1, len(stimuli) + 1))
            chosen = item if rank == 1 else stimuli[int(draw.integers(len(stimuli)))]
            ranks.append(
                {"subject": "sub-01", "query": query, "stimulus": item.id, "picture": item.key,
                 "concept": item.concept, "rank": rank, "chosen": chosen.key,
                 "chosen_concept": chosen.concept, "chosen_similarity": 0.5}
            )  # fmt: skip
    write_table(path / "ranks.csv", ranks)
    write_table(path / "pictures.csv", per_picture)
    results = {
        "retrieval": [retrieval_row(query, len(stimuli)) for query in QUERIES],
        "pictures": rows,
        "metrics": {
            name: {"label": label, "better": better, "chance": chance, "network": "N", "paired": p}
            for name, (label, better, chance, p) in METRICS.items()
        },
        "occlusion": occlusion(len(stimuli)),
        "skipped": [{"metric": "SwAV", "file": "swav.pth", "source": "https://a.org/" + "x" * 99}],
        "literature": {"field": [{"system": "A", "what": "w", "source": "doi", "ssim": 0.3}]},
        "protocol": {"pictures": "mindeye"},
        "seed": 7, "permutations": 200, "control": None, "simulated": simulated, "inputs": {},
    }  # fmt: skip
    write_json(path / "results.json", results | more)


def retrieval_row(query: str, n: int) -> dict[str, Any]:
    row = {"query": query, "subject": "sub-01", "n": n, "gallery": n, "mrr": 0.5, "2-way": 0.9}
    for k in (1, 5):
        row |= {f"top{k}": 0.6, f"top{k}_interval": [0.5, 0.7], f"top{k}_chance": k / n}
        row |= {f"top{k}_shuffled": k / n, f"top{k}_shuffled_range": [0.0, 0.1]}
        row |= {f"back_top{k}": 0.6, f"back_top{k}_interval": [0.5, 0.7]}
    return row


def occlusion(n: int) -> dict[str, Any]:
    drop = {"value": 0.1, "interval": [0.05, 0.15]}
    kinds = [("channel", name, [name], None, None) for name in CHANNELS]
    kinds += [("region", "occipital", ["O1", "O2"], None, None)]
    kinds += [("window", f"0.{k}-0.{k + 1} s", [], k / 10, (k + 1) / 10) for k in range(4)]
    rows = [
        {"kind": kind, "name": name, "channels": channels, "start_s": start, "end_s": end,
         "subject": "sub-01", "n": n, "drops": dict.fromkeys(("top1", "top5", "mrr"), drop)}
        for kind, name, channels, start, end in kinds
    ]  # fmt: skip
    return {"how": "replaced by the mean", "rows": rows}


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_data(root: Path, stimuli: int, concepts: Sequence[str] = ()) -> Path:
    """DATA: ``stimuli`` test pictures of their own colours, and one subject's test EEG."""
    names = [*concepts, *(f"thing_{k}" for k in range(len(concepts), stimuli))]
    for place, name in enumerate(names):
        folder = root / "test_images" / f"{place + 1:05d}_{name}"
        write_blocks(folder / "a.png", colours("seen", f"test_images/{folder.name}/a.png"))
    content = builders.published(0, stimuli, 2)
    builders.write_published(eeg_file(root, "sub-01", "test"), content)
    return root


def write_runs(root: Path, stimuli: int = 6, concepts: Sequence[str] = ()) -> Runs:
    runs = Runs(root)
    data = write_data(runs.data, stimuli, concepts)
    write_training(runs.model, data)
    write_drawing(runs.images, data)
    for control in ("shuffled_eeg", "true_embedding"):
        write_drawing(root / control, data, "fused", control)
    write_scores(
        runs.scores,
        data,
        {name: root / name for name in ("images", "shuffled_eeg", "true_embedding")},
    )
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return write_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(runs: Runs) -> str:
    return runs.report(*ALL).read_text(encoding="utf-8")


@pytest.fixture()
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as their texts alone, for tests of other things: drawing takes most of the time."""

    def described(alt: str, height_px: int, draw: Any, width_px: int = 0) -> str:
        return f'<svg role="img" aria-label="{html.escape(alt)}"></svg>'

    for module in (eeg, injection_figures, scores, training):
        monkeypatch.setattr(module, "draw_svg", described)


# ---------------------------------------------------------------- reading a page


class Reader(HTMLParser):
    """What a browser would make of a page: elements, resources, text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._raw = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def embedded(page: str) -> dict[str, Any]:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def decoded(uri: str) -> np.ndarray:
    """The four colours of a data URI's picture: float [2, 2, 3]."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")
    return np.asarray(picture.resize((4, 4), resample=4), float)[::3, ::3]


def gallery(page: str) -> dict[str, Any]:
    """{concept: {"seen" | recipe | control: colours}} of the first run, as the script shows it."""
    data = embedded(page)
    run, shown = data["runs"][0], {}
    for place, card in run["cards"].items():
        stimulus = data["stimuli"][int(place)]
        pictures = {"seen": stimulus["picture"], **card}
        for control in run["controls"]:
            pictures[control["label"]] = control["pictures"][place]
        shown[stimulus["concept"]] = {
            name: decoded(data["pictures"][index]) for name, index in pictures.items()
        }
    return shown


def sections(page: str) -> dict[str, str]:
    """{id: text} of the page's sections."""
    parts = re.split(r'<section id="(\w+)"', page)
    return {name: Reader(f"<p {part}").text for name, part in zip(parts[1::2], parts[2::2])}  # noqa: B905


# ---------------------------------------------------------------- pictures at their places


def test_every_picture_hangs_at_its_own_place(runs: Runs, page: str):
    shown = gallery(page)
    assert len(shown) == 6
    for stimulus in list_stimuli(runs.data, "test"):
        wall = shown[stimulus.concept.replace("_", " ")]
        expected = {"seen": colours("seen", stimulus.key)}
        for recipe in recipes("all"):
            name = "fused" if recipe.name == "progressive_5_image" else recipe.name
            expected[recipe.name] = colours("images", name, stimulus.key)
        for control, label in (
            ("shuffled_eeg", "fused, shuffled EEG"),
            ("true_embedding", "fused, true embeddings (ceiling)"),
        ):
            expected[label] = colours(control, "fused", stimulus.key)
        assert wall.keys() == expected.keys()
        for name, blocks in expected.items():
            assert np.abs(wall[name] - blocks).max() < 30, (stimulus.key, name)


@pytest.mark.usefixtures("no_figures")
def test_pictures_join_by_id_not_by_row(runs: Runs, tmp_path: Path):
    journal = runs.images / "images.jsonl"
    records = read_jsonl(journal)
    other = Runs(tmp_path)
    other.images.mkdir()
    for path in runs.images.rglob("*.png"):
        target = other.images / path.relative_to(runs.images)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (other.images / "options.json").write_text((runs.images / "options.json").read_text())
    for record in reversed(records):  # as shards write them
        append_jsonl(other.images / "images.jsonl", record | {"row": 0})
    found = gallery(other.report("images").read_text(encoding="utf-8"))
    expected = gallery(runs.report("images", out="one.html").read_text(encoding="utf-8"))
    for concept, wall in expected.items():
        for name, blocks in wall.items():
            assert np.array_equal(found[concept][name], blocks)


def test_equal_pictures_are_stored_once(page: str):
    data = embedded(page)
    assert len(set(data["pictures"])) == len(data["pictures"])
    for card in data["runs"][0]["cards"].values():
        assert card["progressive_5_image"] == card["fused"]


def test_pictures_of_other_stimuli_are_refused(runs: Runs, tmp_path: Path, capsys):
    other = write_data(tmp_path / "other", 3, ["else_1", "else_2", "else_3"])
    flags = ["--runs", runs.images, "--data_path", other, "--output", tmp_path / "x.html"]
    assert report.main([str(flag) for flag in flags]) == 1
    assert "pictures of stimuli that" in capsys.readouterr().err


def test_confusions_show_the_pictures_they_name(runs: Runs, page: str):
    data, section = embedded(page), page[page.index('<section id="ranks"') :]
    paired = re.findall(r'<img data-picture="(\d+)" alt="(?:seen|retrieved): ([^"]+)">', section)
    assert len(paired) > 6
    keys = {item.concept.replace("_", " "): item.key for item in list_stimuli(runs.data, "test")}
    for index, concept in paired:
        found = decoded(data["pictures"][int(index)])
        assert np.abs(found - colours("seen", keys[concept])).max() < 30


def test_most_frequent_confusions_are_counted():
    rows = [
        {"query": "q", "subject": "s", "picture": seen, "chosen": chosen, "rank": rank}
        for seen, chosen, rank in (
            ("a", "b", "2"),
            ("a", "b", "3.5"),
            ("b", "b", "1"),
            ("c", "b", "9"),
        )
    ]
    found = confusions(rows)
    assert found["pairs"] == [("a", "b", 2), ("c", "b", 1)]
    assert found["hubs"] == [("b", 3)]
    assert (found["wrong"], found["total"]) == (3, 4)


def test_rank_histogram_beside_chance():
    rows = [{"rank": rank} for rank in ("1", "1.5", "3", "12")]
    found = rank_counts(rows, 20)
    assert [(label, count) for label, count, _ in found] == [
        ("1", 2), ("2–5", 1), ("6–10", 0), ("11–20", 1),
    ]  # fmt: skip
    assert sum(expected for _, _, expected in found) == pytest.approx(4)


# ---------------------------------------------------------------- any subset of runs


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("names", [("model",), ("images",), ("scores",), ("shuffled_eeg", "model")])
def test_a_report_of_any_runs_says_what_is_missing(runs: Runs, names: tuple[str, ...]):
    found = sections(runs.report(*names, out="some.html").read_text(encoding="utf-8"))
    empty = {name for name, text in found.items() if "among these runs" in text}
    expected = {"gallery", "scores", "contribution", "ranks", "training", "injection"}
    expected -= {"training"} if "model" in names else set()
    expected -= {"gallery", "injection"} if {"images", "shuffled_eeg"} & {*names} else set()
    expected -= {"scores", "contribution", "ranks"} if "scores" in names else set()
    assert empty == expected
    assert ("--occlusion" in found["occlusion"]) == ("scores" not in names)


def test_everything_is_there_with_its_numbers(page: str):
    found = sections(page)
    assert not any("among these runs" in text for text in found.values())
    assert "[0.350, 0.450]" in found["scores"] and "other: 0.200" in found["scores"]
    assert "60.0 % [50.0, 70.0]" in found["scores"]
    assert "shuffled EEG: 16.7 % (0.0–10.0)" in found["scores"]
    assert "95 % bootstrap over stimuli" in found["scores"]
    assert "c0ffee" in found["runs"] and "e" * 64 in found["runs"]
    assert "N = 6" in found["eeg"] and "units of the file, which says nothing" in found["eeg"]
    assert "replaced by the mean" in found["occlusion"]
    assert "SwAV" in found["scores"] and "Published figures: field" in found["scores"]


def test_training_curves_read_every_modality(page: str):
    labels = " ".join(dict(attrs).get("aria-label") or "" for _, attrs in Reader(page).tags)
    for name in NAMES:
        assert f"{plain(name)} 0.300" in labels
    assert "total loss: from 1.000 to 0.333" in labels


def test_injection_map_shows_the_registered_scales(page: str):
    labels = [attrs.get("aria-label") or "" for tag, attrs in Reader(page).tags if tag == "svg"]
    alone = next(text for text in labels if "drawn alone" in text)
    assert "few at down.1 0.57" in alone and "text at mid 1.00" in alone
    together = next(text for text in labels if "all five" in text)
    assert "image at up.1 0.80" in together and "text at up.1 0.20" in together


def test_injection_scales_of_single_layers_are_averaged():
    preset = injection_map.load_injection("content_style")
    alone = site_scales(preset, 1.0)["alone"]
    site = list(SITES).index("down.2")
    # its share of one of two attentions, where a superpixel scale is, too
    table = injection_map.scales(recipes("separate")[3], preset)[3]
    rows = [n for n, layer in enumerate(injection_map.sdxl_layers()) if layer.site == "down.2"]
    assert alone[NAMES.index("text"), site] == pytest.approx(float(table[rows].mean()))
    assert 0 < (table[rows] > 0).float().mean() < 1


@pytest.mark.usefixtures("no_figures")
def test_a_missing_preset_is_said(runs: Runs, tmp_path: Path):
    write_drawing(tmp_path / "images", runs.data, "fused", injection="gone.yaml")
    page = Runs(tmp_path).report("images").read_text(encoding="utf-8")
    assert "cannot be drawn: --injection: gone.yaml" in sections(page)["injection"]


def test_a_real_run_of_generate_and_train(chain, tmp_path: Path):
    import generate

    out = tmp_path / "images"
    assert generate.main(chain.generate_flags(out, "--mode", "fused")) == 0
    output = tmp_path / "page.html"
    flags = [str(flag) for flag in ("--runs", out, chain.model, "--output", output)]
    assert report.main(flags) == 0
    page = output.read_text(encoding="utf-8")
    assert "SIMULATED EEG" in Reader(page).text
    stimuli = list_stimuli(chain.data, "test")[:2]
    data = embedded(page)
    assert [item["concept"] for item in data["stimuli"]] == [
        item.concept.replace("_", " ") for item in stimuli
    ]
    for place, stimulus in enumerate(stimuli):
        with Image.open(stimulus.path) as seen:
            expected = np.asarray(seen.convert("RGB").resize((4, 4), resample=4), float)[::3, ::3]
        found = decoded(data["pictures"][data["stimuli"][place]["picture"]])
        assert np.abs(found - expected).max() < 30


# ---------------------------------------------------------------- marks, escaping, NaN


@pytest.mark.usefixtures("no_figures")
def test_controls_are_marked(runs: Runs, page: str):
    mark = "CONTROL: the EEG of another stimulus"
    assert mark in sections(page)["scores"] and mark in sections(page)["runs"]
    run = embedded(page)["runs"][0]
    assert [item["short"] for item in run["controls"]] == ["shuffled EEG", "ceiling"]
    alone = runs.report("shuffled_eeg", out="alone.html").read_text(encoding="utf-8")
    assert embedded(alone)["runs"][0]["marks"] == [mark]
    assert mark in Reader(alone[: alone.index("<main")]).text


@pytest.mark.usefixtures("no_figures")
def test_oracle_prompts_are_marked(runs: Runs, tmp_path: Path):
    write_drawing(tmp_path / "images", runs.data, "fused", prompt_source="oracle")
    write_scores(tmp_path / "scores", runs.data, {"images": tmp_path / "images"})
    page = Runs(tmp_path).report("images", "scores").read_text(encoding="utf-8")
    assert ORACLE in Reader(page[: page.index("<main")]).text
    assert ORACLE in sections(page)["scores"] and ORACLE in sections(page)["summary"]
    assert ORACLE in sections(page)["contribution"]
    assert embedded(page)["runs"][0]["marks"] == [ORACLE]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("told_by", ["results", "folder"])
def test_simulated_eeg_is_said_first(tmp_path: Path, told_by: str):
    runs = Runs(tmp_path)
    write_data(runs.data, 3)
    write_drawing(runs.images, runs.data, "fused")
    write_scores(runs.scores, runs.data, {"images": runs.images}, simulated=told_by == "results")
    if told_by == "folder":
        write_json(runs.data / EEG_FOLDER / "sub-01" / "simulated.json", {})
    page = runs.report("images", "scores").read_text(encoding="utf-8")
    head = Reader(page[: page.index("<main")]).text
    assert "SIMULATED EEG. Nothing on this page was measured on a person" in head
    for name in ("summary", "gallery", "scores", "contribution", "ranks", "eeg", "occlusion"):
        assert "SIMULATED" in sections(page)[name], name


def test_recorded_eeg_is_not_called_simulated(page: str):
    assert "SIMULATED" not in Reader(page).text


HOSTILE = "<script>alert(1)</script>&\"'"


def test_hostile_names_and_options_stay_text(tmp_path: Path):
    name = "x<img onerror=alert(1)>&\"'$a$"  # what a folder name may hold
    runs = Runs(tmp_path)
    write_data(runs.data, 3, [name, "</script><b>", "plain"][:1])
    write_drawing(runs.images, runs.data, "fused", prompt=HOSTILE, fusion_weights=HOSTILE)
    write_scores(
        runs.scores,
        runs.data,
        {"images": runs.images},
        protocol={HOSTILE: HOSTILE},
        literature={HOSTILE: [{"system": HOSTILE, "what": HOSTILE, "source": HOSTILE}]},
        skipped=[{"metric": HOSTILE, "file": HOSTILE, "source": HOSTILE}],
    )
    page = runs.report("images", "scores").read_text(encoding="utf-8")
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert not any(key.startswith("on") for _, attrs in reader.tags for key in attrs)
    assert HOSTILE in reader.text
    assert name in {item["concept"] for item in embedded(page)["stimuli"]}


def test_embedded_json_holds_no_markup_and_no_nan():
    text = embedded_json({"a": [float("nan"), HOSTILE + "\u2028"], 1: (2.5,)})
    assert not set("<>&\u2028") & set(text) and "NaN" not in text
    assert json.loads(text) == {"a": [None, HOSTILE + "\u2028"], "1": [2.5]}


def test_a_comparison_is_shown(tmp_path: Path):
    write_run(tmp_path / "comparison", "evaluate", {"seed": 0})
    row = {
        "what": "fused", "label": "SSIM", "better": "higher", "n": 9, "a": 0.5, "b": 0.25,
        "difference": 0.25, "interval": [0.2, 0.3], "nan": 0, "p": 0.0012, "p_holm": 0.0024,
    }  # fmt: skip
    found = {"a": "OUT/x", "b": "OUT/y", "rows": [row], "protocol": {"pairing": "by stimulus"}}
    write_json(tmp_path / "comparison" / "comparison.json", found)
    text = sections(Runs(tmp_path).report("comparison").read_text(encoding="utf-8"))["scores"]
    assert "fused: SSIM 9 0.500 0.250 0.250 [0.200, 0.300] 0.0012 0.0024" in text
    assert "A: OUT/x; B: OUT/y. pairing: by stimulus." in text


@pytest.mark.usefixtures("no_figures")
def test_nan_is_a_dash_with_its_count(runs: Runs, tmp_path: Path):
    write_scores(tmp_path / "scores", runs.data, {"images": runs.images})
    path = tmp_path / "scores" / "results.json"
    results = read_json(path)
    results["pictures"][0]["scores"]["ssim"] |= {"value": float("nan"), "nan": 2}
    path.write_text(json.dumps(results))
    text = sections(Runs(tmp_path).report("scores").read_text(encoding="utf-8"))["scores"]
    assert re.search(r"– other: [\d.]+ NaN: 2 of 6", text)
    assert "nan" not in text


@pytest.mark.parametrize(
    ("rows", "best"),
    [([[0.1, 0.2], [0.3, 0.4]], [False, True]), ([[0.1, 0.35], [0.3, 0.4]], [False, False])],
)
def test_best_is_bold_only_beyond_the_intervals(rows: list, best: list):
    scores = [
        {"recipe": name, "images": "i", "prompt_source": "neutral", "control": None, "n": 3,
         "scores": {"ssim": {"value": sum(ends) / 2, "interval": ends}}}
        for name, ends in zip(("separate_text", "fused"), rows, strict=True)
    ]  # fmt: skip
    about = {"ssim": {"label": "SSIM", "better": "higher", "chance": None, "paired": True}}
    item = Scores(None, {"pictures": scores, "metrics": about}, [], [])
    table = picture_table(item)
    assert [row["cells"][0]["best"] for row in table["rows"]] == best


# ---------------------------------------------------------------- one file, made once


def test_nothing_is_loaded_from_anywhere(page: str):
    addresses = [
        value
        for _, attrs in Reader(page).tags
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
    ]
    assert addresses and all(value.startswith(("data:", "#")) for value in addresses)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style and "@import" not in style
    policies = [attrs["content"] for _, attrs in Reader(page).tags if "http-equiv" in attrs]
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; ")
    assert "script-src 'sha256-" in policies[0]
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", script)


def test_labels_and_alternatives(page: str):
    reader = Reader(page)
    assert all(attrs.get("alt") for tag, attrs in reader.tags if tag == "img")
    shown = [attrs for tag, attrs in reader.tags if tag == "svg"]
    assert shown and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in shown)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)


def test_the_same_inputs_make_nothing_and_changed_ones_a_new_page(tmp_path: Path, capsys):
    runs = Runs(tmp_path)
    write_data(runs.data, 2)
    write_training(runs.model, runs.data)
    write_drawing(runs.images, runs.data, "fused")
    page = runs.report("images", "model")
    before = page.stat().st_mtime_ns, page.read_bytes()
    starts = read_json(runs.images / "env.json")
    write_json(runs.images / "env.json", [*starts, *starts])  # started again when finished
    runs.report("images", "model")
    assert (page.stat().st_mtime_ns, page.read_bytes()) == before
    assert "already up to date" in capsys.readouterr().out
    write_json(runs.images / "env.json", starts)
    page.unlink()
    runs.report("images", "model")
    assert page.read_bytes() == before[1]
    write_blocks(next(runs.images.glob("*/fused.png")), colours("changed"))
    runs.report("images", "model")
    assert page.read_bytes() != before[1]
    assert f"report: {page}" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["my thesis", "", '<meta name="generator" content="other">'])
def test_a_foreign_file_is_refused(runs: Runs, tmp_path: Path, content: str, capsys):
    target = tmp_path / "page.html"
    target.write_text(content)
    assert report.main(["--runs", str(runs.model), "--output", str(target)]) == 2
    assert target.read_text() == content
    assert "that report.py did not write" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path, capsys):
    runs = write_runs(tmp_path, 2)
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "page.html"
    flags = ["--runs", runs.images, runs.model, "--output", output, "--dry_run"]
    assert report.main([str(flag) for flag in flags]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "show 2 runs" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_default_output_lies_beside_the_first_run(tmp_path: Path, capsys):
    write_training(tmp_path / "model", tmp_path / "gone")
    assert report.main(["--runs", str(tmp_path / "model")]) == 0
    assert (tmp_path / "report.html").is_file()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_wrong_runs_are_refused(runs: Runs, tmp_path: Path, capsys):
    write_run(tmp_path / "bank", "features", {})
    for path, said in (
        (tmp_path / "nowhere", "no such folder"),
        (runs.data, "a folder without options.json"),
        (tmp_path / "bank", "a run of 'features'"),
    ):
        assert report.main(["--runs", str(path), "--output", str(tmp_path / "p.html")]) == 2
        assert said in capsys.readouterr().err


def test_scores_of_an_older_version_are_refused(tmp_path: Path, capsys):
    write_run(tmp_path / "scores", "evaluate", {})
    write_json(tmp_path / "scores" / "results.json", {"retrieval": [], "pictures": []})
    assert report.main(["--runs", str(tmp_path / "scores")]) == 1
    assert "made by an older version" in capsys.readouterr().err


def test_a_lost_picture_is_told(tmp_path: Path, capsys):
    runs = Runs(tmp_path)
    write_data(runs.data, 2)
    write_drawing(runs.images, runs.data, "fused")
    next(runs.images.glob("*/fused.png")).unlink()
    assert report.main(["--runs", str(runs.images)]) == 1
    assert "no picture 0000" in capsys.readouterr().err


def test_a_journal_cannot_reach_outside_its_run(tmp_path: Path):
    runs = Runs(tmp_path)
    write_data(runs.data, 2)
    write_drawing(runs.images, runs.data, "fused")
    journal = runs.images / "images.jsonl"
    record = read_jsonl(journal)[0] | {"file": "../data/test_images/00001_thing_0/a.png"}
    append_jsonl(journal, record)
    assert report.main(["--runs", str(runs.images)]) == 1


def test_two_hundred_stimuli_stay_below_15_mb(tmp_path: Path, monkeypatch):
    """Noise is the worst that WebP can meet: smaller pictures, but all of them."""
    draw = np.random.default_rng(0)
    noisy = [draw.integers(0, 256, (128, 128, 3)).astype(np.uint8) for _ in range(40)]
    pictures = [Image.fromarray(pixels) for pixels in noisy]
    monkeypatch.setattr(thumbnails, "open_picture", lambda path, px: pictures[int(path.name) % 40])
    paths = {Path(str(k)): str(k) for k in range(200 * 14)}
    sizes = []
    monkeypatch.setattr(thumbnails, "data_uri", lambda content: sizes.append(len(content)) or
                        "data:" + base64.b64encode(content).decode())  # fmt: skip
    thumbs = make_thumbnails(paths, {Path(str(k)) for k in range(400)})
    assert len(thumbs.uris) == 2800
    assert sum(map(len, thumbs.uris)) <= PICTURE_BUDGET
    assert thumbs.px >= 40
