"""Which files a path, folder or glob names, and what is said about those that are passed over."""

import base64
import io
import os
import sys

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from paligemma_jax.errors import ImageError
from paligemma_jax.processing import decode, find
from paligemma_jax.processing.find import find_images, suffixes
from paligemma_jax.processing.image import load_image

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8))


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(decode, "has_heif", decode.has_heif.__wrapped__)
    monkeypatch.setattr(find, "has_heif", decode.has_heif)


@pytest.fixture
def album(tmp_path):
    for name in ("10.png", "2.PNG", "1.jpg", "notes.txt", ".hidden.png", "sub/3.webp", "odd [1].png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["1.jpg", "2.PNG", "10.png", "odd [1].png"]),
        ("*", ["1.jpg", "2.PNG", "10.png", "odd [1].png"]),
        ("1*", ["1.jpg", "10.png"]),
        ("**/*.webp", ["sub/3.webp"]),
        ("**", ["1.jpg", "2.PNG", "10.png", "odd [1].png", "sub/3.webp"]),
        ("odd [1].png", ["odd [1].png"]),
        ("notes.txt", ["notes.txt"]),  # named by the user: the loader says what is wrong with it
    ],
)
def test_find_images(album, pattern, found):
    assert find_images(str(album / pattern)) == [str(album / name) for name in found]


@pytest.mark.parametrize("url", ["https://example.org/a?b=*", "http://a/b c.png", "data:image/png;base64,AA*"])
def test_addresses_are_passed_on(url):
    assert find_images(url) == [url]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("x*", "matches no pictures and no other files"),
        ("x.png", "does not exist"),
        ("*.txt", r"matches no pictures: 1 file: notes.txt \(no picture\)"),
        ("fold*", r"matches no pictures: 1 files and folders: folder.png \(folder\)"),
        ("folder.png", "holds no pictures: it is empty"),
    ],
)
def test_nothing_is_found(album, pattern, words):
    with pytest.raises(ImageError, match=words):
        find_images(str(album / pattern))


def told(pattern, **arguments):
    lines = []
    find_images(str(pattern), tell=lines.append, **arguments)
    return lines


def test_a_folder_tells_what_it_passed_over(album, without_heif):
    [line] = told(album)
    assert line.startswith(
        f"note: {album}: passed over 4 files and folders: .hidden.png (hidden); folder.png, sub (fold"
    )
    assert line.endswith("; notes.txt (no picture by its ending)")
    for name in ("a.mp4", "b.heic", "c.HEIC", "d.heif", "e.hif", "n.md", "o.csv", "p", "q.pdf"):
        (album / name).touch()
    (album / "nowhere.png").symlink_to(album / "missing.png")
    [line] = told(album)
    parts = (
        "passed over 14 files",
        "a.mp4 (video: name it)",
        'b.heic, c.HEIC, d.heif and 1 more (HEIF: pip install -e ".[heif]")',
        "n.md, notes.txt, o.csv and 2 more (no picture by its ending)",
        "nowhere.png (not a file)",
    )
    assert all(part in line or "..." in line for part in parts) and len(line) < 300
    assert not told(album / "1.jpg") and not told(album / "1*.png")
    assert told(album / "*.*", also=(".mp4",)) != told(album / "*.*")


def test_a_folder_without_pictures_tells_what_it_holds(tmp_path, without_heif):
    for name in ("a.txt", "b.heic", "clip.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ImageError) as error:
        find_images(str(tmp_path))
    for part in ("holds no pictures: 3 files: ", "a.txt (no picture", "b.heic (HEIF: pip install", "clip.mp4 (video"):
        assert part in str(error.value)


def test_long_lists_stay_short(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}{'x' * 150}.txt").touch()
    with pytest.raises(ImageError, match="200 files") as error:
        find_images(str(tmp_path))
    assert len(str(error.value)) < 300
    (tmp_path / "a.png").touch()
    [line] = told(tmp_path)
    assert len(line) < 300 and "197 more" in line


OTHERS = {".jpe": "JPEG", ".mpo": "MPO", ".apng": "PNG", ".dib": "DIB", ".pcx": "PCX", ".sgi": "SGI", ".jfif": "JPEG"}
OTHERS |= {
    ".icns": "ICNS",
    ".tga": "TGA",
    ".xbm": "XBM",
    ".dds": "DDS",
    ".j2k": "JPEG2000",
    ".blp": "BLP",
    ".msp": "MSP",
}


@pytest.mark.parametrize("suffix", OTHERS)
def test_whatever_pil_opens_is_found_and_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    mode = {"XBM": "1", "MSP": "1", "BLP": "P"}.get(OTHERS[suffix], "RGB")
    RGB.convert(mode).save(path, format=OTHERS[suffix])
    for pattern in (tmp_path, tmp_path / f"*{suffix}", tmp_path / "*", path):
        assert find_images(str(pattern)) == [str(path)]
    assert load_image(path).mode == "RGB"


def test_no_films_programs_and_measurements():
    assert {".avif", ".jpg", ".jpeg", ".png", ".tif", ".mpo", ".jpe", ".webp", ".gif"} <= suffixes()
    assert not {".pdf", ".mpg", ".eps", ".ps", ".h5", ".grib", ".txt", ""} & suffixes()


PAGES = {
    "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "b.ps": b"%!PS\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "c": b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + (60).to_bytes(4, "little") + bytes(20) + b"%!PS-Adobe-3.0",
    "d.png": b"%PDF-1.7\n",
}


@pytest.mark.parametrize("name", PAGES)
def test_programs_are_never_run(tmp_path, name, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda self: pytest.fail("PostScript is opened"))
    path = tmp_path / name
    path.write_bytes(PAGES[name])
    RGB.save(tmp_path / "photo", format="PNG")
    if path.suffix != ".png":
        assert find_images(str(tmp_path / "*")) == [str(tmp_path / "photo")]
    uri = f"data:image/png;base64,{base64.b64encode(PAGES[name]).decode()}"
    for source in (path, PAGES[name], uri, io.BytesIO(PAGES[name])):
        with pytest.raises(ImageError, match=r"is (PostScript|PDF), which is not read: convert it to PNG first"):
            load_image(source)


@pytest.mark.parametrize("head", [b"\xd7\xcd\xc6\x9a\0\0", b"GRIB\0\0\0\x01", b"BUFR", b"\x89HDF\r\n\x1a\n"])
def test_kinds_that_are_only_recognized_are_unknown(head):
    with pytest.raises(ImageError, match="unknown kind: convert it to PNG or JPEG"):
        load_image(head + bytes(99))


@pytest.mark.parametrize("name", ["photo", "photo.bin", "IMG.0001", "photo.txt"])
def test_a_glob_takes_pictures_by_their_contents(tmp_path, name):
    RGB.save(tmp_path / name, format="JPEG")
    (tmp_path / "photo.md").write_text("# Photos\n")
    lines = []
    assert find_images(str(tmp_path / "[pI]*"), tell=lines.append) == [str(tmp_path / name)]
    assert lines == [f"note: {tmp_path / '[pI]*'}: passed over 1 file: photo.md (no picture)"]
    with pytest.raises(ImageError, match=r"photo.*by its ending"):
        find_images(str(tmp_path))


def test_heif_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    smooth = RGB.resize((3, 2)).resize((94, 60), Image.Resampling.BILINEAR)
    for name in ("a.heic", "b.HIF", "c.heif", "photo"):
        smooth.save(tmp_path / name, format="HEIF", quality=90)
    assert [os.path.basename(name) for name in find_images(str(tmp_path))] == ["a.heic", "b.HIF", "c.heif"]
    assert len(find_images(str(tmp_path / "*"))) == 4
    for source in (tmp_path / "photo", (tmp_path / "a.heic").read_bytes()):
        difference = np.asarray(load_image(source), float) - np.asarray(smooth, float)
        assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc"])
def test_heif_without_its_package(tmp_path, without_heif, brand):
    content = (
        b"\0\0\0\x1cftyp" + (brand if brand != b"hevc" else b"mif1") + b"\0\0\0\0mif1" + brand + b"miaf" + bytes(99)
    )
    (tmp_path / "a.heic").write_bytes(content)
    (tmp_path / "photo").write_bytes(content)
    for source in (tmp_path / "a.heic", tmp_path / "photo", content):
        with pytest.raises(ImageError, match=r'is HEIF, which needs pillow-heif: pip install -e "\.\[heif\]"'):
            load_image(source)
    assert len(find_images(str(tmp_path / "*"))) == 2


def test_avif(tmp_path, monkeypatch):
    if not decode.features.check("avif"):
        pytest.skip("this PIL has no AVIF")
    RGB.save(tmp_path / "a.avif", quality=100)
    assert find_images(str(tmp_path)) == [str(tmp_path / "a.avif")] and load_image(tmp_path / "a.avif").size == RGB.size
    monkeypatch.setattr(decode.features, "check", lambda name: False)
    with pytest.raises(ImageError, match="is AVIF, which needs a newer Pillow: pip install -U pillow"):
        load_image(tmp_path / "a.avif")
    monkeypatch.setattr(find, "suffixes", lambda: {".png"})
    with pytest.raises(ImageError, match=r"a.avif \(AVIF: pip install -U pillow\)"):
        find_images(str(tmp_path))
