"""From a picture to pixels: sizes, resampling, ranges, and the files that say how."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.processing.image import ImageSettings, to_pixels

NOISE = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
RGB = Image.fromarray(NOISE)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [7, 30, 64])
def test_pixels_are_the_resized_picture_in_minus_one_to_one(size, resample):
    pixels = to_pixels(RGB, size, resample)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.float32
    filter_ = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[resample]
    np.testing.assert_allclose(pixels * 127.5 + 127.5, np.asarray(RGB.resize((size, size), filter_)), atol=1e-4)


def test_range_of_pixels():
    assert (to_pixels(Image.new("RGB", (9, 5), "white"), 8) == 1).all()
    assert (to_pixels(Image.new("RGB", (9, 5), "black"), 8) == -1).all()


def test_mean_and_std_per_channel():
    pixels = to_pixels(Image.new("RGB", (4, 4), (0, 51, 255)), 4, mean=(0.0, 0.2, 0.5), std=(1.0, 0.5, 0.25))
    np.testing.assert_allclose(pixels, np.broadcast_to([0, 0, 2], (4, 4, 3)), atol=1e-6)


HUB_SETTINGS = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 448, "width": 448},
}


@pytest.fixture
def read_settings(tmp_path):
    def read(content, name="preprocessor_config.json", size=448):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return ImageSettings.from_dir(tmp_path, size)

    return read


def test_settings_of_a_hub_file(read_settings):
    assert read_settings(HUB_SETTINGS) == ImageSettings(448)
    assert read_settings(HUB_SETTINGS | {"resample": 2}) == ImageSettings(448, "bilinear")
    assert read_settings({"size": 448, "image_mean": [0, 0.1, 1]}).mean == (0.0, 0.1, 1.0)


def test_settings_of_transformers_5(read_settings):
    content = {"image_processor": HUB_SETTINGS | {"resample": 2}, "processor_class": "PaliGemmaProcessor"}
    assert read_settings(content, "processor_config.json") == ImageSettings(448, "bilinear")


def test_settings_without_a_file(tmp_path):
    assert ImageSettings.from_dir(tmp_path, 224) == ImageSettings(224, "bicubic")


@pytest.mark.parametrize(
    "settings_", [ImageSettings(448), ImageSettings(448, "bilinear", (0.0, 0.1, 0.2), (1.0, 2.0, 3.0))]
)
def test_settings_round_trip(read_settings, settings_):
    assert read_settings(settings_.to_json()) == settings_


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": 224, "width": 224}),
        ("size", {"height": 448, "width": 224}),
        ("size", {"shortest_edge": 448}),
        ("size", "448"),
        ("resample", 0),
        ("resample", "bicubic"),
        ("resample", [3]),
        ("rescale_factor", 1),
        ("rescale_factor", "x"),
        ("do_normalize", False),
        ("do_resize", False),
        ("image_mean", [0.5]),
        ("image_mean", None),
        ("image_std", [0.5, 0.5, "x"]),
        ("image_std", [0.5, 0.5, 0]),
    ],
)
def test_impossible_settings(read_settings, key, value):
    with pytest.raises(ConfigError, match=f"json: {key} is .*, expected"):
        read_settings(HUB_SETTINGS | {key: value})


def test_damaged_settings(read_settings):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_settings("{")


@pytest.mark.oracle
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(37, 500), (64, 64), (1, 1)])
def test_pixels_equal_transformers(shape, resample):
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8))
    settings_ = ImageSettings(64, resample)
    reference = siglip.SiglipImageProcessorPil.from_dict(settings_.to_json())
    expected = reference(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(settings_.to_pixels(image), expected)
