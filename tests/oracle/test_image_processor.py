"""Pixels against transformers' PIL backend, for settings as files have them, odd ones included."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, ImageError
from paligemma_jax.processing.image import ImageSettings, load_image

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")

SIZE = 32
SQUARE = {"size": {"height": SIZE, "width": SIZE}}
STALE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 99, "width": 99}, "resample": 0}
NOISE = np.random.default_rng(1).integers(0, 256, (200, 310, 3), np.uint8)
PICTURES = [Image.fromarray(NOISE[: shape[0], : shape[1]]) for shape in ((37, 300), (64, 64), (1, 1), (SIZE, SIZE))]
PICTURES += [PICTURES[0].convert(mode) for mode in ("L", "P", "CMYK")]


def reference(directory) -> "transformers.image_processing_backends.PilBackend":
    return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")


def write(directory, name, fields):
    (directory / name).write_text(json.dumps(fields))
    config = {"model_type": "paligemma", "vision_config": {"image_size": SIZE}}
    (directory / "config.json").write_text(json.dumps(config))


def compare(directory, pictures=PICTURES) -> int:
    """Ours are theirs, bit for bit, or refused where theirs would not fit the network; how many are compared."""
    settings, theirs = ImageSettings.from_dir(directory, SIZE), reference(directory)
    count = 0
    for picture in pictures:
        try:
            expected = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        except ValueError as error:
            assert "elements if it is an iterable" in str(error)  # three means for another number of channels
            expected = np.zeros(0)
        if expected.shape != (SIZE, SIZE, 3):
            with pytest.raises(ImageError):
                settings.to_pixels(load_image(picture))
            continue
        np.testing.assert_array_equal(settings.to_pixels(load_image(picture)), expected.astype(np.float32))
        count += 1
    return count


@pytest.mark.parametrize(
    "fields, count",
    [
        (SQUARE, 7),
        *((SQUARE | {"resample": number}, 7) for number in range(6)),
        (SQUARE | {"do_rescale": None, "do_normalize": None, "image_mean": None, "rescale_factor": None}, 7),
        (SQUARE | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, 7),
        (SQUARE | {"image_mean": 0.25, "image_std": 2}, 7),
        (SQUARE | {"image_std": [-0.5, 1, 3]}, 7),
        (SQUARE | {"rescale_factor": 1 / 127.5}, 7),
        (SQUARE | {"rescale_factor": 0.00392156862745098}, 7),
        (SQUARE | {"rescale_factor": 1, "image_mean": 127.5, "image_std": 127.5}, 7),
        (SQUARE | {"do_rescale": False}, 7),
        (SQUARE | {"do_normalize": False}, 7),
        (SQUARE | {"do_rescale": False, "do_normalize": False}, 7),
        (SQUARE | {"do_convert_rgb": None}, 4),
        (SQUARE | {"do_convert_rgb": False}, 4),
        (SQUARE | {"do_center_crop": True, "crop_size": SIZE}, 7),
        (SQUARE | {"do_center_crop": False, "crop_size": 5}, 7),
        (SQUARE | {"do_pad": True}, 7),
        (SQUARE | {"image_seq_length": 7, "unknown": [1]}, 7),
        (SQUARE | {"image_processor_type": "SiglipImageProcessorFast"}, 7),
        ({"size": SIZE}, 3),
        ({"size": [SIZE, SIZE]}, 7),
        ({"size": SIZE, "default_to_square": True}, 7),
        ({"size": {"shortest_edge": SIZE}}, 3),
        ({"do_resize": False}, 1),
        ({"do_resize": None}, 1),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_equal_transformers(tmp_path, fields, count, nested):
    """In the older form, and nested beside an older file that says something else; and of what we save of it."""
    fields = {"image_processor_type": "SiglipImageProcessor"} | fields
    if nested:
        write(tmp_path, "preprocessor_config.json", STALE)
        write(tmp_path, "processor_config.json", {"image_processor": fields, "processor_class": "PaliGemmaProcessor"})
    else:
        write(tmp_path, "preprocessor_config.json", fields)
        write(tmp_path, "processor_config.json", {"processor_class": "PaliGemmaProcessor"})
    only_rgb = fields.get("do_convert_rgb", True) is None  # where theirs fail, ours are converted
    assert compare(tmp_path, PICTURES[: 4 if only_rgb else None]) == count
    ImageSettings.from_dir(tmp_path, SIZE).save(tmp_path, 4)
    assert compare(tmp_path, PICTURES[: 4 if only_rgb else None]) == count
    assert reference(tmp_path).image_seq_length == 4


@pytest.mark.parametrize("fields", [{"size": {"height": 64, "width": 64}}, {"size": {"height": 32, "width": 16}}])
def test_what_the_network_would_not_take_is_refused(tmp_path, fields):
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"} | fields)
    assert reference(tmp_path)(PICTURES[0], return_tensors="np")["pixel_values"].shape[2:] != (SIZE, SIZE)
    with pytest.raises(ConfigError, match="size is"):
        ImageSettings.from_dir(tmp_path, SIZE)
