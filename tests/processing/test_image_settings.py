"""From a picture to pixels: sizes, resampling, ranges, and the files that say how."""

import fnmatch
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.checkpoints import companions, hub
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError
from paligemma_jax.processing.image import ImageSettings, load_image, to_pixels

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
    assert read_settings({"size": [448, 448], "image_mean": [0, 0.1, 1]}).mean == (0.0, 0.1, 1.0)


def test_settings_of_transformers_5(read_settings):
    content = {"image_processor": HUB_SETTINGS | {"resample": 2}, "processor_class": "PaliGemmaProcessor"}
    assert read_settings(content, "processor_config.json") == ImageSettings(448, "bilinear")


def test_settings_without_a_file(tmp_path):
    assert ImageSettings.from_dir(tmp_path, 224) == ImageSettings(224, "bicubic")


def test_the_nested_settings_come_before_an_older_file(read_settings):
    """As transformers 5 reads them: whatever a stale preprocessor_config.json says, even if it is damaged."""
    nested = {"image_processor": HUB_SETTINGS | {"resample": 0}, "processor_class": "PaliGemmaProcessor"}
    read_settings(nested, "processor_config.json")
    for stale in (HUB_SETTINGS | {"size": {"height": 224, "width": 224}}, HUB_SETTINGS | {"resample": 2}, "{"):
        assert read_settings(stale) == ImageSettings(448, "nearest")
    for other in ({"processor_class": "PaliGemmaProcessor"}, {"image_processor": None}):  # has none
        (read_settings(HUB_SETTINGS), read_settings(other, "processor_config.json"))
        assert read_settings(HUB_SETTINGS | {"resample": 2}) == ImageSettings(448, "bilinear")
    with pytest.raises(ConfigError, match=r"processor_config.json: image_processor is \[1\], expected an object"):
        read_settings({"image_processor": [1]}, "processor_config.json")
    with pytest.raises(ConfigError, match=r"/processor_config.json: size is .*224.*, expected a square of 448"):
        read_settings({"image_processor": {"size": {"height": 224, "width": 224}}}, "processor_config.json")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_settings("{", "processor_config.json")


@pytest.mark.parametrize("name", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_of_pil_by_its_number(read_settings, name):
    filter_ = Image.Resampling[name.upper()]
    settings_ = read_settings({"resample": filter_.value}, size=9)
    assert settings_.resample == name
    np.testing.assert_allclose(settings_.to_pixels(RGB) * 127.5 + 127.5, RGB.resize((9, 9), filter_), atol=1e-4)


GREYS = Image.fromarray(np.array([[0, 51], [102, 255]], np.uint8)).convert("RGB")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    "fields, values",
    [
        ({}, [-1, -0.6, -0.2, 1]),
        (
            {"image_processor_type": None, "do_convert_rgb": None, "do_pad": None, "do_center_crop": None},
            [-1, -0.6, -0.2, 1],
        ),
        ({"do_rescale": None, "do_normalize": None, "rescale_factor": None, "image_mean": None}, [0, 51, 102, 255]),
        ({"image_mean": 0, "image_std": 1}, [0, 0.2, 0.4, 1]),
        ({"image_mean": [1, 0, 0], "image_std": [-1, 1, 1]}, [1, 0.8, 0.6, 0]),
        (IMAGENET, [-2.1179, -1.2445, -0.3712, 2.2489]),
        ({"rescale_factor": 1 / 127.5}, [-1, -0.2, 0.6, 3]),
        ({"rescale_factor": 0.1, "do_normalize": False}, [0, 5.1, 10.2, 25.5]),
        ({"do_rescale": False, "image_mean": 51, "image_std": 2}, [-25.5, 0, 25.5, 102]),
        ({"do_rescale": False, "do_normalize": False}, [0, 51, 102, 255]),
    ],
)
def test_arithmetic_of_settings(read_settings, fields, values):
    """The red channel of four grey pixels, by hand; a null step is not done."""
    settings_ = read_settings(fields, size=2)
    np.testing.assert_allclose(settings_.to_pixels(GREYS)[..., 0].ravel(), values, atol=1e-4)
    assert settings_.to_pixels(GREYS).dtype == np.float32
    assert ImageSettings.from_json(settings_.to_json(), 2) == settings_


SHORTEST = {"size": {"shortest_edge": 8}}


@pytest.mark.parametrize(
    "fields, shapes",
    [
        ({"size": {"height": 8, "width": 8}}, "any"),
        ({"size": 8, "default_to_square": True}, "any"),
        ({"size": {"height": 8, "width": 8, "longest_edge": None}}, "any"),
        ({"size": {"height": 8, "width": 8}, "do_center_crop": True, "crop_size": 8}, "any"),
        ({"size": {"height": 8, "width": 8}, "do_pad": True, "pad_size": {"height": 8, "width": 8}}, "any"),
        ({"size": {"height": 8, "width": 8}, "do_pad": True}, "any"),
        ({"size": 8}, "square"),
        (SHORTEST, "square"),
        (SHORTEST | {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "square"),
        ({"do_resize": False}, "same"),
        ({"do_resize": None, "resample": "x"}, "same"),
        ({"do_resize": False, "size": {"height": 99, "width": 1}}, "same"),
    ],
)
def test_which_shapes_of_pictures_fit(read_settings, fields, shapes):
    """A picture is seen whole or refused: in transformers the others become arrays that the network does not take."""
    settings_ = read_settings(fields, size=8)
    assert settings_.shapes == shapes and ImageSettings.from_json(settings_.to_json(), 8) == settings_
    square, same = RGB.crop((0, 0, 20, 20)), RGB.crop((0, 0, 8, 8))
    np.testing.assert_array_equal(settings_.to_pixels(same), to_pixels(same, 8))
    for picture, fits in ((square, shapes != "same"), (RGB, shapes == "any")):
        if fits:
            np.testing.assert_array_equal(settings_.to_pixels(picture), to_pixels(picture, 8))
        else:
            what = "do_resize is false" if shapes == "same" else "size is a shortest_edge"
            with pytest.raises(ImageError, match=f"is {picture.width} x {picture.height}, and {what} in .*config.json"):
                settings_.to_pixels(picture)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_other_modes_are_converted_or_refused_by_name(read_settings, tmp_path, mode):
    """Without do_convert_rgb transformers normalizes three channels of a picture that has another number of them."""
    picture = Image.new("I;16", (9, 5)) if mode == "I;16" else RGB.convert(mode)
    picture.save(tmp_path / "a.tiff")
    rgb = load_image(load_image(tmp_path / "a.tiff"))  # detect and the command line load it themselves
    assert read_settings({"do_convert_rgb": True}, size=8).to_pixels(rgb).shape == (8, 8, 3)
    settings_ = read_settings({"do_convert_rgb": False}, size=8)
    np.testing.assert_array_equal(settings_.to_pixels(load_image(RGB)), to_pixels(RGB, 8))
    with pytest.raises(ImageError, match=f"a.tiff has mode {mode}, and do_convert_rgb is false in .*config.json: "):
        settings_.to_pixels(rgb)


def test_settings_round_trip(read_settings):
    for settings_ in (
        ImageSettings(448),
        ImageSettings(448, "box", (0.0, 0.1, 0.2), (1.0, 2.0, 3.0), 0.5, "square", False),
    ):
        assert read_settings(settings_.to_json()) == settings_


def test_what_is_saved_is_what_was_in_force(tmp_path):
    """In the older file, which all versions of transformers read; the newer one would come before it."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUB_SETTINGS | {"size": 224}))
    nested = {"image_processor": HUB_SETTINGS | IMAGENET | {"resample": 1}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    settings_ = ImageSettings.from_dir(tmp_path, 448)
    settings_.save(tmp_path, 1024)
    assert not (tmp_path / "processor_config.json").exists()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_seq_length"] == 1024 and saved["size"] == {"height": 448, "width": 448}
    assert saved["resample"] == 1 and saved["image_mean"] == IMAGENET["image_mean"]
    assert ImageSettings.from_dir(tmp_path, 448) == settings_


def test_settings_of_an_earlier_conversion_do_not_come_first(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "preprocessor_config.json").write_text(json.dumps(HUB_SETTINGS))
    (tmp_path / "old" / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 224}}))
    assert companions.copy((tmp_path / "new",), tmp_path / "old") == ["preprocessor_config.json"]
    assert ImageSettings.from_dir(tmp_path / "old", 448) == ImageSettings(448)


def test_the_hub_is_asked_for_both_files():
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in hub._PATTERNS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": 224, "width": 224}),
        ("size", {"height": 448, "width": 224}),
        ("size", {"shortest_edge": 224}),
        ("size", {"shortest_edge": 448, "longest_edge": 896}),
        ("size", {"max_height": 448, "max_width": 448}),
        ("size", "448"),
        ("size", 224),
        ("size", {}),
        ("size", None),
        ("image_mean", None),
        ("image_std", None),
        ("rescale_factor", None),
        ("resample", 6),
        ("resample", None),
        ("resample", "bicubic"),
        ("resample", [3]),
        ("resample", True),
        ("rescale_factor", 0),
        ("rescale_factor", "x"),
        ("rescale_factor", float("nan")),
        ("do_normalize", "false"),
        ("do_resize", 0),
        ("do_convert_rgb", []),
        ("image_mean", [0.5]),
        ("image_mean", "0.5"),
        ("image_mean", 10**400),
        ("image_std", [0.5, 0.5, "x"]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", 1e-300),
        ("image_processor_type", "CLIPImageProcessor"),
        ("image_processor_type", ["SiglipImageProcessor"]),
    ],
)
def test_impossible_settings(read_settings, key, value):
    with pytest.raises(ConfigError, match=f"json: {key} is .*, expected") as error:
        read_settings(HUB_SETTINGS | {key: value})
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("crop", [None, 224, {"height": 448, "width": 400}, {"shortest_edge": 448}, "x"])
def test_settings_that_would_lose_part_of_a_picture(read_settings, crop):
    with pytest.raises(ConfigError, match=r"crop_size is .*, expected a square of 448.*, or do_center_crop false"):
        read_settings(HUB_SETTINGS | {"do_center_crop": True, "crop_size": crop})
    assert read_settings(HUB_SETTINGS | {"crop_size": crop}) == ImageSettings(448)  # not in force
    with pytest.raises(ConfigError, match=r"pad_size is .*, expected a square of 448.*, or do_pad false"):
        read_settings(HUB_SETTINGS | {"do_pad": True, "pad_size": crop or 500})


def test_damaged_settings(read_settings):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_settings("{")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.sampled_from(["", "x", "8", "3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["height", "width", "x"]), inner),
    max_leaves=4,
)
KEYS = ["size", "crop_size", "pad_size", "resample", "rescale_factor", "image_mean", "image_std"]
KEYS += ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop", "do_pad", "default_to_square"]
KEYS += ["image_processor_type"]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(fields=st.dictionaries(st.sampled_from(KEYS), ODD, max_size=4), nested=st.booleans())
def test_odd_files_give_settings_or_one_line(fields, nested, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "odd"
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 1} if nested else fields))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": fields} if nested else {}))
    try:
        settings_ = ImageSettings.from_dir(folder, 8)
    except ConfigError as error:
        assert "\n" not in str(error) and "config.json: " in str(error)
        return
    assert np.isfinite(settings_.to_pixels(RGB.crop((0, 0, 8, 8)))).all()
    assert ImageSettings.from_json(json.loads(json.dumps(settings_.to_json())), 8) == settings_
