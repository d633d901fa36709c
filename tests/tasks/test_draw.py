import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.draw import cut_to_width, draw, font_for, label_color, place_tag

SIZES = [(1, 1), (3, 200), (24, 24), (64, 200), (640, 480), (900, 40)]
LABELS = ["cat", "a " * 300, "grüner Stern", "一只猫", "قطة", "\x00\ud800", "", "🐈"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("label", LABELS)
def test_any_size_and_label_can_be_drawn(size, label):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[: height // 2 + 1, : width // 2 + 1] = True
    box = (0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height)
    outside = (-width, -height, 3 * width, 3 * height)
    objects = [Detection(label, box, 0.5, mask=mask), Detection(label, outside), Detection(label, (0, 0, 0, 0), 1.0)]
    before = Image.new("L", size, 90)
    after = draw(before, objects)
    assert after.size == size and after.mode == "RGB"
    assert np.all(np.asarray(before) == 90)
    assert np.any(np.asarray(after) != 90)


def test_nothing_to_draw_changes_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    np.testing.assert_array_equal(draw(image, []), image)


def test_box_mask_and_label_are_where_they_belong():
    size, color = (400, 300), label_color("cat")
    mask = np.zeros((300, 400), bool)
    mask[120:180, 120:180] = True
    picture = np.asarray(draw(Image.new("RGB", size, "white"), [Detection("cat", (100, 100, 300, 250), mask=mask)]))
    for x, y in [(100, 175), (299, 175), (200, 249), (120, 150), (150, 179)]:
        assert tuple(picture[y, x]) == color
    tinted = picture[150, 150]
    assert tuple(tinted) != color and np.all(tinted <= 255) and np.any(tinted < 255)
    rows, columns = np.nonzero((picture != 255).any(-1))
    assert 70 < rows.min() < 100 and 249 <= rows.max() <= 250 and columns.min() >= 99 and columns.max() <= 300
    assert np.all(picture[200:240, 200:290] == 255)


def test_colors_are_stable_and_mostly_distinct():
    assert label_color("cat") == label_color("CAT") == label_color("cat")
    names = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "star", "square")]
    assert len({label_color(name) for name in names}) >= 7


extent = st.integers(1, 60)
boxes = st.tuples(*[st.floats(-50, 150)] * 4)


@settings(deadline=None, derandomize=True)
@given(st.data(), extent, extent, st.lists(boxes, min_size=1, max_size=8))
def test_tags_are_inside_the_picture(data, width, height, places):
    taken = []
    for box in places:
        tag = data.draw(st.tuples(st.integers(1, width), st.integers(1, height)))
        x0, y0, x1, y1 = place_tag(box, tag, (width, height), taken)
        assert (x1 - x0, y1 - y0) == tag and min(x0, y0) >= 0 and x1 <= width and y1 <= height
        taken.append((x0, y0, x1, y1))


@settings(deadline=None, derandomize=True)
@given(st.lists(boxes, min_size=1, max_size=6))
def test_tags_avoid_each_other_while_there_is_room(places):
    """Six tags of 20 x 10 in 100 x 100 leave room wherever they lie."""
    canvas, taken = np.zeros((100, 100), int), []
    for box in places:
        taken.append(place_tag(box, (20, 10), (100, 100), taken))
        x0, y0, x1, y1 = taken[-1]
        canvas[y0:y1, x0:x1] += 1
    assert canvas.max() == 1


def test_a_tag_finds_the_only_free_place():
    taken = [(0, 0, 40, 10), (0, 10, 15, 20), (35, 10, 40, 20), (0, 20, 40, 30)]
    assert place_tag((0, 0, 5, 5), (20, 10), (40, 30), taken) == (15, 10, 35, 20)


def test_a_lone_tag_stands_on_its_box():
    assert place_tag((50, 60, 90, 90), (30, 12), (200, 200), []) == (50, 48, 80, 60)
    assert place_tag((50, 0, 90, 90), (30, 12), (200, 200), []) == (50, 0, 80, 12)


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (60, 10), (40, 40), (300, 50)])
def test_labels_do_not_hide_a_small_picture(size):
    """A label takes an eighth of it at most; boxes and masks are all that is drawn on the smallest."""
    item = Detection("traffic light", (0, 0, *size), 0.5)
    drawn = np.asarray(draw(Image.new("RGB", size, "white"), [item]))
    boxed = np.asarray(draw(Image.new("RGB", size, "white"), [dataclasses.replace(item, label="", score=None)]))
    assert ((drawn != 255).any(-1) & (boxed == 255).all(-1)).sum() <= size[0] * size[1] / 8


def test_a_long_label_keeps_its_score():
    def tag(label, score):
        picture = draw(Image.new("RGB", (800, 600), "white"), [Detection(label, (50, 300, 60, 310), score)])
        return (np.asarray(picture) != 255).any(-1)

    long = "a man in a blue shirt holding a large red umbrella in the rain"
    assert np.any(tag(long, 0.25) != tag(long, None)), "the score is seen"
    columns = np.nonzero(tag(long, 0.25).any(0))[0]
    assert columns.max() - columns.min() < 450, "the label is shortened"


def test_small_things_lie_on_large_ones():
    size = (200, 200)
    large, small = np.zeros(size, bool), np.zeros(size, bool)
    large[20:180, 20:180] = small[80:120, 80:120] = True
    things = [Detection("cat", (80, 80, 120, 120), mask=small), Detection("dog", (20, 20, 180, 180), mask=large)]
    forward, backward = (np.asarray(draw(Image.new("RGB", size), order)) for order in (things, things[::-1]))
    cat = np.array(label_color("cat"), int)
    assert np.all(np.abs(forward[119, 85:115] - cat) == 0), "the small one's outline is whole"
    np.testing.assert_array_equal(forward[85:], backward[85:])


def test_an_object_without_a_label_is_drawn():
    """Its box, and its score if it is known."""
    plain = Image.new("RGB", (200, 150), "white")
    bare, scored = (draw(plain, [Detection("", (40, 50, 160, 140), score)]) for score in (None, 0.5))
    assert bare.getpixel((40, 50)) == label_color("") != (255, 255, 255)
    assert bare.crop((0, 0, 200, 48)).tobytes() == plain.crop((0, 0, 200, 48)).tobytes()
    assert scored.crop((0, 0, 200, 48)).tobytes() != plain.crop((0, 0, 200, 48)).tobytes()


@pytest.mark.parametrize("text", ["", "star", "a rather long label for a small picture", "красный круг и ещё слова"])
@pytest.mark.parametrize("width", [5, 40, 120, 1000])
def test_a_cut_text_fits_and_is_as_long_as_possible(text, width):
    font = font_for(text, 13)
    cut = cut_to_width(text, font, width)
    if font.getlength(text) <= width:
        assert cut == text
    else:
        kept = cut.removesuffix("...")
        assert text.startswith(kept) and (not kept or font.getlength(cut) <= width)
        longer = text[: len(kept) + 1] if text[len(kept)] != " " else text[: len(kept) + 2]
        assert font.getlength(longer + "...") > width
