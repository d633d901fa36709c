import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import clip_box
from paligemma_jax.tasks.yolo import class_file, to_yolo

CLASSES = ["cat", "traffic light"]


def test_lines():
    items = [Detection("traffic light", (0, 0, 10, 10), 0.75), Detection("cat", (5, 5, 15, 10))]
    text = "1 0.250000 0.500000 0.500000 1.000000\n0 0.500000 0.750000 0.500000 0.500000\n"
    assert to_yolo(items, (20, 10), CLASSES) == text
    assert [line.split()[5] for line in to_yolo(items, (20, 10), CLASSES, confidence=True).splitlines()] == [
        "0.750000",
        "0.000000",
    ]
    assert to_yolo([], (20, 10), CLASSES) == ""
    assert class_file(["cat", "traffic\nlight"]) == "cat\ntraffic light\n"


positions = st.floats(-20, 60)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(CLASSES), *[positions] * 4), max_size=4))
def test_boxes_read_back(items):
    """Classes and corners as an independent reader finds them, clipped to the picture."""
    size = (40, 30)
    objects = [Detection(name, (min(a, c), min(b, d), max(a, c), max(b, d))) for name, a, b, c, d in items]
    seen = [(item.label, clip_box(item.box, size)) for item in objects]
    seen = [(label, box) for label, box in seen if box[2] > box[0] and box[3] > box[1]]
    lines = [line.split() for line in to_yolo(objects, size, CLASSES).splitlines()]
    assert [CLASSES[int(line[0])] for line in lines] == [label for label, _ in seen]
    for line, (_, box) in zip(lines, seen, strict=True):
        centre, extent = np.array(line[1:3], float) * size, np.array(line[3:5], float) * size
        assert all(0 <= float(value) <= 1 for value in line[1:])
        np.testing.assert_allclose([*(centre - extent / 2), *(centre + extent / 2)], box, atol=1e-4)


def test_what_cannot_be_written_is_named():
    with pytest.raises(DataError, match="label 'cow' is not among the classes"):
        to_yolo([Detection("cow", (0, 0, 1, 1))], (2, 2), CLASSES)
    with pytest.raises(DataError, match="0 x 2 pixels"):
        to_yolo([], (0, 2), CLASSES)
