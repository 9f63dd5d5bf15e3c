"""The report in a browser: opened from disk, without network, by keyboard, small and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_report

ARGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-sync")  # fmt: skip
CONCEPTS = ("red_apple", "green_pear", "red_boat", *(f"thing_{k}" for k in range(3, 15)))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = test_report.write_runs(tmp_path_factory.mktemp("browser"), len(CONCEPTS), CONCEPTS)
    return runs.report(*test_report.ALL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    with sync_api.sync_playwright() as playwright:
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(names)} on the path, none of playwright's")
        started = playwright.chromium.launch(executable_path=program, args=list(ARGS))
        yield started
        started.close()


@pytest.fixture()
def open_page(browser: Any, page_file: Path) -> Iterator[Any]:
    """A function that opens the page in a window; nothing may go wrong or go out meanwhile."""
    troubles, contexts = [], []

    def note(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            troubles.append(request.url)

    def opened(width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", note)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def concepts(page: Any) -> list[str]:
    """The shown cards' concepts, in order."""
    return page.eval_on_selector_all(
        ".card h3", "cards => cards.map(card => card.firstChild.textContent)"
    )


def test_every_picture_is_there(open_page):
    page = open_page()
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    sizes = page.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
    assert len(sizes) > 12 * 14 and min(sizes) > 0


def test_cards_come_in_portions(open_page):
    page = open_page()
    assert len(concepts(page)) == 12
    page.get_by_role("button", name="Show 3 more").click()
    assert len(concepts(page)) == 15
    assert page.locator("#more").is_hidden()


def test_search_filters_and_announces(open_page):
    page = open_page()
    count = page.locator("#count[aria-live=polite]")
    assert count.inner_text().startswith("15 of 15 stimuli")
    page.get_by_label("Concept").fill("Red")
    assert concepts(page) == ["red apple", "red boat"]
    assert count.inner_text().startswith("2 of 15 stimuli match “Red”")
    page.get_by_label("Concept").fill("red apple")
    assert concepts(page) == ["red apple"]
    page.get_by_label("Concept").fill("nothing like it")
    assert concepts(page) == []
    assert count.inner_text().startswith("0 of 15")


@pytest.mark.parametrize(
    ("sort", "first"),
    [  # the score of stimulus k is k / N; LPIPS is better the lower it is
        ("best:ssim", -1), ("worst:ssim", 0), ("best:lpips", 0), ("worst:lpips", -1),
    ],
)  # fmt: skip
def test_sorting_by_a_score(open_page, sort: str, first: int):
    page = open_page()
    page.get_by_label("Sort").select_option(sort)
    names = [name.replace("_", " ") for name in CONCEPTS]
    expected = names if first == 0 else names[::-1]
    assert concepts(page) == expected[:12]
    page.get_by_label("Score of").select_option("separate_text")
    assert concepts(page) == expected[:12]


def test_random_order_repeats_with_its_seed(open_page):
    page = open_page()
    page.get_by_label("Sort").select_option("random")
    first = concepts(page)
    page.get_by_role("spinbutton", name="Seed").fill("1")
    second = concepts(page)
    page.get_by_role("spinbutton", name="Seed").fill("0")
    assert concepts(page) == first and second != first


def test_by_keyboard_alone(open_page):
    page = open_page()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
        if reached[-1].startswith("shot"):
            break
    assert reached[0] == "skip" and {"search", "sort"} <= set(reached)
    assert reached[-1].startswith("shot")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    dialog = page.locator("dialog#viewer")
    assert dialog.is_visible() and "red apple" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    assert page.evaluate("document.activeElement.className").startswith("shot")


def test_a_picture_opens_beside_what_was_seen(open_page):
    page = open_page()
    page.get_by_role("button", name="drawn, separate: text: red apple").click()
    pictures = page.locator("#viewer-pictures img")
    assert pictures.evaluate_all("all => all.map(image => image.alt)") == [
        "seen: red apple", "drawn, separate: text: red apple",
    ]  # fmt: skip
    page.get_by_role("button", name="close").click()
    assert page.locator("dialog#viewer").is_hidden()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(open_page, width: int):
    page = open_page(width)
    page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_small_text_is_large_enough_on_a_phone(open_page):
    """Text of the figures, which shrink with the window, in CSS pixels."""
    page = open_page(390)
    sizes = page.eval_on_selector_all(
        ".chart svg text",
        """all => all.map(text => parseFloat(getComputedStyle(text).fontSize)
             * text.ownerSVGElement.getBoundingClientRect().width
             / text.ownerSVGElement.viewBox.baseVal.width)""",
    )
    assert sizes and min(sizes) >= 8.5


def test_dark_follows_the_system(open_page, tmp_path: Path):
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=str(tmp_path / f"{scheme}.png"))
    assert grounds == ["rgb(251, 250, 248)", "rgb(22, 21, 20)"]
