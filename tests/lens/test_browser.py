"""The page in a real browser: what is drawn, pointed at, and reached by keys."""

import io

import pytest

pytest.importorskip("fcntl")  # Windows has none

from browser import CHROMIUM, Browser
from PIL import Image
from reports import NASTY, nasty_report, scripted_report

from layerskip.lens import visible
from layerskip.lens.page import report_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
CARD = "document.getElementById('card')"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "lens.html"
    path.write_text(report_page(nasty_report()), encoding="utf-8")
    return path


def cell(row, column):
    """The selector of a cell, both counted from 1, the last layer first."""
    return f"table.lens tbody tr:nth-child({row}) td:nth-child({column + 1})"


def pixels(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def number_of_colours(image):
    return len(image.getcolors(maxcolors=1 << 24))


def test_pointing_at_a_cell_shows_its_five_best(browser, page):
    size = NARROW
    browser.open(page, **size)
    browser.move_to(1, 1)
    assert browser.ask(f"{CARD}.hidden")
    browser.point_at(cell(2, 5))  # where the drafts missed; layer 3 says 7 and the last layer 6
    # Scrolling may have shown the page elsewhere: compare with the same place without the card.
    shown = pixels(browser.screenshot())
    assert not browser.ask(f"{CARD}.hidden")
    text = browser.ask(f"{CARD}.innerText").split("\n")
    assert text[0] == "Layer 3, position 5"
    items = browser.ask(f"[...{CARD}.querySelectorAll('li')].map((item) => item.innerText)")
    assert len(items) == 5
    assert items[0].startswith("g")
    assert f"The last layer says {visible(NASTY[6])}; this layer gives it" in text[-1]
    box = browser.ask(
        f"(() => {{ const r = {CARD}.getBoundingClientRect();"
        " return [r.left, r.top, r.right, r.bottom] })()"
    )
    assert 0 <= box[0] < box[2] <= size["width"]
    assert 0 <= box[1] < box[3] <= size["height"]
    browser.move_to(1, 1)
    assert browser.ask(f"{CARD}.hidden")
    hidden = pixels(browser.screenshot())
    assert number_of_colours(shown.crop(box)) > 20
    assert shown.crop(box).tobytes() != hidden.crop(box).tobytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_drawn_in_both_schemes(browser, page, scheme):
    browser.open(page, **WIDE, scheme=scheme)
    image = pixels(browser.screenshot())
    assert image.size == (1280, 900)
    assert number_of_colours(image) > 100
    background = image.getpixel((2, 2))
    assert (max(background) < 60) if scheme == "dark" else (min(background) > 200)
    table = browser.ask(
        "(() => { const r = document.querySelector('table.lens')"
        ".getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] })()"
    )
    assert number_of_colours(image.crop(table)) > 50


def test_nothing_runs_and_nothing_is_fetched_but_the_page(browser, page):
    browser.open(page, **WIDE)
    browser.point_at(cell(2, 5))
    assert browser.ask("document.hacked") is None
    assert browser.ask("document.querySelectorAll('img').length") == 0
    fetched = [one["request"]["url"] for one in browser.happened("Network.requestWillBeSent")]
    assert fetched == [page.as_uri()]
    assert not browser.happened("Runtime.exceptionThrown")
    assert not browser.happened("Log.entryAdded")


def test_keys_move_through_the_table(browser, page):
    browser.open(page, **WIDE)
    browser.press("Tab")
    heading = f"{CARD}.querySelector('h3').textContent"
    assert browser.ask(heading) == "Layer 4, position 1"
    browser.press("ArrowRight", times=3)
    browser.press("ArrowDown")
    assert browser.ask(heading) == "Layer 3, position 4"
    assert browser.ask("document.getElementById('spoken').textContent").startswith(
        "Layer 3, position 4"
    )
    browser.press("End")
    browser.press("ArrowRight")  # there is nothing to the right of the last
    assert browser.ask(heading) == "Layer 3, position 8"
    assert browser.ask("document.querySelectorAll('td[tabindex=\"0\"]').length") == 1
    browser.press("Escape")
    assert browser.ask(f"{CARD}.hidden")


def test_narrow_windows_scroll_the_table_and_not_the_page(browser, tmp_path):
    path = tmp_path / "lens.html"
    report = scripted_report(range(10, 40), misses={5, 9}, prompt=range(1, 13))
    path.write_text(report_page(report), encoding="utf-8")
    browser.open(path, **NARROW)
    assert browser.ask("document.documentElement.scrollWidth") <= NARROW["width"]
    # The answer is in view at once, the prompt to the left of it.
    left = browser.ask("document.querySelector('th.answer').getBoundingClientRect().left")
    assert 0 < left < NARROW["width"]
    assert browser.ask("document.querySelector('.scroller').scrollLeft") > 0
