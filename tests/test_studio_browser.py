"""The studio as visitors have it: a real `varkit studio` process, driven by a real Chromium without a network.

Screenshots are kept in the folder that VARKIT_SCREENSHOTS names, otherwise in pytest's temporary one.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.contracts import CASES
from varkit.hub.pipeline import Settings, load
from varkit.plans.raster import RasterConfig
from varkit.studio.drawing import enlarged

pytestmark = pytest.mark.slow

PAGES = ("Generate", "Edit", "Tokenizer", "Systems", "Compare")
WAIT = 60_000
"""Milliseconds until something that must happen is given up; the machine may be busy."""

UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button')]
    .filter(e => e.checkVisibility() && !e.labels?.length && !e.textContent.trim()
        && !['aria-label', 'aria-labelledby', 'title'].some(name => e.getAttribute(name)))
    .map(e => e.outerHTML.slice(0, 200))"""
"""Controls of which a screen reader could say nothing."""

RECORD = """(id) => { window.told = []; new MutationObserver(() => {
    window.told.push(document.querySelector(id).textContent.trim()) })
    .observe(document.querySelector(id), {childList: true, subtree: true, characterData: true}) }"""


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with thousands of steps, so that there is time to cancel."""
    folder = tmp_path_factory.mktemp("models") / "slow"
    case, grid = CASES["llamagen-class"], (96, 96)
    tokenizer = replace(case.tokenizer, grid=grid)  # type: ignore[type-var]
    replace(case, tokenizer=tokenizer, plan=RasterConfig(grid)).pipeline(Settings()).save(folder)
    return folder


@pytest.fixture(scope="module")
def studio(slow_model: Path) -> Iterator[str]:
    """The address of a running studio, which ends well when it is told to."""
    command = [sys.executable, "-m", "varkit", "studio", "--port", "0", "--model", "scenes", "digits"]
    process = subprocess.Popen(
        [*command, str(slow_model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line + process.stderr.read()
    yield found[0]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    # A visitor who leaves amid an upload makes gradio print a traceback; one through a page would be a failure here.
    assert process.returncode == 130 and "varkit/studio/" not in errors, errors


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "these tests need Chromium: apt-get install -y chromium"
    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def visit(studio: str, chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Open the studio as another visitor. In the end, nothing may have been asked of any other host, nor broken."""
    contexts, requests, broken = [], [], []

    def open_page(width: int = 1440) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(studio)
        expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible(timeout=WAIT)
        return page

    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [u for u in requests if u.startswith(("http", "ws")) and urlsplit(u).netloc not in studio]
    assert requests and not elsewhere and not broken, (elsewhere, broken)


@pytest.fixture
def keep(tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a screenshot of the whole page."""
    folder = Path(os.environ.get("VARKIT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", full_page=True) and None


def turn_to(page: Page, name: str) -> None:
    """Open a page of the studio; on a phone some are in the menu of further tabs."""
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.get_by_label("More tabs").click()
        tab = page.locator(".overflow-dropdown").get_by_role("button", name=name)
    tab.click()


def choose(page: Page, label: str, option: str) -> None:
    """Choose an option of a visible drop-down field."""
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option).click()


def prompt(page: Page, text: str) -> Locator:
    """Fill in the prompt of the page that is open."""
    field = page.get_by_label("Prompt").locator("visible=true").first
    field.fill(text)
    return field


def fill_in(field: Locator, text: str) -> None:
    """Fill in a field that has just come up: while the page is still making it, it is emptied once more."""
    kept = 0
    for _ in range(100):
        if field.input_value() != text:
            field.fill(text)
            kept = 0
        elif (kept := kept + 1) == 5:
            return
        field.page.wait_for_timeout(100)
    raise AssertionError(f"a field does not keep {text!r}")


def status(page: Page, name: str) -> Locator:
    return page.locator(f"#{name}-status")


def pictures(page: Page, gallery: str) -> list[Image.Image]:
    """The pictures that a gallery shows, as the server has them."""
    images = page.locator(f"#{gallery} .thumbnail-item img")
    sources = [images.nth(i).get_attribute("src") for i in range(images.count())]
    return [Image.open(io.BytesIO(page.request.get(str(s)).body())).convert("RGB") for s in sources]


def alike(a: Image.Image, b: Image.Image) -> bool:
    """Whether two pictures are the same, but for what another number of threads may round otherwise."""
    return a.size == b.size and bool(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() <= 2)


def test_a_prompt_becomes_a_picture_scale_by_scale(visit, keep):
    page = visit()
    page.evaluate(RECORD, "#generate-status")
    prompt(page, "a blue star left of a red circle").press("Enter")
    expect(status(page, "generate")).to_contain_text("Done", timeout=WAIT)
    told = page.evaluate("window.told")
    previews = [int(found[1]) for line in told if (found := re.search(r"Step (\d) of 6", line))]
    assert len(set(previews)) >= 3 and previews == sorted(previews), told
    expect(page.locator("#generate-grown .thumbnail-item img")).to_have_count(6)
    (drawn,) = pictures(page, "generate-pictures")
    (expected,) = load("scenes").generate("a blue star left of a red circle", seed=0)
    assert alike(drawn, expected)
    expect(page.locator("#generate-grown .thumbnail-item img").last).to_be_visible()
    keep(page, "generate")


def test_a_class_is_drawn_by_name(visit):
    page = visit()
    choose(page, "Model", "digits")
    expect(page.get_by_text("A class: zero, one").first).to_be_visible()
    page.get_by_label("Pictures", exact=True).locator("visible=true").fill("3")
    prompt(page, "seven").press("Enter")
    expect(status(page, "generate")).to_contain_text("Done", timeout=WAIT)
    expect(page.locator("#generate-pictures .thumbnail-item img")).to_have_count(3)


def test_a_brushed_part_is_drawn_anew_and_the_rest_stays(visit, keep):
    page = visit()
    prompt(page, "a red circle on a beige background").press("Enter")
    expect(status(page, "generate")).to_contain_text("Done", timeout=WAIT)
    page.get_by_role("button", name="Edit the first picture").click()
    page.get_by_role("button", name="Draw anew").click()
    expect(page.get_by_text("Nothing is brushed")).to_be_visible(timeout=WAIT)

    box = page.locator("#edit-editor canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 50, y - 50)
    page.mouse.down()
    page.mouse.move(x + 50, y + 50, steps=10)
    page.mouse.up()
    prompt(page, "a blue star").press("Enter")
    expect(status(page, "edit")).to_contain_text("Done", timeout=WAIT)
    expect(page.locator("#edit-versions .thumbnail-item img")).to_have_count(1)
    (before,) = pictures(page, "generate-pictures")
    (after,) = pictures(page, "edit-versions")
    assert after.size == (512, 512)
    changed = np.abs(np.asarray(enlarged(before), float) - np.asarray(after, float)).max(axis=2) > 0
    assert 0.01 < changed.mean() < 0.5 and changed[200:312, 200:312].any()
    assert not changed[:64, -64:].any() and not changed[-64:, :64].any(), "far from the brush nothing changes"
    keep(page, "edit")


def test_long_work_is_cancelled_and_two_visitors_do_not_wait_for_each_other(visit, slow_model: Path):
    one, other = visit(), visit()
    choose(one, "Model", slow_model.name)
    prompt(one, "1").press("Enter")
    expect(status(one, "generate")).to_contain_text(re.compile(r"Step \d+ of 9216"), timeout=WAIT)
    prompt(other, "a red circle").press("Enter")
    expect(status(other, "generate")).to_contain_text("Done", timeout=WAIT)
    assert "Step" in status(one, "generate").inner_text(), "the first is still at work"
    assert len(pictures(other, "generate-pictures")) == 1

    one.get_by_role("button", name="Cancel").locator("visible=true").click()
    expect(status(one, "generate")).to_have_text("Cancelled.", timeout=WAIT)
    choose(one, "Model", "scenes")
    prompt(one, "a blue star").press("Enter")
    expect(status(one, "generate")).to_contain_text("6 passes", timeout=WAIT)


def test_mistakes_are_one_sentence(visit, keep, tmp_path: Path):
    page = visit()
    prompt(page, "a rad circle").press("Enter")
    expect(status(page, "generate")).to_have_text("Not done.", timeout=WAIT)
    toast = page.get_by_test_id("toast-body").last
    expect(toast).to_contain_text("Unknown word 'rad'; did you mean 'red'", timeout=WAIT)
    keep(page, "mistake")
    turn_to(page, "Tokenizer")
    page.get_by_role("button", name="Take apart").click()
    expect(page.get_by_test_id("toast-body").last).to_contain_text("There is no picture", timeout=WAIT)
    (tmp_path / "note.png").write_text("not a picture")
    page.locator("#tokenizer-picture input[type=file]").set_input_files(tmp_path / "note.png")
    expect(page.get_by_test_id("toast-body").last).to_contain_text("not a picture", timeout=WAIT)
    assert "Traceback" not in page.content() and str(tmp_path) not in page.inner_text("body")


def test_a_dropped_picture_is_taken_apart(visit, keep, tmp_path: Path):
    load("scenes").generate("two blue stars", seed=1)[0].resize((200, 160)).save(tmp_path / "stars.png")
    page = visit()
    turn_to(page, "Tokenizer")
    page.locator("#tokenizer-picture input[type=file]").set_input_files(tmp_path / "stars.png")
    expect(status(page, "tokenizer")).to_contain_text("130 positions", timeout=WAIT)
    expect(page.locator("#tokenizer-scales .thumbnail-item img")).to_have_count(7)
    expect(page.locator("#tokenizer-codes tbody tr")).to_have_count(6)
    expect(page.locator("#tokenizer-errors img")).to_be_visible()
    keep(page, "tokenizer")


def test_the_catalogue_opens_with_the_keyboard(visit):
    page = visit()
    turn_to(page, "Systems")
    page.get_by_label("Search").fill("without residual prediction")
    expect(page.locator("#systems-list")).to_contain_text("1 of 52 systems", timeout=WAIT)
    page.locator("#system-flexvar summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#system-flexvar").get_by_text("Claims")).to_be_visible()


def test_two_settings_are_compared(visit, keep):
    page = visit()
    turn_to(page, "Compare")
    page.get_by_role("button", name="Settings of B").click()
    fill_in(page.get_by_label("Guidance").locator("visible=true"), "1")
    prompt(page, "a purple diamond").press("Enter")
    expect(status(page, "compare")).to_have_text("Done.", timeout=WAIT)
    for side in "ab":
        expect(page.locator(f"#compare-cost-{side}")).to_contain_text("6 passes")
    expected = [load("scenes").generate("a purple diamond", **given)[0] for given in ({}, {"guidance": 1})]
    # The last frame is on the page a moment after the line says so.
    for _ in range(50):
        (a,), (b,) = pictures(page, "compare-a"), pictures(page, "compare-b")
        if alike(b, expected[1]):
            break
        page.wait_for_timeout(100)
    assert alike(a, expected[0]) and alike(b, expected[1]) and not alike(a, b)
    keep(page, "compare")


@pytest.mark.parametrize("width", [360, 1440])
def test_every_page_fits_the_screen_and_names_its_controls(visit, keep, width: int):
    page = visit(width)
    for name in PAGES:
        turn_to(page, name)
        for more in page.get_by_role("button", name=re.compile("settings|Settings")).all():
            if more.is_visible():
                more.click()
        sideways = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert sideways <= 0, f"{name} is {sideways} pixels wider than the screen"
        assert page.evaluate(UNNAMED) == [], f"{name} has controls without a name"
        keep(page, f"{name.lower()}-{width}")


def test_the_keyboard_alone_draws_and_shows_where_it_is(visit):
    page = visit()
    field = page.get_by_label("Prompt").locator("visible=true").first
    for _ in range(20):
        page.keyboard.press("Tab")
        if field.evaluate("e => e === document.activeElement"):
            break
    expect(field).to_be_focused()
    assert field.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.type("a red circle")
    page.keyboard.press("Tab")
    assert page.get_by_role("button", name="Draw", exact=True).evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    expect(status(page, "generate")).to_contain_text("Done", timeout=WAIT)
