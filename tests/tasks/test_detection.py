import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.detection import Detection, format_box, format_objects, is_label, parse

SIZE = (1023, 2046)  # one location is one pixel across, two down
BOX = "<loc0100><loc0020><loc0300><loc0400>"
PIXELS = (20.0, 200.0, 400.0, 600.0)
SEGS = "".join(f"<seg{8 * i:03d}>" for i in range(16))
CODES = tuple(range(0, 128, 8))

# text, labels found, fragments dropped
CASES = [
    ("", [], []),
    ("   ", [], []),
    (";", [], []),
    ("a cat on a sofa", [], []),
    ("a cat; a dog", [], []),
    ("3 < 4", [], []),
    ("a <lo", [], []),
    (f"{BOX} cat", ["cat"], []),
    (f"{BOX}cat", ["cat"], []),
    (f"  {BOX}   cat  ", ["cat"], []),
    (f"{BOX}\ncat\n", ["cat"], []),
    (BOX.replace("><", "> <") + " cat", ["cat"], []),
    (f"{BOX} traffic light", ["traffic light"], []),
    (f"{BOX} traffic   light", ["traffic light"], []),
    (f"{BOX} a man in a blue shirt, left", ["a man in a blue shirt, left"], []),
    (f"{BOX} bus 42", ["bus 42"], []),
    (f"{BOX} 7", ["7"], []),
    (f"{BOX} T-shirt", ["T-shirt"], []),
    (f"{BOX} it's <odd> & 50%!", ["it's <odd> & 50%!"], []),
    (f"{BOX} a < b", ["a < b"], []),
    (f"{BOX} <", ["<"], []),
    (f"{BOX} grüner Stern", ["grüner Stern"], []),
    (f"{BOX} 一只猫", ["一只猫"], []),
    (f"{BOX} قطة", ["قطة"], []),
    (f"{BOX} 🐈‍⬛", ["🐈‍⬛"], []),
    (f"{BOX} cat ; {BOX} dog", ["cat", "dog"], []),
    (f"{BOX} cat;{BOX} dog", ["cat", "dog"], []),
    (f"{BOX} cat ;{BOX} cat; {BOX} cat", ["cat"] * 3, []),
    (f"{BOX} cat ;", ["cat"], []),
    (f";; {BOX} cat ; ; ", ["cat"], []),
    (f"{BOX}{SEGS} cat", ["cat"], []),
    (f"{BOX} {SEGS}cat ; {BOX} dog", ["cat", "dog"], []),
    ("<loc0000><loc0000><loc1023><loc1023> all", ["all"], []),
    ("<loc0007><loc0007><loc0007><loc0007> dot", ["dot"], []),
    ("<loc1023><loc1023><loc0000><loc0000> turned", ["turned"], []),
    (BOX, [""], []),
    (f"{BOX} ; {BOX} dog", ["", "dog"], []),
    (f"{BOX}{SEGS}", [""], []),
    (f"{BOX} cat ; dog", ["cat"], ["dog"]),
    (f"<loc0001>{BOX} cat", [], [f"<loc0001>{BOX} cat"]),
    (f"{BOX}{BOX} cat", ["", "cat"], []),
    ("<loc0001><loc0002><loc0003> cat", [], ["<loc0001><loc0002><loc0003> cat"]),
    ("<loc0001> cat", [], ["<loc0001> cat"]),
    ("<loc0001><loc0002><loc0003><loc00", [], ["<loc0001><loc0002><loc0003><loc00"]),
    (f"{BOX} cat <loc0001>", ["cat"], ["<loc0001>"]),
    (f"{BOX} cat <loc00", ["cat"], ["<loc00"]),
    (f"{BOX} cat <l", ["cat"], ["<l"]),
    (f"{BOX} <seg00", [], [f"{BOX} <seg00"]),
    (f"{BOX} cat {BOX} dog", ["cat", "dog"], []),
    (f"cat {BOX}", [""], []),
    (f"a cat {BOX} cat", ["cat"], []),
    ("<loc1024><loc0000><loc0000><loc0000> cat", [], ["<loc1024><loc0000><loc0000><loc0000> cat"]),
    ("<loc001><loc002><loc003><loc004> cat", [], ["<loc001><loc002><loc003><loc004> cat"]),
    ("<loc٠٠٠١><loc0000><loc0000><loc0000> cat", [], ["<loc٠٠٠١><loc0000><loc0000><loc0000> cat"]),
    (f"{BOX}{SEGS[8:]} cat", [], [f"{BOX}{SEGS[8:]} cat"]),
    (f"{BOX}{SEGS}<seg001> cat", [], [f"{BOX}{SEGS}<seg001> cat"]),
    (f"{BOX}{SEGS[8:]}<seg128> cat", [], [f"{BOX}{SEGS[8:]}<seg128> cat"]),
    (f"{SEGS} cat", [], [f"{SEGS} cat"]),
    (f"{SEGS}{BOX} cat", ["cat"], [SEGS]),
    # without labels, as fine-tunes on RefCOCO answer
    (f"{BOX}{SEGS}\n", [""], []),
    (f" {BOX} {SEGS} . ", [""], []),
    (f"{BOX}{BOX}", ["", ""], []),
    (f"{BOX}{SEGS}{BOX}{SEGS}", ["", ""], []),
    (f"{BOX}{BOX}{SEGS} cat", ["", "cat"], []),
    (f"{BOX}\x00{BOX}\u3000{BOX}", ["", "", ""], []),
    (f"detect cat\n{BOX} cat<eos>", ["cat"], []),
    (f"{BOX}{SEGS}<eos><pad> <pad>\n", [""], []),
    (f"{BOX} cat ; <eos>", ["cat"], []),
    # what joins objects
    *[(f"{BOX}{joint}{BOX}", ["", ""], []) for joint in (",", ", ", "\n", "\r\n", ";", " and ", "，", "；", ". ")],
    *[(f"{BOX} cat{joint}{BOX} dog", ["cat", "dog"], []) for joint in (" ", ",", ", ", "\n", " and ", ", and ", "、")],
    (f"{BOX}\ncat\n{BOX}\ndog", ["cat", "dog"], []),
    (f"1. {BOX}\n2. {BOX}", ["", ""], []),
    # words around them
    (f"Here it is: {BOX}{SEGS}.", [""], []),
    (f"detect cat\n{BOX} cat ; {BOX}", ["cat", ""], []),
    (f"the left man\n{BOX}{SEGS}", [""], []),
    (f"detect cat ; dog\n{BOX} cat ; {BOX} dog ; bird", ["cat", "dog"], ["bird"]),
    (f"{BOX} cat\n\nThat is all.", ["cat"], []),
    (f"{BOX}\n\nThat is all.", [""], []),
    (f"Sure! {BOX}: cat", ["cat"], []),
    # labels in front of the boxes
    (f"cat {BOX} dog {BOX}", ["cat", "dog"], []),
    (f"cat {BOX} ; dog {BOX}", ["cat", "dog"], []),
    (f"- cat: {BOX}\n- red dog: {BOX}{SEGS}", ["cat", "red dog"], []),
    (f"cat\n{BOX}\ndog\n{BOX}", ["cat", "dog"], []),
    (f"cat {BOX} dog {BOX} bird", ["dog", "bird"], []),
    (f"detect cat\n{BOX} cat {BOX}", ["cat", ""], []),
    # what is incomplete does not take its neighbours along
    (f"{BOX}<loc0001>", [""], ["<loc0001>"]),
    (f"{BOX}{BOX}<loc0001><loc0002><loc00", ["", ""], ["<loc0001><loc0002><loc00"]),
    (f"{BOX}\n<loc0001> cat", [""], ["<loc0001> cat"]),
    (f"{BOX}{BOX}{SEGS[8:]}", [""], [f"{BOX}{SEGS[8:]}"]),
    (f"{BOX}{SEGS}{SEGS} cat", [], [f"{BOX}{SEGS}{SEGS} cat"]),
    (f"{BOX} cat {SEGS}", ["cat"], [SEGS]),
    (f"{BOX}{SEGS[:48]} and {SEGS[48:]} cat", [], [f"{BOX}{SEGS[:48]}", f"{SEGS[48:]} cat"]),
    (f"<loc0001> {BOX} ; {BOX} cat, <seg001>", ["cat"], [f"<loc0001> {BOX}", "<seg001>"]),
]


@pytest.mark.parametrize("text, labels, dropped", CASES)
def test_cases(text, labels, dropped):
    found, left = parse(text, SIZE)
    assert [item.label for item in found] == labels
    assert left == dropped


def test_fields():
    (plain, masked), _ = parse(f"{BOX} cat ; {BOX}{SEGS} dog", SIZE)
    assert plain == Detection("cat", PIXELS)
    assert masked == Detection("dog", PIXELS, codes=CODES)
    assert plain.score is plain.mask is None


def test_span_is_where_the_object_stands():
    text = f"{BOX} cat ; junk ;{BOX} dog"
    found, _ = parse(text, SIZE)
    assert [parse(text[slice(*item.span)], SIZE)[0] for item in found] == [[item] for item in found]


def test_corners_are_put_in_order():
    (item,), _ = parse("<loc0300><loc0400><loc0100><loc0020> cat", SIZE)
    assert item.box == PIXELS


def test_loc_scale():
    text = "<loc0000><loc0256><loc1023><loc0512> cat"
    assert parse(text, (1024, 1024), loc_scale=1024)[0][0].box == (256, 0, 512, 1023)
    assert parse(text, (1023, 1023))[0][0].box == (256, 0, 512, 1023)
    assert format_box((256, 0, 512, 1024), (1024, 1024), loc_scale=1024) == text.removesuffix(" cat")  # clipped


def test_format_box():
    assert format_box(PIXELS, SIZE) == BOX
    assert format_box((-5, -5, 9999, 9999), SIZE) == "<loc0000><loc0000><loc1023><loc1023>"
    assert format_box((0, 0, 0.4, 0.6), (1023, 1023)) == "<loc0000><loc0000><loc0001><loc0000>"


@pytest.mark.parametrize(
    "item",
    [
        Detection("a;b", PIXELS),
        Detection("...", PIXELS),
        Detection("<loc0001>", PIXELS),
        Detection("cat <s", PIXELS),
        Detection("cat", (0, 0, float("nan"), 1)),
        Detection("cat", PIXELS, codes=(1, 2)),
    ],
)
def test_what_cannot_be_written_is_an_error(item):
    with pytest.raises(DataError):
        format_objects([item], SIZE)


labels = st.text(st.characters(exclude_characters=";", exclude_categories=["Cs"]), min_size=1).filter(
    lambda s: is_label(s) and "<" not in s
)
locs = st.integers(0, 1023)
codes = st.none() | st.tuples(*[st.integers(0, 127)] * 16)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(labels, st.tuples(locs, locs, locs, locs), codes), max_size=5), st.sampled_from([1023, 1024]))
def test_round_trip(items, scale):
    width, height = 640, 427
    objects = []
    for label, (x0, y0, x1, y1), segs in items:
        (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        box = (x0 * width / scale, y0 * height / scale, x1 * width / scale, y1 * height / scale)
        objects.append(Detection(" ".join(label.split()), box, codes=segs))
    found, dropped = parse(format_objects(objects, (width, height), scale), (width, height), scale)
    assert not dropped and [(i.label, i.codes) for i in found] == [(i.label, i.codes) for i in objects]
    for item, original in zip(found, objects, strict=True):
        np.testing.assert_allclose(item.box, original.box, atol=1e-9)


PIECES = [
    *[BOX, f"{BOX} cat", f"{BOX}{SEGS} dog", " ; "] * 5,  # so that much of it is nearly right
    *(SEGS, "<loc0000>", "<loc1023>", "<loc1024>", "<seg000>", "<seg127>", "<seg128>", "<loc0001>" * 3, "<loc00001>"),
    *("<loc", "<seg", "<lo", "<s", "<", ">", "0001>", "<loc0001", "loc0001>", "<loc-001>", "<LOC0001>", "<loc 0001>"),
    *("<loc٠٠٠١>", "<loc０００１>", "<<loc0001>>", "<eos>", "<pad>", "<image>", "%s", "{}", "\\", "\\d", "(", "[", "*"),
    *(" ", "  ", ";", ";;", "；", "\n", "\r\n", "\t", "\x00", "\x1b[31m", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"),
    *(
        "cat",
        "é",
        "e\u0301",
        "猫",
        "قطة",
        "\u202e",
        "\u200d",
        "\ufeff",
        "🐈",
        "\ud800",
        "\udfff",
        "\U0010ffff",
        "?",
        "$",
    ),
]


def test_no_text_raises_an_error():
    """20,000 strings of what may hurt: no token is lost, and what is found is sound and reads back the same."""
    random_ = random.Random(0)
    num_found = num_dropped = 0
    for _ in range(20_000):
        text = "".join(random_.choices(PIECES, k=random_.randrange(9)))
        found, dropped = parse(text, SIZE)
        told = [*(text[slice(*item.span)] for item in found), *dropped]
        for start in ("<loc", "<seg"):
            assert sum(part.count(start) for part in told) == text.count(start), "each token is found or dropped, once"
        for item in found:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 <= x1 < math.inf and 0 <= y0 <= y1 < math.inf
            assert item.label == "" or is_label(item.label)
            assert item.codes is None or (len(item.codes) == 16 and all(0 <= code < 128 for code in item.codes))
        if found:
            assert parse(format_objects(found, SIZE), SIZE) == (found, [])
        num_found, num_dropped = num_found + len(found), num_dropped + len(dropped)
    assert num_found > 10_000 and num_dropped > 5_000


THINGS = st.tuples(st.booleans(), st.sampled_from(["", " cat", " red dog", "猫"]))
JOINTS = st.sampled_from([" ; ", ";", ", ", "\n", "\n\n", " ", "\t", " and ", ""])
HALVES = st.sampled_from(["", "<loc0001><loc0002><loc0003> ; ", "<seg001>;", f"{BOX}{SEGS[8:]} cow\n", "<loc1024> ; "])


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(HALVES, THINGS, JOINTS), min_size=1, max_size=5), st.sampled_from(["", "Found: "]))
def test_every_complete_object_is_found_with_its_label(parts, opening):
    """However they are joined, whatever half a thing stands between them."""
    text, expected = opening, []
    for half, (masked, label), joint in parts:
        if half:
            text = text.removesuffix(" and ") + ";"
        text += f"{half}{BOX}{SEGS if masked else ''}{label}{joint}"
        expected.append((label.strip(), CODES if masked else None))
    found, dropped = parse(text.removesuffix(" and "), SIZE)
    assert [(item.label, item.codes) for item in found] == expected
    assert len(dropped) == sum(bool(half) for half, _, _ in parts)


@pytest.mark.parametrize(
    "text, asked, labels",
    [
        (BOX, ["the left man"], ["the left man"]),
        (f"{BOX}{SEGS} ; {BOX} dog", ["cat"], ["cat", "dog"]),
        (f"{BOX} Cat", ["cat"], ["Cat"]),
        (BOX, ["cat", "dog"], [""]),
        (f"cat {BOX}", ["cat", "dog"], ["cat"]),
        (f"There is a DOG {BOX}", ["cat", "dog"], [""]),
        (f"Dog: {BOX}{SEGS}", ["cat", "dog"], ["Dog"]),
        (f"cat {BOX} ; {BOX}", ["cat", "dog"], ["cat", ""]),
        (f"It is cat {BOX} cat {BOX}", ["cat", "dog"], ["cat", ""]),
        ("no cat", ["cat"], []),
        (BOX, ["", " "], [""]),
    ],
)
def test_the_classes_asked_for_are_labels_of_what_has_none(text, asked, labels):
    assert [item.label for item in parse(text, SIZE, labels=asked)[0]] == labels


def test_a_long_text_takes_no_long_time():
    for filler in (" ", ",", ", ", ";a", "\n;", "cat ", "\n", "<", "and ", "<loc0001>", "- "):
        text = f"{BOX}{filler * 30_000}{BOX} cat"
        start = time.process_time()
        parse(text, SIZE)
        assert time.process_time() - start < 2


@pytest.mark.parametrize("loc_scale", (0, -1))
def test_a_scale_without_meaning_is_named(loc_scale):
    with pytest.raises(DataError, match=f"loc_scale={loc_scale} "):
        parse("<loc0000><loc0000><loc1023><loc1023> cat", (4, 4), loc_scale)


@pytest.mark.parametrize(
    "text",
    [
        "{0} - cat\n{1} - dog",
        "{0} cat / {1} dog",
        "{0} cat\\n{1} dog",
        "<obj>{0}cat</obj><obj>{1}dog</obj>",
        '{0} "cat" ; {1} `dog`',
        "{0}: cat\n{1}: dog",
    ],
)
def test_what_is_written_around_labels_is_no_part_of_them(text):
    boxes = "<loc0001><loc0002><loc0003><loc0004>", "<loc0101><loc0102><loc0103><loc0104>"
    found, dropped = parse(text.format(*boxes), (1023, 1023))
    assert [item.label for item in found] == ["cat", "dog"] and not dropped


@pytest.mark.parametrize("size", [None, (502,), "ab", (0, 5), (5, -1), (float("nan"), 5), (10**400, 1), (5, "5")])
def test_a_size_that_no_picture_has_is_told(size):
    with pytest.raises(DataError, match=r"size=.* is not possible: give \(width, height\)"):
        parse("<loc0001><loc0002><loc0003><loc0004> cat", size)


@pytest.mark.parametrize("scale", [float("inf"), "1023", None, True - 1, -5])
def test_a_scale_that_is_none_is_told(scale):
    with pytest.raises(DataError, match=r"loc_scale=.* is not possible"):
        parse("<loc0001><loc0002><loc0003><loc0004> cat", (9, 9), loc_scale=scale)
