"""Maps of phrases: probabilities, the same in any company, in any batch and from any number of windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import ConfigError, NumericsError
from paligemma_jax.patch_vit import activation, view, windows
from tests.patch_vit.phrases_fake import FakeClip, FakeStudent, squares

PHRASES = ("red thing", "green", "something blue", "anything")


def maps(image, phrases=PHRASES, choice=windows.AUTO, batch_size=16):
    (found,) = activation.phrase_maps(FakeStudent(), FakeClip(), [image], phrases, choice, batch_size)
    return found.maps


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_logits_are_twice_the_dot_products():
    rng = np.random.default_rng(0)
    patches, texts = rng.standard_normal((2, 9, 5)), rng.standard_normal((3, 5))
    expected = [[[2 * float(e @ t) for e in picture] for t in texts] for picture in patches]
    np.testing.assert_allclose(activation.patch_logits(patches, texts), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.floats(0, 300), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_maps_sum_to_one_however_large_logits_are(count, rows, columns, scale, seed):
    logits = scale * np.random.default_rng(seed).standard_normal((count, rows, columns)).astype(np.float32)
    found = activation.softmax(logits)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(activation.softmax(logits + 7), found, atol=1e-4)  # a shift changes nothing


@given(order=st.permutations(range(len(PHRASES))), size=st.sampled_from([(32, 32), (50, 20), (33, 90)]))
@settings(deadline=None, max_examples=20)
def test_the_order_and_company_of_phrases_changes_nothing(order, size):
    image, all_maps = noise(*size), maps(noise(*size))
    np.testing.assert_array_equal(maps(image, [PHRASES[i] for i in order]), all_maps[list(order)])
    np.testing.assert_allclose(maps(image, PHRASES[:1]), all_maps[:1], rtol=1e-6)


def test_one_window_is_the_plain_map_and_batches_change_nothing():
    for size in ((32, 32), (40, 36)):
        np.testing.assert_array_equal(maps(noise(*size)), maps(noise(*size), choice=windows.WHOLE))
    several = [noise(70, 30), noise(32, 32, 1), noise(20, 95, 2)]
    found = list(activation.phrase_maps(FakeStudent(), FakeClip(), several, PHRASES, batch_size=4))
    for image, item in zip(several, found, strict=True):
        np.testing.assert_allclose(item.maps, maps(image), rtol=1e-5)
        assert item.phrases == PHRASES


def test_windows_see_what_a_squeezed_picture_loses():
    image = squares(((100, 4, 124, 28), (255, 0, 0)), size=(256, 32))
    found = maps(image, ["red"])[0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert found.shape == (4, 32)
    assert 100 <= (column + 0.5) * 8 <= 124 and 4 <= (row + 0.5) * 8 <= 28
    red = np.zeros((4, 32), bool)
    red[:, 12:16] = True
    assert found[red].sum() > 0.95
    assert maps(image, ["red"], windows.WHOLE).shape == (1, 4, 4)


def test_windows_are_embedded_by_batch_size():
    student = FakeStudent()
    list(activation.phrase_maps(student, FakeClip(), [noise(300, 32)] * 3, PHRASES, batch_size=8))
    assert set(student.batches[:-1]) == {8} and 0 < student.batches[-1] <= 8


def test_a_view_has_an_overlay_of_the_pictures_size_for_each_phrase():
    overlays, arrays = view.heatmap_view(FakeStudent(), FakeClip(), noise(45, 31).convert("L"), PHRASES)
    assert [image.size for image in overlays] == [(45, 31)] * 4
    np.testing.assert_allclose(arrays.sum((1, 2)), 1, rtol=1e-5)


def test_a_teacher_of_another_width_is_one_line():
    clip = FakeClip()
    clip.config.projection_dim = 768
    with pytest.raises(ConfigError, match="embeddings of 768 numbers, the student of 3: give the teacher"):
        list(activation.phrase_maps(FakeStudent(), clip, [noise(8, 8)], PHRASES))


@pytest.mark.parametrize("owner, name", [(FakeClip, "embed_text"), (FakeStudent, "embed_patches")])
def test_numbers_that_are_not_finite_are_one_line(monkeypatch, owner, name):
    shape = (4, 3) if owner is FakeClip else (1, 16, 3)
    monkeypatch.setattr(owner, name, lambda self, given: np.full(shape, np.nan))
    with pytest.raises(NumericsError, match="are not finite"):
        maps(noise(8, 8))
