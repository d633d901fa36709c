"""run=heatmap, compare and locate: what is written and printed, and what is refused."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.patch_vit.phrases_fake import FakeClip, FakeStudent, squares

SIZE = (64, 64)


@pytest.fixture
def scene(tmp_path):
    """A folder with a red and a green square, twice, the second picture upside down."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    image = squares(((0, 0, 16, 16), (255, 0, 0)), ((32, 32, 64, 64), (0, 255, 0)), size=SIZE)
    image.save(folder / "a.png")
    image.rotate(180).save(folder / "b.png")
    return folder


@pytest.fixture
def phrases(main, monkeypatch, tmp_path, scene):
    """phrases(run, KEY=VALUE ...): `main` with models that know colours. Returns status, stdout, stderr."""
    monkeypatch.setattr("paligemma_jax.patch_vit.load", lambda path, same_norm=None: FakeStudent())
    monkeypatch.setattr("paligemma_jax.patch_vit.load_clip", lambda path: FakeClip())

    def run(name, **keys):
        defaults = {"run": name, "image": scene / "a.png", "output_dir": tmp_path / "out", "compilation_cache": False}
        defaults |= {"prompt": "red ; green thing"} if name != "compare" else {}
        defaults |= {"overwrite": True}
        return main("--config=configs/patch_vit.py", *(f"--config.{k}={v}" for k, v in (defaults | keys).items()))

    return run


@pytest.fixture
def refused(phrases, tmp_path):
    """refused(run, KEY=VALUE ...): the one line that a run ends with before anything is written."""

    def run(*names, **keys):
        status, out, err = phrases(*names, **keys)
        assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
        assert not list(tmp_path.glob("out/*"))
        return err

    return run


def size_of(path):
    with Image.open(path) as image:
        return image.size


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".run")


def test_a_heat_map_is_drawn_filmed_and_saved(phrases, tmp_path):
    status, out, _ = phrases("heatmap", output_dir=tmp_path / "maps")
    assert status == 0 and names(tmp_path / "maps") == ["a_film.gif", "a_maps.npz", "a_strip.png"]
    first, second, last = out.splitlines()
    assert first.startswith("red: highest at x 0..16, y 0..16, ") and first.endswith("% of the map")
    assert re.match(r"green thing: highest at x (32..48|48..64), y (32..48|48..64), ", second) and last.startswith(
        "wrote "
    )
    with np.load(tmp_path / "maps" / "a_maps.npz") as file:
        assert file["phrases"].tolist() == ["red", "green thing"]
        np.testing.assert_allclose(file["maps"].sum((1, 2)), 1, rtol=1e-5)
    assert size_of(tmp_path / "maps" / "a_strip.png") == (448, 244)


def test_several_pictures_in_batches_of_any_size(phrases, scene, tmp_path):
    for batch_size in (1, 2):
        status, out, _ = phrases("heatmap", image=scene, batch_size=batch_size, prompt="red", format="json")
        records = [json.loads(line) for line in out.splitlines()]
        assert status == 0 and [record["peaks"][0]["box"] for record in records] == [[0, 0, 16, 16], [48, 48, 64, 64]]
        assert records[0]["prompt"] == "red" and records[0]["grid"] == [4, 4]
        assert [len(record["files"]) for record in records] == [2, 2]  # one phrase is no film
        assert set(records[0]) == {"image", "prompt", "grid", "peaks", "files"}
    assert "a_film.gif" not in names(tmp_path / "out")


@pytest.mark.parametrize("kind", [".png", ".gif", ".npy", ".npz"])
def test_one_file_if_only_that_is_wanted(phrases, tmp_path, kind):
    assert phrases("heatmap", output=tmp_path / "new" / f"only{kind}")[0] == 0
    assert names(tmp_path / "new") == [f"only{kind}"] and not (tmp_path / "out").exists()
    if kind == ".npy":
        assert np.load(tmp_path / "new" / "only.npy", allow_pickle=False).shape == (2, 4, 4)


def test_windows_make_finer_maps(phrases, scene):
    grids = [json.loads(phrases("heatmap", format="json", windows=w)[1])["grid"] for w in ("off", 1, 2, "auto")]
    assert grids == [[4, 4], [4, 4], [8, 8], [4, 4]]


def test_a_damaged_picture_among_others_is_named_and_the_status_tells(phrases, scene):
    (scene / "bad.png").write_bytes(b"no picture")
    status, out, err = phrases("heatmap", image=scene, prompt="red")
    assert status == 1 and out.count("wrote") == 2 and err.count("error: ") == 1 and "bad.png" in err


def test_a_comparison_has_three_maps_and_a_number(phrases, tmp_path, scene):
    status, out, _ = phrases("compare", format="json", image=scene)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [set(record) for record in records] == [{"image", "correlation", "files"}] * 2
    assert size_of(tmp_path / "out" / "a_compare.png") == (672, 244)
    with np.load(tmp_path / "out" / "a_compare.npz") as maps:
        assert {name: values.shape for name, values in maps.items()} == {
            "student": (4, 4), "resized": (3, 3), "teacher": (3, 3),
        }  # fmt: skip
        assert all(abs(values.sum() - 1) < 1e-5 for values in maps.values())
        correlation = np.corrcoef(maps["resized"].ravel(), maps["teacher"].ravel())[0, 1]
    assert records[0]["correlation"] == pytest.approx(correlation, abs=1e-3)


def test_a_paligemma_is_shown_beside_it(phrases, tmp_path, checkpoint):
    assert phrases("compare", checkpoint=checkpoint, dtype="float32")[0] == 0
    assert size_of(tmp_path / "out" / "a_compare.png") == (896, 244)
    with np.load(tmp_path / "out" / "a_compare.npz") as maps:
        values = maps["paligemma"]
    assert values.shape[0] == values.shape[1] and values.min() >= 0 and values.max() == pytest.approx(1, abs=1e-4)


def test_boxes_and_masks_have_the_keys_of_detect(phrases, tmp_path):
    status, out, err = phrases("locate", format="json", export="coco,yolo")
    record = json.loads(out)
    assert status == 0 and set(record) == {"image", "prompt", "boxes", "masks"}
    assert [box["label"] for box in record["boxes"]] == ["red", "green thing"]
    assert set(record["boxes"][0]) == {"label", "box", "score"} and set(record["masks"][0]) == {
        *record["boxes"][0],
        "file",
    }
    with Image.open(record["masks"][1]["file"]) as image:
        mask = np.asarray(image)
    x0, y0, x1, y1 = map(int, record["boxes"][1]["box"])
    assert mask.shape == SIZE and mask[y0:y1, x0:x1].mean() > 100 and abs(x0 - 32) < 8 and x1 == y1 == 64
    assert names(tmp_path / "out") == [
        "a_drawn.png", "a_mask_0.png", "a_mask_1.png",
        "classes.txt", "coco_dataset.json", "coco_results.json", "labels",
    ]  # fmt: skip
    dataset = json.loads((tmp_path / "out" / "coco_dataset.json").read_text())
    assert [c["name"] for c in dataset["categories"]] == ["red", "green thing"] and len(dataset["annotations"]) == 2
    assert "a_drawn.png" in err


def test_what_is_not_found_is_said(phrases):
    _, out, _ = phrases("locate", min_score=1.0)
    assert out.splitlines() == ["red: not found", "green thing: not found"]


def test_options_of_locate_decide(phrases):
    def boxes(**keys):
        return json.loads(phrases("locate", format="json", **keys)[1])["boxes"]

    assert [box["label"] for box in boxes(background="green stuff", prompt="red")] == ["red"]
    small, large = (boxes(threshold=t, prompt="green")[0]["box"] for t in (0.9, 0.2))
    assert small[0] > large[0] and small[1] > large[1]
    assert boxes(min_score=1.0) == []
    assert len(boxes(nms=0.5)) == 2


@pytest.mark.parametrize(
    "run, keys, words",
    [
        ("heatmap", {"prompt": " ; "}, "names nothing: give phrases"),
        ("heatmap", {"image": "nowhere.png"}, "'nowhere.png' does not exist"),
        ("heatmap", {"windows": "many"}, "windows='many' is not possible"),
        ("heatmap", {"format": "xml"}, "format='xml' is not possible"),
        ("heatmap", {"batch_size": 0}, "batch_size=0 is not possible"),
        ("heatmap", {"output": "maps.jpg"}, "output='maps.jpg' is of no known kind"),
        ("heatmap", {"output_dir": ""}, "output_dir is empty"),
        ("heatmap", {"same_norm": "maybe"}, "same_norm='maybe' is not possible"),
        ("heatmap", {"student": ""}, "student is empty: name a directory"),
        ("heatmap", {"clip": ""}, "clip is empty: name a directory"),
        ("locate", {"background": "red"}, "'red' is in the prompt and in background"),
        ("locate", {"threshold": 2.0}, "threshold=2.0 is not possible"),
        ("locate", {"min_score": 2.0}, "min_score=2.0 is not possible"),
        ("locate", {"export": "voc"}, "export='voc' is not possible"),
    ],
)
def test_what_cannot_be_is_one_line(refused, run, keys, words):
    assert words in refused(run, **keys)


def test_one_output_for_two_pictures_is_one_line(refused, scene):
    assert "is one file" in refused("heatmap", image=scene, output="x.png")


def test_an_empty_folder_is_one_line(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for run in ("heatmap", "compare", "locate", "search"):
        assert "holds no pictures: it is empty" in refused(run, image=tmp_path / "empty")


def test_the_same_norm_of_the_student_can_be_set(phrases, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "paligemma_jax.patch_vit.load", lambda path, same_norm=None: seen.append(same_norm) or FakeStudent()
    )
    for value in ("auto", "on", "off"):
        phrases("heatmap", same_norm=value, prompt="red")
    assert seen == [None, True, False]


@pytest.mark.parametrize("key, other", [("student", "clip"), ("clip", "student")])
def test_models_in_the_wrong_place_are_one_line(main, tmp_path, scene, checkpoint, key, other):
    """Through the real loaders: a PaliGemma, the other one of the pair, a folder without weights, a missing path."""
    from tests.patch_vit.small import small_clip, small_student

    small_student("masked").save(tmp_path / "student")
    small_clip().save(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pt").write_bytes(b"no weights")
    keys = {
        "student": tmp_path / "student",
        "clip": tmp_path / "clip",
        "image": scene / "a.png",
        "output_dir": tmp_path / "out",
    }
    keys |= {"compilation_cache": False}
    for wrong in (checkpoint, tmp_path / other, tmp_path / "empty", tmp_path / "missing", tmp_path / "file.pt"):
        for run in ("heatmap", "search"):
            status, out, err = main(
                "--config=configs/patch_vit.py", f"--config.run={run}", f"--config.index={tmp_path / 'index'}",
                *(f"--config.{k}={v}" for k, v in (keys | {key: wrong}).items()),
            )  # fmt: skip
            err = err.removeprefix("note: run=heatmap does not use index\n")
            assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
            assert not (tmp_path / "index").exists()
