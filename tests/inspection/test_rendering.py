"""Maps as pictures: colours, places and sizes."""

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.inspection import rendering

SIZES = [(1, 1), (30, 20), (7, 900), (1600, 900), (224, 224)]


def _light(colors: np.ndarray) -> np.ndarray:
    return colors.astype(float) @ (0.2126, 0.7152, 0.0722)


def test_colours_get_lighter_all_the_way():
    ramp = rendering.colors(np.linspace(0, 1, 256))
    assert ramp.dtype == np.uint8 and ramp[0].tolist() == [0, 0, 4] and ramp[-1].tolist() == [252, 255, 164]
    assert (np.diff(_light(ramp)) >= 0).all() and np.abs(np.diff(ramp.astype(int), axis=0)).max() < 12
    assert rendering.colors(np.array([np.nan, -1, 2])).tolist() == [[128] * 3, [0, 0, 4], [252, 255, 164]]


def test_scaling_goes_from_the_smallest_to_the_largest():
    np.testing.assert_allclose(rendering.scaled(np.array([-2.0, 0, 2])), [0, 0.5, 1])
    np.testing.assert_allclose(rendering.scaled(np.array([-2.0, 0, 2]), (0, 1)), [0, 0, 1])
    assert rendering.scaled(np.full(3, 7.0)).tolist() == [0, 0, 0]
    assert rendering.extremes(np.array([np.nan, 1, np.inf])) == (1, 1) and rendering.extremes(np.array([np.nan])) == (
        0,
        0,
    )


@pytest.mark.parametrize("size", SIZES)
def test_an_overlay_lies_over_the_whole_picture(size):
    values = np.zeros((4, 4))
    values[0, 3] = 1  # the upper right corner
    image = rendering.overlay(Image.new("RGB", size, (200, 200, 200)), values)
    assert image.size == size
    if min(size) > 1:
        light = _light(np.asarray(image))
        place = np.unravel_index(light.argmax(), light.shape)
        assert place[0] <= size[1] / 4 and place[1] >= size[0] * 3 / 4 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 8, 16])
def test_pages_can_be_looked_at_whatever_the_picture(size, side):
    picture, values = Image.new("RGB", size, (20, 120, 60)), np.random.default_rng(0).normal(size=(side, side))
    words = [["猫", "a word far too long for its place", "\n", ""][i % 4] for i in range(side * side)]
    words = np.array(words, object).reshape(side, side)
    for page in (
        rendering.heat_map(picture, values, "A title " * 30),
        rendering.sheet(picture, np.stack([values] * 5), ["one", "\n", "", "é", "far too long a caption for this"], ""),
        rendering.sheet(picture, values[None], ["one"], "A title", shared=True),
        rendering.worded(picture, words, values, "A title"),
    ):
        assert page.mode == "RGB" and 200 < max(page.size) <= 2300 and min(page.size) > 60


def test_captions_and_maps_must_match():
    with pytest.raises(ValueError, match="shorter"):
        rendering.sheet(Image.new("RGB", (30, 20)), np.zeros((2, 4, 4)), ["one"], "")


@pytest.mark.parametrize("shape", [(4, 8), (64, 144), (256, 2048), (5000, 1), (2, 16, 300)])
def test_embeddings_of_any_size_fit_on_a_page(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    values.reshape(-1)[0] = np.nan
    page = rendering.embeddings(values, "x.npy")
    assert page.width <= 1300 and page.height <= 1100 * (shape[0] if len(shape) == 3 else 1)


def test_rows_of_embeddings_are_rows_of_the_picture():
    values = np.zeros((3, 40))
    values[1] = 1
    page = np.asarray(rendering.embeddings(values, "x"))
    inside = page[:, page.shape[1] // 2]
    bright = np.flatnonzero((inside == [252, 255, 164]).all(axis=-1))
    dark = np.flatnonzero((inside == [0, 0, 4]).all(axis=-1))
    assert dark[0] < bright[0] < bright[-1] < dark[-1] and abs(len(dark) - 2 * len(bright)) <= 2


@pytest.mark.parametrize("shape, size", [((2, 2400), (1200, 900)), ((1, 1300), (1200, 900)), ((3, 500), (1000, 900))])
def test_no_column_of_embeddings_is_left_out(shape, size, monkeypatch):
    values = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    monkeypatch.setattr(rendering, "_CUT", 0)
    shown = []
    monkeypatch.setattr(rendering, "colors", lambda x: shown.append(x) or np.zeros((*x.shape, 3), np.uint8))
    rendering.embeddings(values, "x")
    low, high = values.min(), values.max()
    pixels, (rows, columns) = low + (high - low) * shown[0], shape
    assert pixels.shape == size[::-1]
    np.testing.assert_allclose(pixels.mean(axis=1)[:: 900 // rows], values.mean(axis=1), atol=1e-3)
    if columns == 2400:
        expected = values.reshape(rows, -1, 2).mean(axis=2)
    elif columns == 500:
        expected = values.repeat(2, axis=1)
    else:
        return
    np.testing.assert_allclose(pixels, expected.repeat(900 // rows, axis=0), atol=1e-5)


def test_cells_of_a_table_have_the_colours_of_their_values():
    values = np.array([[0, 1.0], [0.5, 0], [1, 1]])
    words = [["", "\n"], ["猫", "far too long for its cell"], ["a", "b"]]
    page = rendering.table(words, values, ["x", "", "<bos>"], ["before", "after layer 1"], "A title " * 30)
    pixels = np.asarray(page).reshape(-1, 3)
    across, down = rendering._CELL
    assert page.mode == "RGB" and page.height > 4 * down
    ends = [(pixels == color).all(axis=1).sum() for color in ([0, 0, 4], [252, 255, 164])]
    cells = (across - 1) * (down - 1)
    assert 1.5 * cells < ends[0] < 2.5 * cells and 2.3 * cells < ends[1] < 3.5 * cells  # letters cover some


def test_signs_stand_for_what_cannot_be_seen():
    assert [rendering.printable(text) for text in (" cat", "\n", "  ", "", "a\x07b")] == ["cat", "\\n", "_", "-", "a?b"]
