"""Augmentation: whatever is done to a picture, its boxes, masks and words stay true."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from paligemma_jax.errors import ConfigError
from paligemma_jax.tasks.detection import parse
from paligemma_jax.training.data.augment import (
    KINDS,
    LEAST_VISIBLE,
    Augmentation,
    View,
    jitter,
    mirrored,
    mirrored_prompt,
    read_kinds,
)
from paligemma_jax.training.data.examples import Example
from paligemma_jax.training.data.regions import Grid, Region, to_suffix

SIDES = st.integers(8, 90)


@st.composite
def painted(draw):
    """A black picture with a white rectangle, and the rectangle in pixels."""
    width, height = draw(SIDES), draw(SIDES)
    x0, y0 = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
    box = (x0, y0, draw(st.integers(x0 + 3, width)), draw(st.integers(y0 + 3, height)))
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return image, box


def shares(box, size):
    return (box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1])


@settings(deadline=None, max_examples=150)
@given(painted(), st.integers(0, 2**40), st.sets(st.sampled_from(KINDS), min_size=1))
def test_a_box_stays_on_what_is_painted(picture, counter, kinds):
    """To a location's width; a box that is gone has little left of it in the picture."""
    image, box = picture
    example = Example(("x",), "detect star", to_suffix([Region("star", shares(box, image.size))]))
    augmentation = Augmentation(tuple(kinds - {"color"}) or ("flip",), 1)
    [shown], prefix, suffix = augmentation(example, [image], counter)
    bright = np.asarray(shown)[:, :, 0] > 200
    assert prefix == "detect star"
    found, dropped = parse(suffix, shown.size)
    assert not dropped
    if not found:
        assert bright.sum() < (LEAST_VISIBLE + 0.02) * (box[2] - box[0]) * (box[3] - box[1]) + 4 * sum(image.size) / 100
        return
    rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
    seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    error = max(1.0, max(shown.size) / 1023)
    np.testing.assert_allclose(found[0].box, seen, atol=error)


@settings(deadline=None)
@given(painted())
def test_flipping_twice_changes_nothing(picture):
    image, box = picture
    view = dataclasses.replace(View.whole(image.size), flip=True)
    np.testing.assert_array_equal(np.asarray(view.show(view.show(image))), np.asarray(image))
    suffix = to_suffix([Region("left star", shares(box, image.size))])
    [region] = [Region(item.label, item.box) for item in parse(suffix, (1, 1))[0]]
    once = Region(mirrored(region.label), view.moved(region.box))
    assert to_suffix([Region(mirrored(once.label), view.moved(once.box))]) == suffix
    assert once.label == "right star"


def flipped(prefix, suffix, regions=None):
    """Texts of an example that was flipped: the first counter that does it."""
    image = Image.new("RGB", (20, 10))
    image.putpixel((0, 0), (255, 255, 255))
    for counter in range(30):
        [shown], *texts = Augmentation(("flip",), 0)(Example(("x",), prefix, suffix, regions=regions), [image], counter)
        if shown.getpixel((19, 0)) == (255, 255, 255):
            return tuple(texts)
    raise AssertionError("never flipped")


@pytest.mark.parametrize(
    "before, after",
    [
        (
            ("answer en what is left of it?", "the Right ear"),
            ("answer en what is right of it?", "the Left ear"),
        ),
        (("caption en", "LEFT, leftmost, left-hand"), ("caption en", "RIGHT, rightmost, right-hand")),
        (("caption en", "leftover brightness, upright"), ("caption en", "leftover brightness, upright")),
        (
            ("detect left hand", "<loc0000><loc0001><loc0100><loc0200> left hand"),
            ("detect right hand", "<loc0000><loc0823><loc0100><loc1022> right hand"),
        ),
        (
            ("detect left hand ; right hand", "<loc0000><loc0001><loc0100><loc0200> left hand"),
            ("detect left hand ; right hand", "<loc0000><loc0823><loc0100><loc1022> right hand"),
        ),
        (  # without a label, as on RefCOCO
            ("the left one", "<loc0000><loc0001><loc0100><loc0200>"),
            ("the right one", "<loc0000><loc0823><loc0100><loc1022>"),
        ),
    ],
)
def test_words_of_sides_are_swapped_with_them(before, after):
    assert flipped(*before) == after
    assert (mirrored_prompt(after[0]), mirrored(mirrored(before[1]))) == (before[0], before[1])


@pytest.mark.parametrize(
    "prefix, suffix",
    [
        ("caption <loc0000><loc0001><loc0100><loc0200>", "a cat"),
        (
            "caption en",
            "a cat <loc0000><loc0001><loc0100><loc0200> sits on a mat <loc0000><loc0001><loc0100><loc0200>.",
        ),
        ("detect cat", "<loc0100><loc0001><loc0000><loc0200> cat"),  # corners in the wrong order
    ],
)
def test_what_cannot_be_written_anew_keeps_its_picture(prefix, suffix):
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    for counter in range(8):
        example = Example(("x",), prefix, suffix)
        [shown], *texts = Augmentation(("flip", "crop", "scale"), 0)(example, [image], counter)
        assert shown is image and texts == [prefix, suffix]


def test_text_to_be_read_is_neither_mirrored_nor_cut():
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    for counter in range(8):
        example = Example(("x",), "ocr", "turn left")
        assert Augmentation(("flip", "crop"), 0)(example, [image], counter) == ([image], "ocr", "turn left")
    [shown], _, _ = Augmentation(("scale",), 0)(example, [image], 0)
    assert shown.width > 40 or shown.height > 30


def test_several_pictures_change_in_colour_only():
    images = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(2)]
    example = Example(("x", "y"), "answer en is the left one brighter?", "yes")
    shown, *texts = Augmentation(KINDS, 0)(example, images, 0)
    assert texts == [example.prefix, example.suffix] and [image.size for image in shown] == [(40, 30)] * 2
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(images, shown, strict=True))


def test_a_thing_that_would_be_lost_keeps_its_picture():
    """What is asked for alone has to be there; of named classes none may be."""
    corner = Region("cat", (0.0, 0.0, 0.02, 0.02))
    image = Image.new("RGB", (100, 100))
    for prefix, suffix, keeps in (
        ("the cat", to_suffix([dataclasses.replace(corner, label="")]), True),
        ("detect cat", to_suffix([corner]), False),
    ):
        results = [
            Augmentation(("crop",), 0)(Example(("x",), prefix, suffix), [image], counter) for counter in range(20)
        ]
        assert all(bool(text) for _, _, text in results) == keeps
        assert any(shown.size != (100, 100) for [shown], _, _ in results) or keeps


def test_changes_depend_on_seed_and_counter_alone():
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    example = Example(("x",), "caption en", "a cat")

    def pixels(seed, counter, kinds=KINDS):
        [shown], _, _ = Augmentation(kinds, seed)(example, [image], counter)
        return shown.size, shown.tobytes()

    assert pixels(0, 5) == pixels(0, 5)
    assert len({pixels(seed, counter) for seed in range(3) for counter in range(3)}) == 9
    sizes = [[pixels(0, counter, kinds)[0] for counter in range(5)] for kinds in (("crop",), ("crop", "flip", "color"))]
    assert sizes[0] == sizes[1]  # what is drawn for one kind does not depend on the others


def test_colours_stay_where_they_are():
    image = Image.new("RGB", (10, 10))
    image.putpixel((3, 4), (200, 100, 50))
    shown = np.asarray(jitter(image, (1.2, 0.8, 1.1))).astype(int).sum(-1)
    assert np.unravel_index(shown.argmax(), shown.shape) == (4, 3)
    assert jitter(image, (1.0, 1.0, 1.0)).tobytes() == image.tobytes()


class Corners:
    """A codec whose codes are the means of the 16 parts of a mask, 0 to 127."""

    def encode(self, masks):
        parts = np.asarray(masks).reshape(-1, 4, 16, 4, 16).mean((2, 4))
        return np.round(parts * 127).astype(np.int32).reshape(-1, 16)

    def decode(self, codes):
        parts = np.asarray(codes).reshape(-1, 4, 4)
        return np.repeat(np.repeat(parts, 16, 1), 16, 2) / 127 - 0.5


LEFT_HALF = (127, 127, 0, 0) * 4


@pytest.mark.parametrize("as_text", [True, False])
def test_masks_move_with_their_boxes(as_text):
    """Of a region with an outline, and of codes in a text: the left half of a box becomes its right half."""
    mask = np.zeros((64, 64), bool)
    mask[:, :32] = True
    box = (0.1, 0.2, 0.5, 0.6)
    region = Region("cat", box, None if as_text else Grid(mask, box), LEFT_HALF)
    example = Example(("x",), "segment cat", to_suffix([region]), regions=None if as_text else (region,))
    image = Image.new("RGB", (50, 50))
    codes = set()
    for counter in range(12):
        _, _, suffix = Augmentation(("flip",), 0, Corners())(example, [image], counter)
        [item] = parse(suffix, (1, 1))[0]
        codes.add((round(item.box[0], 1), item.codes))
    assert codes == {(0.1, LEFT_HALF), (0.5, LEFT_HALF[::-1])}
    for counter in range(12):  # half of what a crop leaves
        _, _, suffix = Augmentation(("crop",), 0, Corners())(example, [image], counter)
        for item in parse(suffix, (1, 1))[0]:
            rows = np.array(item.codes).reshape(4, 4)
            assert (rows == rows[:1]).all() and (np.diff(rows[0]) <= 0).all()
    shown, *texts = Augmentation(("flip", "crop"), 0)(example, [image], 0)  # without a codec nothing is moved
    assert shown == [image] and texts == [example.prefix, example.suffix]


def test_kinds():
    assert read_kinds("flip, crop,flip") == ("flip", "crop") and read_kinds("") == ()
    with pytest.raises(ConfigError, match="augment='flip,turn' is not possible: 'turn' is not one of flip, crop"):
        read_kinds("flip,turn")
