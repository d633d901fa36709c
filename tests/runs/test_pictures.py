"""Pictures of every kind on the command line: what is passed over, what they are called, and what is exported."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

SIZE = 30, 20  # as stored
TURNED = "turned.jpg"
STAR = "<loc0000><loc0000><loc0512><loc1023> star"  # the upper half
RNG = np.random.default_rng(0)


@pytest.fixture
def album(tmp_path):
    """Pictures that are stored in odd ways, all of SIZE; one has to be turned."""
    rgb = Image.fromarray(RNG.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8))
    others = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "album"
    folder.mkdir()
    rgb.save(folder / TURNED, exif=exif)
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(RNG.integers(0, 2**16, (SIZE[1], SIZE[0]), np.uint16)).save(folder / "deep.png")
    rgb.save(folder / "film.gif", save_all=True, append_images=others)
    rgb.save(folder / "film.apng", format="PNG", save_all=True, append_images=others)
    rgb.save(folder / "two.mpo", save_all=True, append_images=others)
    return folder


def test_exports_are_of_upright_pictures(generate, album, answer_with, tmp_path):
    answer_with(STAR)
    out = tmp_path / "out"
    keys = {"prompt": "detect star", "format": "json", "output_dir": out, "export": "coco,yolo"}
    status, text, err = generate(image=album, **keys)
    assert status == 0 and "passed over" not in err
    boxes = {record["image"]: record["boxes"][0]["box"] for record in map(json.loads, text.splitlines())}
    dataset = json.loads((out / "coco_dataset.json").read_text())
    assert len(dataset["images"]) == len(boxes) == 7
    for image, annotation in zip(dataset["images"], dataset["annotations"], strict=True):
        width, height = SIZE[::-1] if image["file_name"].endswith(TURNED) else SIZE
        assert (image["width"], image["height"]) == (width, height)
        assert annotation["bbox"] == pytest.approx([0, 0, width, height * 512 / 1023], abs=0.01)
        assert boxes[image["file_name"]] == pytest.approx(annotation["bbox"], abs=0.01)
    for file in (out / "labels").iterdir():
        assert file.read_text() == "0 0.500000 0.250244 1.000000 0.500489\n"
    with Image.open(out / "turned_drawn.png") as drawn:
        assert drawn.size == SIZE[::-1]


def test_what_is_passed_over_is_told(generate, album, answer_with):
    answer_with("a star")
    for name in ("notes.txt", "clip.mp4"):
        (album / name).touch()
    status, text, err = generate(image=album)
    assert status == 0 and text.count("a star") == 7
    assert f"{album}: passed over 2 files: clip.mp4 (video: name it); notes.txt (no picture by its ending)\n" in err
    status, text, err = generate(image=album / "[nt]*")
    assert status == 0 and text.count("a star") == 2 and "1 file: notes.txt (no picture)\n" in err


def test_inspect_tells_too(generate, pictures, refused, tmp_path):
    inspect = "--config=configs/inspect.py"
    assert refused(inspect, image=pictures).endswith("looks at one, give its path\n")
    (tmp_path / "notes.txt").touch()
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    status, _, err = generate(inspect, image=tmp_path, checkpoint=tmp_path / "none", output_dir=tmp_path / "out")
    assert status == 1 and "passed over 1 file: notes.txt" in err


def test_a_folder_without_pictures(refused, tmp_path):
    (tmp_path / "notes.txt").touch()
    passed_over = "1 file: notes.txt (no picture by its ending)"
    line = f"error: {tmp_path} holds no pictures: {passed_over}; give a folder with pictures\n"
    assert refused(image=tmp_path) == line


def test_a_data_uri_is_not_repeated(generate, pictures, answer_with, tmp_path):
    answer_with(STAR)
    uri = f"data:image/png;base64,{base64.b64encode((pictures / 'a.png').read_bytes()).decode()}"
    keys = {"image": uri, "prompt": "detect star", "output_dir": tmp_path / "out", "export": "coco"}
    status, text, err = generate(**keys, format="json")
    assert status == 0 and len(json.loads(text)["image"]) == 60 and uri[30:50] not in err
    assert json.loads(text)["image"].startswith("data:image/png;base64,")
    assert (tmp_path / "out" / "picture_drawn.png").is_file()
    [image] = json.loads((tmp_path / "out" / "coco_dataset.json").read_text())["images"]
    assert (image["width"], image["height"]) == (30, 20) and len(image["file_name"]) == 60


@pytest.mark.parametrize(
    "image, words",
    [
        (f"data:image/png;base64,{'A' * 5000}", "is not a picture"),
        (f"data:image/png;base64;{'A' * 5000}", "has no comma"),
        ("nowhere/" + "x" * 5000, "does not exist: give a picture, a folder, a glob or a URL"),
        ("nowhere/" + "x y " * 1000 + ".png", "does not exist: give a picture"),
        ("nowhere/" + "x" * 200 + "/" * 99 + "*.png", "matches no pictures and no other files"),
        (f"http://127.0.0.1:1/{'x' * 5000}.png", "cannot be fetched"),
    ],
)
@pytest.mark.parametrize("run", ["generate", "chat", "inspect"])
def test_lines_of_errors_are_short(refused, image, words, run):
    line = refused("--config=configs/inspect.py", image=image) if run == "inspect" else refused(image=image, run=run)
    assert words in line and len(line) <= 300


def test_a_glob_of_odd_names(generate, album, answer_with):
    answer_with("a star")
    for pattern, count in (("*.mpo", 1), ("*.apng", 1), ("film.*", 2)):
        status, text, err = generate(image=album / pattern)
        assert (status, text.count("a star")) == (0, count) and "error" not in err
