"""The web page in chromium: everything that a visitor does with it."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.tasks.draw import label_color
from tests.browser.conftest import ANSWER_MS, ROOT, running
from tests.browser.visitor import SHAPES, answer, ask, call, choose, drawn, error, settings, table, upload, watch

pytestmark = pytest.mark.browser
STARS = ROOT / "assets" / "examples" / "stars.png"
CAPTION = "a purple circle, a yellow square and a blue star"
TALKATIVE = {"max_new_tokens": 4000, "temperature": 2, "seed": 3}  # an answer that does not end by itself


def test_each_task_with_an_uploaded_picture(full, visit):
    page = visit(full)
    upload(page)
    assert ask(page) == CAPTION
    choose(page, "Question")
    page.locator("#question textarea, #question input").first.fill("how many stars are there?")
    assert ask(page) in ("1", "one")
    choose(page, "Detect")
    page.locator("#things textarea, #things input").first.fill("circle, star")
    assert {"circle", "star"} <= set(ask(page).split())
    assert [line.split()[0] for line in table(page)] == ["circle", "star"]
    choose(page, "Segment")
    ask(page)
    table(page)
    assert page.locator("#objects thead").inner_text().split()[-2:] == ["mask", "pixels"]
    choose(page, "Read text")
    page.locator("#things").wait_for(state="hidden")
    ask(page)
    choose(page, "Prompt")
    page.locator("#prompt textarea, #prompt input").first.fill("detect star")
    assert "star" in ask(page)


def test_boxes_and_masks_have_the_colours_of_the_words(full, visit):
    page = visit(full)
    page.get_by_role("button", name="Cut out the star").click()
    answer(page)
    table(page)
    color = label_color("star")
    assert page.locator("#answer mark").get_attribute("style") == f"--label:#{bytes(color).hex()}"
    page.locator("#opacity").wait_for()
    picture = drawn(page)
    with Image.open(SHAPES) as image:
        original = np.asarray(image.convert("RGB"), int)
    assert picture.shape == original.shape

    def painted(picture):
        return int((np.abs(picture - color).sum(-1) < 60).sum())

    assert painted(picture) > 100 > painted(original)
    before = page.locator("#drawn img").get_attribute("src")
    slider = page.locator("#opacity input[type=range]")
    slider.focus()
    slider.press("End")
    page.wait_for_function("before => document.querySelector('#drawn img').src !== before", arg=before)
    assert painted(drawn(page)) > painted(picture) + 500


def test_downloads_can_be_read(full, visit):
    page = visit(full)
    page.get_by_role("button", name="Cut out the star").click()
    answer(page)
    files = {}
    for kind in ("json", "coco", "png"):
        with page.expect_download() as download:
            page.locator(f"#download_{kind}").click()
        files[kind] = download.value.path().read_bytes()
    record, coco = json.loads(files["json"]), json.loads(files["coco"])
    assert record["prompt"] == "segment star" and record["boxes"][0]["label"] == "star" and record["masks"]
    assert coco["categories"][0]["name"] == "star" and coco["annotations"][0]["segmentation"]
    with Image.open(io.BytesIO(files["png"])) as image, Image.open(SHAPES) as original:
        assert image.size == original.size


def test_an_answer_is_seen_to_grow(full, visit):
    page = visit(full)
    upload(page)
    settings(page, **TALKATIVE)
    watch(page)
    page.locator("#ask").click()
    page.wait_for_function("() => new Set(window.lengths).size > 10")
    lengths = page.evaluate("window.lengths")
    assert lengths[-1] > lengths[len(lengths) // 2]
    page.locator("#stop").click()


def test_phrases_are_shown_on_the_picture(full, visit):
    page = visit(full)
    upload(page)
    page.get_by_role("tab", name="Phrases").click()
    page.locator("#show_phrases").click()
    page.locator("#phrases_remark .pj-error", has_text="there are no phrases").wait_for()
    page.locator("#phrases textarea, #phrases input").first.fill("purple circle ; star")
    page.locator("#show_phrases").click()
    page.locator("#phrase_maps img").nth(1).wait_for(timeout=ANSWER_MS)
    assert page.locator("#phrases_remark .pj-error").count() == 0


def test_stop_ends_an_answer(full, visit):
    page = visit(full)
    upload(page)
    settings(page, **TALKATIVE)
    watch(page)
    page.locator("#ask").click()
    page.wait_for_function("() => window.lengths.at(-1) > 30")
    page.locator("#stop").click()
    page.locator("#answer .pj-notes", has_text="stopped").wait_for()
    said = page.locator("#answer .pj-answer").inner_text()
    assert said and not page.locator("#answer .pj-numbers").count()
    settings(page, max_new_tokens=100, temperature=0)
    assert ask(page) == CAPTION


def test_settings_are_used_and_shown_in_the_calls(full, visit):
    page = visit(full)
    page.get_by_role("button", name="Describe it").click()
    assert answer(page) == CAPTION
    settings(page, max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=5)
    page.locator("#constrain input").check()
    assert len(ask(page)) < len(CAPTION)
    assert "3 tokens" in page.locator("#answer .pj-numbers").inner_text()
    page.wait_for_function("() => document.querySelector('#call_command textarea').value.includes('seed=5')")
    command = call(page, "command")
    for part in (
        "max_new_tokens=3",
        "temperature=0.5",
        "top_p=0.9",
        "top_k=7",
        "min_p=0.1",
        "seed=5",
        "constrain=True",
    ):
        assert f"--config.{part}" in command
    assert "pj.Sampling(temperature=0.5" in call(page, "python") and "/v1/chat/completions" in call(page, "curl")
    settings(page, seed="")
    error(page, "seed is empty")


def test_what_is_wrong_is_said_in_a_line(full, visit, tmp_path):
    page = visit(full)
    error(page, "there is no picture")
    for name, content, says in (
        ("text.png", b"this is text", "not a picture"),
        ("page.png", b"%PDF-1.7", "PDF"),
        ("cut.png", SHAPES.read_bytes()[:900], "damaged or truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        page.locator("#picture input[type=file]").first.set_input_files(tmp_path / name)
        page.locator(f"#picture img[src$='{name}']").wait_for(state="attached")
        page.wait_for_timeout(100)
        error(page, says)
        page.reload(wait_until="domcontentloaded")
        page.locator("#ask").wait_for()
    upload(page)
    choose(page, "Detect")
    page.locator("#things").wait_for()
    error(page, "nothing to look for")


def test_a_picture_is_pasted(full, visit):
    page = visit(full, permissions=["clipboard-read", "clipboard-write"])
    encoded = [*SHAPES.read_bytes()]
    page.evaluate(
        """async bytes => navigator.clipboard.write([new ClipboardItem({
            'image/png': new Blob([new Uint8Array(bytes)], {type: 'image/png'})})])""",
        encoded,
    )
    page.locator("#picture").get_by_label("Paste from clipboard").click()
    page.locator("#picture img").wait_for()
    assert ask(page) == CAPTION


def test_two_visitors_at_once(full, visit):
    one, two = visit(full), visit(full)
    for page in (one, two):
        upload(page)
    settings(one, **TALKATIVE)
    watch(one)
    one.locator("#ask").click()
    one.wait_for_function("() => window.lengths.at(-1) > 30")
    choose(two, "Detect")
    two.locator("#things textarea, #things input").first.fill("star")
    assert "star" in ask(two)
    so_far = one.evaluate("window.lengths.at(-1)")
    one.wait_for_function("before => window.lengths.at(-1) > before", arg=so_far)  # still at it
    one.locator("#stop").click()
    one.locator("#answer .pj-notes", has_text="stopped").wait_for()
    for page, asked, other in ((one, "caption en", "detect star"), (two, "detect star", "caption en")):
        page.get_by_role("tab", name="History").click()
        page.locator("#history .pj-history > li").wait_for()
        assert asked in page.locator("#history").inner_text() and other not in page.locator("#history").inner_text()


def test_another_model_is_loaded_while_this_one_answers(visit, full, tmp_path):
    page = visit(full)
    upload(page)
    page.get_by_role("tab", name="Model").click()
    path = page.locator("#model_path input")
    path.fill("no/where/at/all")
    path.press("Tab")
    page.locator("#load").click()
    page.locator("#status .pj-error").wait_for()
    assert (
        "no/where/at/all" in page.locator("#status").inner_text() and "is ready" in page.locator("#status").inner_text()
    )
    assert ask(page) == CAPTION
    shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "another")
    path.fill(str(tmp_path / "another"))
    path.press("Tab")
    page.locator("#load").click()
    assert ask(page) == CAPTION
    page.locator("#status b", has_text="another").wait_for(timeout=ANSWER_MS)
    page.locator("#status .pj-ready").wait_for(timeout=ANSWER_MS)
    assert ask(page) == CAPTION
    page.wait_for_function("() => document.querySelector('#call_command textarea')?.value.includes('another')")


def test_a_look_inside(full, visit):
    page = visit(full)
    page.get_by_role("tab", name="Look inside").click()
    page.locator("#look").click()
    page.locator("#inside_remark .pj-error", has_text="no answer to look into").wait_for()
    page.get_by_role("button", name="Find shapes").click()
    answer(page)
    table(page)
    page.wait_for_function("() => document.querySelector('#call_command textarea')?.value.includes('detect')")
    page.locator("#look").click()
    page.locator("#maps img").nth(4).wait_for(timeout=ANSWER_MS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(full, visit, scheme):
    page = visit(full, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 360

    assert fits()
    page.get_by_role("button", name="Cut out the star").tap()
    answer(page)
    table(page)
    page.locator("#download_png").wait_for()
    assert fits()
    settings(page)
    assert fits()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background[background.index("(") + 1 : -1].split(",")[:3]))
    assert (brightness > 600) == (scheme == "light")


def test_keyboard_only(full, visit):
    page = visit(full)

    def tab_to(selector, key="Tab"):
        for _ in range(80):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{selector} is not reached")

    tab_to("#picture button")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SHAPES)
    page.locator("#picture img").wait_for()
    tab_to("#task input")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.locator("#things").wait_for()
    tab_to("#things textarea, #things input")
    page.keyboard.type("star")
    page.keyboard.press("Enter")
    assert "star" in answer(page)
    table(page)
    tab_to("#download_json, #download_json *")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert json.loads(download.value.path().read_bytes())["prompt"] == "detect star"
    tab_to("#ask", "Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"  # where the focus is can be seen


def test_the_simple_page(visit):
    with running("simple=True") as server:
        page = visit(server)
        assert not page.locator("#task").count()
        error(page, "there is no picture")
        page.locator("#example").click()
        page.locator("#picture img").wait_for()
        assert ask(page) == CAPTION
        upload_prompt = page.locator("#prompt textarea, #prompt input").first
        upload_prompt.fill("detect star")
        upload_prompt.press("Enter")
        table(page)
        page.locator("#drawn img").wait_for()
        page.context.close()
        server.process.terminate()
        assert server.process.wait(20) == 0


def test_no_model_is_said(visit, tmp_path):
    shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.model").write_bytes(b"\x00")
    with running(f"checkpoint={tmp_path / 'broken'}", "simple=True") as server:
        page = visit(server)
        page.locator("#status .pj-failed").wait_for()
        upload(page)
        error(page, "no model is loaded")
        page.context.close()
    assert sum(line.startswith("error: ") for line in server.lines) == 1
