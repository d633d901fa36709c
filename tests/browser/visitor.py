"""What a visitor does on the page."""

import io

import numpy as np
from PIL import Image

from tests.browser.conftest import ANSWER_MS, ROOT

SHAPES = ROOT / "assets" / "examples" / "shapes.png"

_seen = {}  # the number of the last answer, by page


def upload(page, path=SHAPES):
    page.locator("#picture input[type=file]").first.set_input_files(path)
    page.locator("#picture img").wait_for()


def choose(page, task):
    page.locator("#task label", has_text=task).click()


def settings(page, **values):
    """Type into fields of the settings; they are made when the settings are opened first, and take a moment."""
    if not page.locator("#seed input").is_visible():
        page.locator("#settings button").first.click()
        page.locator("#seed input").wait_for()
    fields = {name: page.locator(f"#{name} input[type=number]") for name in values}
    for _ in range(50):
        wrong = [name for name, field in fields.items() if field.input_value() != str(values[name])]
        if not wrong:
            return
        for name in wrong:
            fields[name].fill(str(values[name]))
            fields[name].press("Tab")
        page.wait_for_timeout(200)  # what is typed too early is replaced by the default
    raise AssertionError(f"{wrong} cannot be set")


def answer(page):
    """Wait for the end of an answer, another one than the last that was waited for on this page; its words."""
    found = page.locator(
        f"#answer [data-answer]:not([data-answer='{_seen.get(page, '')}'])", has=page.locator(".pj-numbers")
    )
    found.wait_for(timeout=ANSWER_MS)
    _seen[page] = found.get_attribute("data-answer")
    return " ".join(page.locator("#answer .pj-answer").all_inner_texts()).strip()


def ask(page):
    page.locator("#ask").click()
    return answer(page)


def table(page):
    """Wait for the objects of the answer; their lines."""
    page.locator("#objects table").wait_for()
    return page.locator("#objects tbody tr").all_inner_texts()


def error(page, says):
    """Ask, and wait for what is wrong; a file that was just chosen may still be on its way, so ask again at times."""
    found = page.locator("#answer .pj-error", has_text=says)
    for i in range(ANSWER_MS // 200):
        if i % 20 == 0:
            page.locator("#ask").click()
        if found.count():
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"{says!r} was not said, but {page.locator('#answer').inner_text()!r}")


def drawn(page):
    """The picture with boxes, as it is seen."""
    source = page.locator("#drawn img").get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(source).body())) as image:
        return np.asarray(image.convert("RGB"), int)


def call(page, name):
    page.get_by_role("tab", name="Code").click()
    return page.locator(f"#call_{name} textarea").input_value()


def watch(page):
    """Note the lengths that the answer has from now on."""
    page.evaluate(
        """() => {
            window.lengths = [];
            const words = () => document.querySelector('#answer .pj-answer:not(.pj-empty)')?.textContent ?? '';
            const note = () => window.lengths.push(words().length);
            new MutationObserver(note).observe(document.querySelector('#answer'),
                {subtree: true, childList: true, characterData: true});
        }"""
    )
