"""IoU of masks, and RefCOCO by big_vision's rules."""

import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.masks import read_referred
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.detections import Detections

SIZE = (8, 4)
SEGS = "".join(f"<seg{i:03d}>" for i in range(16))


def masked(label, rows, columns):
    mask = np.zeros(SIZE[::-1], bool)
    mask[rows, columns] = True
    return Detection(label, (0.0, 0.0, 8.0, 4.0), mask=mask)


LEFT, RIGHT, TOP = (
    masked("cat", slice(4), slice(4)),
    masked("cat", slice(4), slice(4, 8)),
    masked("cat", slice(2), slice(4)),
)


def measured(found, true):
    return METRICS["segmentation_iou"]([Detections(x, SIZE) for x in found], [Detections(x, SIZE) for x in true])


def test_a_missed_object_counts_nothing():
    found = measured([[TOP]], [[LEFT, RIGHT]])
    assert found.values == {"mask_iou": 0.25, "recall": 0.5, "precision": 1.0}


def test_main_number_is_the_weighted_mean_and_pictures_without_objects_weigh_nothing():
    found = measured([[LEFT], [], [TOP, RIGHT]], [[LEFT], [], [LEFT, RIGHT]])
    assert found.main == pytest.approx((1 + 0.5 + 1) / 3)
    assert (found.per_example * found.weights).sum() / found.weights.sum() == pytest.approx(found.main)
    assert found.weights.tolist() == [1, 0, 2]


def test_labels_must_agree():
    assert measured([[masked("dog", slice(4), slice(4))]], [[LEFT]]).main == 0


def test_texts_have_no_masks():
    with pytest.raises(DataError, match="needs masks"):
        METRICS["segmentation_iou"](["<loc0000>" * 4], [Detections([LEFT], SIZE)])


def decode(inside):
    """Codes to a mask that is positive in its left half, by the share `inside`."""

    def mask(codes):
        assert codes.tolist() == [list(range(16))]
        values = np.full((1, 64, 64), -1.0, np.float32)
        values[:, :, : int(64 * inside)] = 1.0
        return values

    return mask


def referred(text, inside=1.0, size=SIZE):
    return read_referred(text, size, decode(inside))


WHOLE = "<loc0000><loc0000><loc1023><loc1023>"


def test_a_mask_is_stretched_over_its_box():
    [item] = referred(WHOLE + SEGS, 0.5)
    assert item.box == (0, 0, 8, 4) and item.mask[:, :4].all() and not item.mask[:, 4:].any()
    [item] = referred("<loc0000><loc0512><loc1023><loc1023>" + SEGS)  # x0 = 4.004, cut to 4
    assert item.mask[:, 4:].all() and not item.mask[:, :4].any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        WHOLE,  # no mask
        WHOLE + SEGS[:-8],
        "cat " + WHOLE + SEGS,  # the first 20 tokens count
        "<loc1023><loc0000><loc0000><loc1023>" + SEGS,  # corners in another order
        "<loc0000><loc0000><loc0000><loc1023>" + SEGS,
    ],
)
def test_what_is_not_valid_counts_nothing(text):
    assert not referred(text)
    found = METRICS["refcoco"]([referred(text)], [Detections([LEFT], SIZE)])
    assert found.values == {"mask_iou": 0, "box_iou": 0, "box_accuracy_50": 0, "box_accuracy_75": 0, "valid": 0}


def test_what_follows_twenty_tokens_is_ignored():
    assert len(referred(WHOLE + SEGS + " cat ; " + WHOLE + SEGS)) == 1


def test_iou_of_boxes_and_masks():
    true = Detections([Detection("", (0.0, 0.0, 4.0, 4.0), mask=LEFT.mask)], SIZE)
    found = METRICS["refcoco"]([referred(WHOLE + SEGS, 0.5), referred(WHOLE + SEGS)], [true, true])
    assert found.values == {
        "mask_iou": pytest.approx((1 + 0.5) / 2),
        "box_iou": pytest.approx(0.5),
        "box_accuracy_50": 1.0,
        "box_accuracy_75": 0.0,
        "valid": 1.0,
    }
    assert found.per_example.tolist() == [1, 0.5]
