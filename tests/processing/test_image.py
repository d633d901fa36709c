import contextlib
import io
import struct
import threading
import warnings
import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from paligemma_jax.errors import ImageError
from paligemma_jax.processing.image import load_image

NOISE = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
RGB = Image.fromarray(NOISE)
GREY = RGB.convert("L")


def with_alpha(mode):
    image = RGB.convert(mode)
    image.putalpha(Image.fromarray(NOISE[:, :, 1]))
    return image


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def assert_one_line_error(source, *words):
    with pytest.raises(ImageError) as error:
        load_image(source)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def assert_same(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_are_converted_as_by_pil(mode):
    image = RGB.convert(mode)
    assert_same(load_image(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_alpha_is_dropped(mode):
    image = RGB.convert("P").convert("PA") if mode == "PA" else with_alpha(mode)
    assert_same(load_image(image), image.convert("RGB"))


@pytest.mark.parametrize(("mode", "opaque"), [("La", GREY), ("RGBa", RGB)])
def test_premultiplied_alpha(mode, opaque):
    assert_same(load_image(opaque.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)), opaque.convert("RGB"))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_palette_with_transparency(tmp_path, transparency):
    palette = RGB.quantize(256)
    palette.save(tmp_path / "p.png", transparency=transparency)
    assert_same(load_image(tmp_path / "p.png"), palette.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(mode):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    if mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    else:
        image = Image.frombytes(mode, (256, 1), ramp.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert image.mode == mode
    assert np.asarray(load_image(image))[0, :, 0].tolist() == list(range(256))


def test_sixteen_bit_file(tmp_path):
    Image.fromarray(np.asarray(GREY, np.uint16) * 257).save(tmp_path / "grey16.png")
    assert_same(load_image(tmp_path / "grey16.png"), GREY.convert("RGB"))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_float_range_is_recognised(white):
    values = np.linspace(0, white, 256, dtype=np.float32)[None]
    assert np.asarray(load_image(Image.fromarray(values)))[0, :, 0].tolist() == list(range(256))


def test_float_oddities_become_black():
    values = np.array([[np.nan, -5, np.inf, -np.inf, 1]], np.float32)
    assert np.asarray(load_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 0, 0, 255]


@pytest.mark.parametrize("values", [[[0, 0]], [[-3, -1]]])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_no_light_at_all(values, dtype):
    assert not np.asarray(load_image(Image.fromarray(np.array(values, dtype)))).any()


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(path, exif=exif)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
        assert_same(load_image(stored), expected)
    assert_same(load_image(path), expected)
    assert expected.size == (RGB.size if orientation <= 4 else RGB.size[::-1])


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0????" * 9, b"Exif\0\0"])
def test_damaged_exif_is_ignored(tmp_path, exif):
    (tmp_path / "a.jpg").write_bytes(encoded(RGB, format="JPEG", exif=exif))
    assert load_image(tmp_path / "a.jpg").size == RGB.size


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "ppm", "webp", "jp2", "tga"])
def test_path_and_text_name_the_same_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    RGB.save(path)
    with Image.open(path) as stored:
        expected = stored.convert("RGB")
    assert_same(load_image(path), expected)
    assert_same(load_image(str(path)), expected)


def test_arrays():
    assert_same(load_image(NOISE), RGB)
    assert_same(load_image(NOISE[:, ::-1]), RGB.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert_same(load_image(np.dstack([NOISE, NOISE[:, :, 0]])), RGB)
    for grey in (NOISE[:, :, 0], NOISE[:, :, :1]):
        np.testing.assert_array_equal(np.asarray(load_image(grey)), NOISE[:, :, [0, 0, 0]])


def test_arrays_of_jax():
    assert_same(load_image(jax.numpy.asarray(NOISE)), RGB)
    assert_same(load_image(jax.numpy.asarray(NOISE)[:, :, :1]), RGB.getchannel(0).convert("RGB"))
    for dtype in ("float32", "bfloat16"):
        assert_one_line_error(jax.numpy.asarray(NOISE / 255, dtype), f"{dtype} from 0 to 1", "(255 * array)")
    for function in (jax.jit, jax.grad):  # where an array has no values yet
        with pytest.raises(ImageError, match="gives no array"):
            function(lambda x: load_image(x) and x.sum())(jax.numpy.ones((4, 4, 3)))


class Drip:
    """A stream that can be read once, without a way back, as of a network."""

    def __init__(self, content):
        self.content = content

    def read(self):
        content, self.content = self.content, b""
        return content


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF"])
def test_bytes_and_open_files(tmp_path, format_):
    """A file is read from its start, wherever it was left, where that is possible; it stays open."""
    content = encoded(RGB, format=format_)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), Drip(content)):
        assert_same(load_image(source), expected)
    written = io.BytesIO()
    RGB.save(written, format=format_)  # and not rewound
    for _ in range(2):
        assert_same(load_image(written), expected)
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as file:
        file.seek(7)
        assert_same(load_image(file), expected)
        assert not file.closed
    assert_one_line_error(file, str(tmp_path / "a"), "cannot be read", "closed")
    with (tmp_path / "a").open(encoding="latin-1") as file:
        assert_one_line_error(file, "gives str instead of bytes")


def test_animations_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.apng", "a.png", "a.webp", "a.tiff"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        with Image.open(tmp_path / name) as stored:
            assert stored.n_frames == 3
            stored.seek(2)
        assert_same(load_image(tmp_path / name), frames[0])


def test_result_is_a_copy():
    image = RGB.copy()
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert_same(image, RGB)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (NOISE / 255, ["float64 from 0 to 1", "uint8", "(255 * array).round().astype('uint8')"]),
        ((NOISE / 255).astype(np.float16), ["float16 from 0 to 1", "(255 * array)"]),
        (NOISE > 9, ["bool from 0 to 1", "(255 * array)"]),
        (NOISE / 127.5 - 1, ["float64: pictures are uint8", "scaled to that"]),
        (NOISE.astype(np.int64), ["int64", "uint8"]),
        (NOISE * np.nan, ["float64", "uint8"]),
        (np.full((4, 4), "x"), ["<U1", "uint8"]),
        (np.full((4, 4), None), ["object", "uint8"]),
        (np.uint8(7), ["[]", "expected [H, W]"]),
        (NOISE.transpose(2, 0, 1), ["[3, 30, 47], channels first", "array.transpose(1, 2, 0)"]),
        (NOISE[:, :, 0][None], ["[1, 30, 47], channels first", "array.transpose(1, 2, 0)"]),
        (NOISE[None], ["[1, 30, 47, 3]", "expected [H, W]", "list(array)"]),
        (NOISE[:, :, :2], ["[30, 47, 2]", "expected [H, W]"]),
        (NOISE[:0], ["[0, 47, 3]", "no pixels"]),
        (Image.new("RGB", (0, 5)), ["0 x 5", "no pixels"]),
        (None, ["NoneType", "is not a picture"]),
        ([1, 2], ["list", "is not a picture"]),
        (b"", ["the given data is empty"]),
        (b"<html>", ["the given data is not a picture"]),
        (io.BytesIO(), ["the given file is empty"]),
        (io.BytesIO(b"BM"), ["the given file"]),
        (io.StringIO("text"), ["gives str instead of bytes", "binary mode"]),
        ("nowhere/a.png", ["nowhere/a.png does not exist"]),
        ("", ["folder"]),
        ("a\0b", ["cannot be opened"]),
        ("~a\0b", ["cannot be opened"]),
        ("~$a.png", ["~$a.png does not exist"]),
        ("~nobodyx/a.png", ["~nobodyx/a.png does not exist"]),
    ],
)
def test_sources_that_are_no_pictures(source, words):
    assert_one_line_error(source, *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "a.png"),
        (encoded(RGB, format="PNG")[:-900], "damaged or truncated"),
        (encoded(RGB, format="JPEG")[:-900], "damaged or truncated"),
        (encoded(RGB, format="WEBP")[:-300], "damaged or truncated"),
        (png_header(60_000, 60_000), "at most 134 million pixels"),  # refused by PIL
        (png_header(13_000, 12_000), "13000 x 12000: at most 134 million pixels"),  # PIL only warns
    ],
)
def test_files_that_are_no_pictures(tmp_path, content, word):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert_one_line_error(path, str(path), word)


def test_folder(tmp_path):
    assert_one_line_error(tmp_path, str(tmp_path), "is a folder")


def test_truncated_picture_that_pil_has_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB, format="PNG")[:-900])
    with Image.open(path) as image:
        assert_one_line_error(image, str(path), "damaged or truncated")


@pytest.mark.parametrize("error", (ValueError, ImportError))
def test_a_mode_that_cannot_be_converted_is_named_as_such(monkeypatch, error):
    def refuse(image, mode):
        raise error("LAB is not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ImageError, match="colours of mode LAB"):
        load_image(Image.new("LAB", (4, 4)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), format_=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damaged_bytes_give_a_picture_or_an_image_error(data, format_, tmp_path_factory):
    content = bytearray(encoded(RGB, format=format_))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(ImageError):
        assert load_image(path).mode == "RGB"


def test_global_state_stays(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(13_000, 12_000))
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    threads = [threading.Thread(target=lambda: assert_one_line_error(path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
