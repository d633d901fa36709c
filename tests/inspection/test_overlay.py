"""Boxes and masks over the picture of the report, and locations in words."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.inspection.overlay import locations, objects_layer
from paligemma_jax.inspection.words import Word
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.draw import label_color

EVIL = '</svg><script>alert(1)</script>" onload="x'


def words(*texts: str) -> list[Word]:
    return [Word(text, i, i + 1) for i, text in enumerate(texts)]


def test_four_locations_are_the_edges_of_a_box():
    found = locations(words("<loc0000>", "<loc0512>", "<loc1023>", "<loc0256>", "cat", "<loc0100>"), (400, 200))
    assert found[4] is None
    assert [item["text"] for item in found if item] == [
        "top edge of a box: 0 of 1023, y = 0 px",
        "left edge of a box: 512 of 1023, x = 200 px",
        "bottom edge of a box: 1023 of 1023, y = 200 px",
        "right edge of a box: 256 of 1023, x = 100 px",
        "top edge of a box: 100 of 1023, y = 20 px",
    ]
    assert [item["edge"] for item in found if item] == [0, 1, 2, 3, 0]


def test_boxes_follow_each_other_without_words_between():
    found = locations(words(*["<loc0001>"] * 8, "<seg001><seg002>"), (10, 10), loc_scale=1024)
    assert [item and item["edge"] for item in found] == [0, 1, 2, 3, 0, 1, 2, 3, None]
    assert "1 of 1024" in found[0]["text"]


def test_nothing_is_drawn_of_an_answer_in_words():
    assert objects_layer([], (10, 10)) == ""
    assert locations(words("a", "<loc12>", "<seg001>"), (10, 10)) == [None] * 3


@pytest.mark.parametrize("label", ["cat", "", EVIL])
def test_labels_cannot_leave_their_place(label):
    layer = objects_layer([Detection(label, (1.0, 2.0, 30.0, 40.0), None)], (100, 50))
    assert '<rect x="1.0" y="2.0" width="29.0" height="38.0"' in layer
    assert layer.count("</svg>") == 1 and "<script" not in layer and 'onload="' not in layer


def test_a_mask_is_clear_but_for_its_shape():
    mask = np.zeros((50, 100), bool)
    mask[10:20, 30:60] = True
    layer = objects_layer([Detection("cat", (30.0, 10.0, 60.0, 20.0), None, mask=mask)], (100, 50))
    data = re.search(r'href="data:image/png;base64,([^"]+)"', layer)[1]
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(shown[..., 3] > 0, mask)
    assert tuple(shown[15, 40, :3]) == label_color("cat")
