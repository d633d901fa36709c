"""Every format of data sets: the same pictures give the same examples, and what cannot be read is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.processing.image import load_image
from paligemma_jax.training.data import fingerprint, open_data
from paligemma_jax.training.data.locate import splits_of
from paligemma_jax.training.data.readers import json_file
from tests.training.data import worlds

EXPECTED = [(worlds.PREFIX, worlds.suffix(scene)) for scene in worlds.SCENES]


@pytest.mark.parametrize("form", worlds.WRITERS)
def test_every_format_gives_the_same_examples(form, tmp_path):
    examples = open_data(worlds.WRITERS[form](tmp_path))
    assert [(example.prefix, example.suffix) for example in examples] == EXPECTED
    assert [(e.prefix, e.suffix) for e in (examples[i] for i in (2, 0, 1))] == [EXPECTED[i] for i in (2, 0, 1)]
    for example, (_, size, _) in zip(examples, worlds.SCENES, strict=True):
        assert load_image(example.images[0]).size == size
        assert example.size in (None, size)


@pytest.mark.parametrize("form", worlds.WRITERS)
def test_the_most_tokens_are_known_without_a_tokenizer(form, tmp_path, processor):
    examples = open_data(worlds.WRITERS[form](tmp_path))
    for bound, example in zip(examples.bounds(), map(examples.draft, range(3)), strict=True):
        prefix_tokens, suffix_tokens = processor.count_prefix(example.prefix), processor.count_suffix(example.suffix)
        assert bound[0] == len(example.images) == 1
        assert bound[1] + 2 >= prefix_tokens and bound[2] + 1 >= suffix_tokens


@pytest.mark.parametrize("form", worlds.WRITERS)
def test_the_fingerprint_is_of_what_is_read(form, tmp_path):
    first, again, other = (worlds.WRITERS[form](tmp_path / name) for name in "abc")
    assert fingerprint(first) == fingerprint(again)
    for path in [path for path in other.rglob("*") if path.is_file()]:
        if path.suffix in (".jsonl", ".json", ".xml", ".csv") or path.parent.name == "labels":
            path.write_text(path.read_text().replace("grey dog", "grey fox").replace("1 0.", "0 0."))
        elif path.suffix == ".arrow":
            path.write_bytes(path.read_bytes().replace(b"grey dog", b"grey fox"))
    assert fingerprint(first) != fingerprint(other)


def test_a_folder_without_splits_and_a_file_are_data_sets_too(tmp_path):
    folder = worlds.write_coco(tmp_path) / "train"
    for path in (folder, folder / "_annotations.coco.json"):
        assert [(e.prefix, e.suffix) for e in open_data(path)] == EXPECTED
        assert len(open_data(path, split="valid")) == 3  # all there is


@pytest.mark.parametrize("form", ["paligemma", "jsonl"])
def test_validation_is_the_other_split_of_the_same_folder(form, tmp_path):
    folder = worlds.WRITERS[form](tmp_path)
    assert (len(open_data(folder)), len(open_data(folder, split="valid"))) == (3, 1)
    with pytest.raises(DataError, match="has no test split, only train, valid: name"):
        open_data(folder, split="test")


def test_splits_are_in_the_order_of_their_use(tmp_path):
    for name in ("test", "train", "val"):
        worlds.paint(tmp_path)
        worlds.write_lines(tmp_path / f"{name}.jsonl")
    assert list(splits_of(tmp_path)) == ["train", "valid", "test"]


def test_classes_of_all_splits_are_named(tmp_path):
    """Where no file lists them: validation asks for what training asks for."""
    folder = worlds.write_voc(tmp_path)
    worlds.paint(folder / "valid", worlds.SCENES[2:])
    (folder / "valid" / "2.xml").write_text(worlds.voc_xml(worlds.SCENES[2]))
    [example] = open_data(folder, split="valid")
    assert (example.prefix, example.suffix) == (worlds.PREFIX, "")


@pytest.mark.parametrize(
    "form, kind", [("coco", "coco"), ("yolo", "yolo"), ("voc", "voc"), ("csv", "csv"), ("arrow", "datasets")]
)
def test_a_format_can_be_forced(form, kind, tmp_path):
    folder = worlds.WRITERS[form](tmp_path)
    assert {found.kind for found in splits_of(folder).values()} == {kind}
    assert len(open_data(folder, data_format=kind)) == 3
    with pytest.raises(DataError, match="holds no data set with data_format=label_studio"):
        open_data(folder, data_format="label_studio")
    with pytest.raises(ConfigError, match="data_format='pascal' is not possible: give auto, jsonl, coco"):
        open_data(folder, data_format="pascal")


def test_the_export_for_openai_is_refused_by_its_keys(tmp_path):
    worlds.paint(tmp_path / "dataset")
    row = {"messages": [{"role": "user", "content": "detect cat"}]}
    (tmp_path / "dataset" / "_annotations.train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"line 1 is of an export for OpenAI: export .* again, as PaliGemma"):
        open_data(tmp_path)


def _coco(tmp_path, **changes):
    """The path of a COCO file some of whose first image's, annotation's or category's values are others."""
    worlds.paint(tmp_path)
    value = worlds.coco()
    for table, fields in changes.items():
        value[table][0 if table != "categories" else 2] |= fields
    (tmp_path / "x.json").write_text(json.dumps(value))
    return tmp_path / "x.json"


def test_odd_boxes_are_put_right_or_left_out_and_told(tmp_path):
    told = []
    path = _coco(tmp_path, annotations={"bbox": [20, 30, -16, -24]})
    assert open_data(path, tell=told.append)[0].suffix == EXPECTED[0][1]
    assert any("boxes reversed: 1, put right" in line for line in told)
    path = _coco(tmp_path, annotations={"bbox": [70, 6, 10, 24]})
    assert open_data(path, tell=told.append)[0].suffix == EXPECTED[0][1].partition(" ; ")[2]
    assert any("boxes without area: 1, left out" in line for line in told)
    path = _coco(tmp_path, annotations={"bbox": [-5, 6, 25, 24]})
    assert open_data(path, tell=told.append)[0].suffix.startswith("<loc0128><loc0000>")
    assert any("boxes partly outside: 1, clipped" in line for line in told)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": {"file_name": "9.png"}}, "image 10 names .*9.png, which is missing: set image_root"),
        ({"images": {"width": 0}}, "image 10 is 0 x 48: give width and height"),
        ({"images": {"id": 77}}, "annotations of image 10, which is not among its images"),
        ({"annotations": {"category_id": 5}}, "object of category 5, which is not among the categories"),
        ({"annotations": {"bbox": None}}, "is no COCO data set: TypeError"),
        ({"categories": {"name": "a ; b"}}, "class 'a ; b' cannot be written as text: rename it"),
    ],
)
def test_a_bad_coco_file_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        open_data(_coco(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ("{}", "has no list 'images'"),
        ("[1]", "is not JSON"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "has no list 'images'"),
        ('{"images": [{"id": 1},], "annotations": [], "categories": []}', "is no COCO data set: KeyError"),
        ('{"images": [], "annotations": [1', "is no"),
        ('{"images": [] "annotations": []}', "is not JSON .expected one of"),
        ('{"images": [], "annotations": [], "categories": []}', "names no classes"),
    ],
)
def test_a_file_that_is_no_coco_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_data(tmp_path / "x.json", data_format="coco")
    assert "\n" not in str(caught.value)


def test_lists_of_a_json_file_are_read_one_by_one(tmp_path):
    """As json reads them, whatever the white space, the order, and what else is there."""
    value = {"x": {"images": [9]}, "a": [1, {"b": [2, "]}"]}, [], None], "c": 3, "b": [], "é": ["\u2028"]}
    for i, options in enumerate(({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False})):
        path = tmp_path / f"{i}.json"
        path.write_text("\ufeff" * (i == 1) + json.dumps(value, **options), encoding="utf-8")
        found = {}
        for name, item in json_file.items(path, ("a", "b", "é", "c")):
            found.setdefault(name, []).append(item)
        assert found == {name: [None, *value[name]] for name in ("a", "b", "é")}


@pytest.mark.parametrize(
    "line, message",
    [
        ("2 .5 .5 .1 .1", "line 1 has class 2, which has no name in data.yaml"),
        ("0 .5 .5 .1", "line 1 has 3 numbers behind its class"),
        ("0 .5 .5 .1 .1 .9", "line 1 has 5 numbers behind its class"),
        ("0 20 30 10 10", "line 1 has 30: coordinates are shares"),
        ("cat .5 .5 .1 .1", "line 1 is 'cat .5 .5 .1 .1': give a class and numbers"),
    ],
)
def test_a_bad_yolo_label_is_named(tmp_path, line, message):
    folder = worlds.write_yolo(tmp_path)
    (folder / "train" / "labels" / "0.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        open_data(folder)


def test_a_data_yaml_whose_folders_are_not_there(tmp_path):
    folder = worlds.write_yolo(tmp_path)
    (folder / "data.yaml").write_text("train: nowhere\nnames: {0: cat, 1: grey dog}\n")
    with pytest.raises(DataError, match=r"data\.yaml names folders that are not there: correct its paths"):
        open_data(folder)
    (folder / "data.yaml").write_text("path: .\ntrain: [train/images]\nnames: {0: cat, 1: grey dog}\n")
    assert [(e.prefix, e.suffix) for e in open_data(folder / "data.yaml")] == EXPECTED


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "declares entities, which are not read"),
        ("</annotation>", "", "is no XML"),
        ("<width>64</width>", "", "has no size of the picture"),
        ("<xmin>5</xmin>", "<xmin>left</xmin>", "has a box that is no number"),
        ("0.png", "9.png", "names '9.png', which is missing"),
    ],
)
def test_a_bad_voc_file_is_named(tmp_path, old, new, message):
    folder = worlds.write_voc(tmp_path)
    file = folder / "train" / "0.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(DataError, match=rf"0\.xml {message}"):
        open_data(folder, data_format="voc")


def test_a_rotated_rectangle_becomes_the_box_around_it(tmp_path):
    """Turned by 90 degrees about its upper left corner, it lies to the left of it."""
    folder = worlds.write_label_studio(tmp_path)
    tasks = worlds.label_studio()
    value = tasks[0]["annotations"][1]["result"][0]["value"]
    value |= {"x": 50.0, "y": 25.0, "width": 25.0, "height": 12.5, "rotation": 90}  # (32, 12), 16 x 6 pixels
    (folder / "project.json").write_text(json.dumps(tasks))
    [region, _] = open_data(folder)[0].regions
    np.testing.assert_allclose(region.box, (26 / 64, 12 / 48, 32 / 64, 28 / 48), atol=1e-9)


def test_a_polygon_of_label_studio(tmp_path):
    folder = worlds.write_label_studio(tmp_path)
    tasks = worlds.label_studio()
    for task in tasks[:-1]:
        for result in task["annotations"][1]["result"]:
            value = result["value"]
            box = value["x"], value["y"], value["x"] + value["width"], value["y"] + value["height"]
            result["type"] = "polygonlabels"
            result["value"] = {"points": worlds.corners(box), "polygonlabels": value["rectanglelabels"]}
    (folder / "project.json").write_text(json.dumps(tasks))
    assert [(example.prefix, example.suffix) for example in open_data(folder)] == EXPECTED


def test_label_studio_of_another_form_is_refused(tmp_path):
    folder = worlds.write_label_studio(tmp_path)
    tasks = worlds.label_studio()
    tasks[0]["annotations"][1]["result"][0]["type"] = "brushlabels"
    (folder / "project.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match="task 0 has brush labels: export the data set as COCO"):
        open_data(folder)
    tasks = [{"id": 1, "data": {"image": "0.png"}, "label": []}]
    (folder / "project.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match="task 1 has no annotations: choose JSON when you export, not JSON-MIN"):
        open_data(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,prefix\n0.png,caption", "has no column 'suffix': its first line has to name it"),
        ("filename,xmin,class\n0.png,3,cat", "has no column 'image': for boxes in CSV, export the data set as COCO"),
        ("image,prefix,suffix,id\n0.png,a,b,3", "has an unknown column 'id'"),
        ("image,prefix,suffix\n0.png,a,b,c", "record 1 has 4 fields instead of 3: put texts in quotes"),
        ("image,prefix,suffix\n9.png,a,b", r"record 1 names .*9\.png, which is missing"),
        ("image,prefix,suffix\n", "is empty"),
    ],
)
def test_a_bad_table_is_named(folder, text, message):
    (folder / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(folder / "x.csv")


def test_records_of_a_table_may_have_line_breaks_and_several_pictures(folder):
    text = '\ufeffimage,prefix,suffix\r\n0.png,caption en,"a\nstar"\r\n\r\n"[""0.png"", ""1.png""]",caption en,é\r\n'
    (folder / "x.csv").write_bytes(text.encode())
    examples = open_data(folder / "x.csv")
    assert [(len(e.images), e.suffix) for e in examples] == [(1, "a\nstar"), (2, "é")]
    (folder / "x.tsv").write_bytes(text.replace(",", "\t").replace('\t ""', ', ""').encode())
    assert [e.suffix for e in open_data(folder / "x.tsv")] == ["a\nstar", "é"]


def test_an_arrow_folder_needs_its_columns_and_files(tmp_path):
    folder = worlds.write_arrow(tmp_path)
    path = folder / "train" / "data-0.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"suffix", b"answer"))
    (folder / "train" / "data-1.arrow").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="has no column 'suffix', only image, prefix, answer: rename columns"):
        open_data(folder)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_data(folder)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing is not there: give a \.jsonl file, or the folder"):
        open_data(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no data set that is known"):
        open_data(tmp_path)
    (tmp_path / "x.json").write_text('{"weights": 3}')
    with pytest.raises(DataError, match="is of no known format, with the keys weights"):
        open_data(tmp_path / "x.json")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds several data sets \(a\.jsonl, b\.jsonl\): name the file of one"):
        open_data(tmp_path)


def test_pictures_may_be_turned_by_their_exif(tmp_path):
    """Sizes are those of the upright picture."""
    worlds.write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "train" / "0.png", exif=exif)
    example = open_data(tmp_path)[0]
    assert load_image(example.images[0]).size == example.size == (64, 48)
