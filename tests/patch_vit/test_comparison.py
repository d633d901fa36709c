"""Maps on another grid keep their sum and place; student and teacher are compared over the same area."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.patch_vit import comparison
from tests.patch_vit.phrases_fake import FakeClip, FakeStudent, squares
from tests.patch_vit.small import small_clip, small_student


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_resized_map_keeps_its_sum_and_an_even_one_stays_even(rows, columns, to_rows, to_columns, seed):
    values = np.random.default_rng(seed).random((rows, columns))
    found = comparison.resize_by_area(values, (to_rows, to_columns))
    assert found.shape == (to_rows, to_columns)
    np.testing.assert_allclose(found.sum(), values.sum(), rtol=1e-5)
    even = comparison.resize_by_area(np.ones((rows, columns)), (to_rows, to_columns))
    np.testing.assert_allclose(even, rows * columns / (to_rows * to_columns), rtol=1e-5)
    many = np.kron(values, np.ones((to_rows, to_columns)))  # both grids divide this one
    expected = many.reshape(to_rows, rows, to_columns, columns).sum((1, 3)) / (to_rows * to_columns)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_no_row_or_column_of_8_is_dropped_at_7():
    corner = np.zeros((8, 8))
    corner[-1, -1] = 1
    assert comparison.resize_by_area(corner, (7, 7))[-1, -1] == pytest.approx(1)
    assert comparison.resize_by_area(corner[::-1], (7, 7))[0, -1] == pytest.approx(1)


def test_both_look_at_the_whole_picture_however_wide():
    image = squares(((0, 0, 30, 30), (255, 255, 255)), size=(120, 30), ground=(0, 0, 0))
    (found,) = comparison.compare(FakeStudent(), FakeClip(), [image])
    for values in (found.student, found.resized, found.teacher):
        assert values.sum() == pytest.approx(1, abs=1e-5)
        assert (values[:, 0] > values[:, 1:].max(1)).all()  # what a crop of the middle would not show
    assert found.correlation > 0.9
    assert found.correlation == pytest.approx(np.corrcoef(found.resized.ravel(), found.teacher.ravel())[0, 1], abs=1e-5)


def test_an_even_map_has_no_correlation():
    even = np.full((3, 3), 1 / 9, np.float32)
    assert np.isnan(comparison.Comparison(np.eye(3), even, np.eye(3)).correlation)


def test_real_models_in_batches_give_what_single_pictures_give():
    images = [squares(((0, 0, 8, 8), (255, 0, 0)), size=size) for size in ((20, 20), (50, 31), (9, 40))]
    student, clip = small_student("masked"), small_clip()
    for one, image in zip(comparison.compare(student, clip, images, 2), images, strict=True):
        (single,) = comparison.compare(student, clip, [image])
        for name in ("student", "resized", "teacher"):
            np.testing.assert_allclose(getattr(one, name), getattr(single, name), atol=1e-6)
    assert one.student.shape == (4, 4) and one.teacher.shape == (3, 3)
