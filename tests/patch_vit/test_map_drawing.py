"""Overlays keep size and mode and never darken the best patch; strips, films and grids have the sizes they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import DataError
from paligemma_jax.patch_vit import drawing

MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I", "F")
LONG = "a very long phrase about something that no bar of this width can ever hold, whatever the letters' size"


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 2**20, (height, width), np.int32))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), np.float32))
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), rng.integers(0, 256, (height, width, bands), np.uint8).tobytes())


@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    shape=st.sampled_from([(8, 8), (7, 7), (4, 11), (1, 1)]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_an_overlay_multiplies_patches_and_keeps_size_and_mode(mode, size, shape, seed):
    image = picture(mode, *size, seed)
    values = np.random.default_rng(seed).dirichlet(np.ones(shape[0] * shape[1])).reshape(shape)
    found = drawing.overlay(image, values)
    assert (found.size, found.mode) == (image.size, mode)
    before, after = np.asarray(image, np.float64), np.asarray(found, np.float64)
    for y in range(0, size[1], 7):
        for x in range(0, size[0], 5):
            cell = values[int((y + 0.5) * shape[0] / size[1]), int((x + 0.5) * shape[1] / size[0])] / values.max()
            expected = before[y, x] * cell
            if mode.endswith("A"):
                expected[-1] = before[y, x, -1]
            np.testing.assert_allclose(after[y, x], expected, atol=0.5 if mode != "F" else 1e-6)
            assert cell < 1 or (after[y, x] == before[y, x]).all()


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    image = picture("RGB", 19, 13).convert(mode)
    found = drawing.overlay(image, np.ones((8, 8)))
    assert (found.size, found.mode) == ((19, 13), "RGB")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_a_picture_that_lies_on_its_side_is_turned():
    image = picture("L", 20, 10)
    exif = image.getexif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    assert drawing.overlay(image, np.ones((2, 2))).size == (10, 20)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.array([[1, np.nan]]), np.array([[1.0, -1]]), -np.ones((1, 1))])
def test_a_map_that_cannot_be_shown_is_one_line(values):
    with pytest.raises(DataError, match="values of at least 0 and a positive one"):
        drawing.overlay(picture("RGB", 4, 4), values)


@pytest.mark.parametrize("text", ["red circle", "", LONG, "красный круг", "赤い円", "دائرة", "a\nb\t\x00c", "🟥"])
def test_a_bar_has_its_size_and_shows_the_text(text):
    image = drawing.bar(text, 224)
    assert image.size == (224, 20)
    dark = np.asarray(image.convert("L")) < 128
    assert dark.any() == bool(text)
    assert not dark[:, :2].any() and not dark[:, -2:].any()


def test_a_strip_has_a_panel_of_224_for_each_phrase_and_a_bar_below():
    values = np.ones((3, 8, 8))
    values[0, :, 4:] = 0
    image = Image.new("RGB", (300, 100), "white")
    found = np.asarray(drawing.strip(image, values, ["a", LONG, "c"]))
    assert found.shape == (244, 3 * 224, 3)
    assert (found[:224, :112] == 255).all() and (found[:224, 112:224] == 0).all() and (found[:224, 224:] == 255).all()


@pytest.mark.parametrize("size", [(224, 224), (1001, 333), (7, 5), (3, 900)])
def test_a_film_shows_each_phrase_for_a_second(tmp_path, size):
    rng = np.random.default_rng(0)
    maps, labels = rng.random((4, 8, 8)), ["red", "green", LONG, "star"]
    frames = drawing.film(picture("RGB", *size), maps, labels)
    drawing.save_film(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.info["loop"], film.size) == (4, 0, frames[0].size)
        for i, frame in enumerate(frames):
            film.seek(i)
            assert film.info["duration"] == 1000
            shown = np.asarray(film.convert("RGB"), np.float32)
            assert np.abs(shown - np.asarray(frame)).mean() < 12
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


def test_found_pictures_stand_whole_on_white_under_their_row():
    tall = Image.new("RGB", (10, 100), "black")
    rows = [("student", [(tall, "1  0.5  tall.png"), (None, "2  0.4  gone.png")]), ("teacher", [(tall, "a")])]
    found = np.asarray(drawing.found_grid(rows, "red circle"))
    assert found.shape == (20 + 2 * (224 + 40), 2 * 224, 3)
    first = found[40 : 40 + 224, :224]
    assert (first[112, 112] == 0).all() and (first[:, :90] == 255).all()
    assert (found[40 : 40 + 224, 224:] == 255).all()
