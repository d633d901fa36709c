import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import box_iou
from paligemma_jax.tasks.select import above, known_score, suppress, without_duplicates

corners = st.integers(0, 6)
scores = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def detections(draw):
    (x0, x1), (y0, y1) = (sorted((draw(corners), draw(corners))) for _ in range(2))
    return Detection(draw(st.sampled_from(["cat", "dog"])), (x0, y0, x1, y1), draw(scores))


many = st.lists(detections(), max_size=8)
thresholds = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


def is_part(some, all_):
    """`some` are objects of `all_`, themselves, in the same order."""
    remaining = iter(all_)
    return all(any(item is other for other in remaining) for item in some)


def test_a_minimum_drops_lower_and_unknown_scores():
    items = [Detection("cat", (0, 0, i, i), score) for i, score in enumerate((0.2, None, 0.5, 0.9))]
    assert above(items, 0.0) == items
    assert above(items, 0.5) == items[2:]
    assert above(items, 1e-9) == [items[0], *items[2:]]


def test_the_better_of_two_duplicates_stays_in_its_place():
    box, moved = (0, 0, 100, 100), (1, 0, 100, 100)
    low, high = Detection("cat", box, 0.3), Detection("cat", moved, 0.8)
    other, far = Detection("dog", box, 0.1), Detection("cat", (0, 0, 100, 90), 0.1)
    assert without_duplicates([low, other, far, high]) == [other, far, high]
    assert without_duplicates([Detection("cat", box), low]) == [low]
    first, second = Detection("cat", box), Detection("cat", box)
    [kept] = without_duplicates([first, second])
    assert kept is first


def test_boxes_without_area_are_duplicates_when_equal():
    dot, other = Detection("cat", (3, 3, 3, 3)), Detection("cat", (4, 3, 4, 3))
    assert without_duplicates([dot, other, dot]) == [dot, other]


def test_suppression_is_per_label_unless_told_otherwise():
    cat, dog = Detection("cat", (0, 0, 10, 10), 0.4), Detection("dog", (0, 0, 10, 9), 0.6)
    assert suppress([cat, dog], 0.5) == [cat, dog]
    assert suppress([cat, dog], 0.5, per_label=False) == [dog]


def test_a_suppressed_box_suppresses_none():
    """A overlaps B, and B overlaps C, but A and C do not: B alone goes."""
    a, b, c = (Detection("cat", (x, 0, x + 10, 10), score) for x, score in ((0, 0.9), (4, 0.8), (8, 0.7)))
    assert suppress([c, b, a], 0.4) == [c, a]


@settings(deadline=None, derandomize=True)
@given(many, thresholds, st.booleans())
def test_suppression(items, iou, per_label):
    kept = suppress(items, iou, per_label)
    assert is_part(kept, items)
    assert suppress(kept, iou, per_label) == kept

    def rivals(a, b):
        return box_iou(a.box, b.box) > iou and (a.label == b.label or not per_label)

    assert not any(rivals(a, b) for i, a in enumerate(kept) for b in kept[:i])
    for item in items:
        if not any(item is other for other in kept):
            assert any(rivals(item, other) and known_score(other) >= known_score(item) for other in kept)


@settings(deadline=None, derandomize=True)
@given(many)
def test_every_duplicate_has_one_that_stays(items):
    kept = without_duplicates(items)
    assert is_part(kept, items) and without_duplicates(kept) == kept
    assert {(item.label, item.box) for item in kept} == {(item.label, item.box) for item in items}
    best = {
        key: max(known_score(i) for i in items if (i.label, i.box) == key) for key in {(i.label, i.box) for i in items}
    }
    assert [known_score(item) for item in kept] == [best[item.label, item.box] for item in kept]


def test_masks_and_spans_come_through():
    mask = np.ones((2, 2), bool)
    item = Detection("cat", (0, 0, 2, 2), 0.5, mask=mask, span=(0, 9))
    assert above([item], 0.5)[0] is suppress([item], 0.0)[0] is without_duplicates([item])[0] is item
