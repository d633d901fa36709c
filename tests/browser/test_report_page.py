"""The report of an inspection in chromium: words and patches show their maps, and nothing flickers or is fetched."""

import subprocess
import sys

import pytest

from tests.browser.conftest import ROOT

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report about a star with a mask, of the shipped model."""
    folder = tmp_path_factory.mktemp("report")
    keys = ("prompt=segment star", f"output_dir={folder}", "report=True", "platform=cpu")
    command = [sys.executable, "main.py", "--config=configs/inspect.py", *(f"--config.{key}" for key in keys)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "report.html"


@pytest.fixture
def page(report, browser):
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    asked, complaints = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda said: complaints.append(said.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert not complaints
    assert all(url.startswith(("file:", "data:")) for url in asked)


def lit(page):
    return [i for i, word in enumerate(page.locator(".word").all()) if "on" in word.get_attribute("class").split()]


def pixels(page):
    return page.evaluate("document.getElementById('map').toDataURL()")


@pytest.mark.parametrize("kind", ["Similarity", "Norms", "Table"])
def test_words_do_not_flicker_where_all_have_one_map(page, kind):
    page.locator("#kinds label", has_text=kind).click()
    shown = pixels(page)
    for word in page.locator(".word").all():
        word.hover()
        assert lit(page) == [] and pixels(page) == shown
    page.locator("#strength").focus()
    assert lit(page) == []


def test_a_word_that_is_pointed_at_shows_its_own_map(page):
    page.locator("#kinds label", has_text="Attention").click()
    page.mouse.move(5, 5)
    whole = pixels(page)
    page.locator(".word").nth(1).hover()
    assert lit(page) == [1] and pixels(page) != whole
    page.mouse.move(5, 5)
    assert lit(page) == [] and pixels(page) == whole


def test_a_location_is_shown_as_the_edge_of_its_box(page):
    frame = page.locator("#frame").bounding_box()
    box = page.locator("#objects rect").bounding_box()
    places = {0: box["y"], 2: box["y"] + box["height"], 1: box["x"], 3: box["x"] + box["width"]}
    for i, place in places.items():
        page.locator(".word").nth(i).hover()
        edge = page.locator("#edge").bounding_box()
        across = i % 2 == 0
        assert abs(edge["y" if across else "x"] - place) < 5
        assert edge["width" if across else "height"] == pytest.approx(frame["width" if across else "height"], abs=3)
        assert "edge of a box" in page.locator("#patch").inner_text()
    page.mouse.move(5, 5)
    assert page.locator("#edge").is_hidden()
    assert page.locator("#about-locations").is_visible()


def test_boxes_and_masks_can_be_hidden(page):
    assert page.locator("#objects rect").count() == page.locator("#objects image").count() == 1
    page.locator("#show-objects").uncheck()
    assert page.locator("#objects").is_hidden()
    page.locator("#show-objects").check()
    assert page.locator("#objects").is_visible()


def test_patches_by_mouse_and_keys(page):
    page.locator("#map").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#patch-title").inner_text() == "Patch in row 2, column 2"
    page.keyboard.press("Escape")
    assert page.locator("#cell").is_hidden()
    page.locator("#map").hover(position={"x": 3, "y": 3})
    assert page.locator("#patch-title").inner_text() == "Patch in row 1, column 1"


@pytest.mark.parametrize("width", [375, 1200])
def test_it_fits(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
