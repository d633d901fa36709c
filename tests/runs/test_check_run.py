"""config.run=check: faults of data are counted and named, and examples are drawn as they are trained on."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import PromptError
from paligemma_jax.loading import load
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.training.data import open_data
from paligemma_jax.training.data.report import check_data
from tests.training.data import worlds

ROW = {"image": "0.png", "prefix": "caption en", "suffix": "a star"}
BOX = "<loc0100><loc0100><loc0300><loc0300>"


@pytest.fixture
def check(main):
    """check(KEY=VALUE, ...) -> (exit status, stdout, stderr)."""

    def run(**keys):
        arguments = [f"--config.{key}={value}" for key, value in ({"compilation_cache": False} | keys).items()]
        return main("--config=configs/check.py", *arguments)

    return run


@pytest.fixture
def data(tmp_path):
    """data(*rows): a file of them, beside pictures 0.png to 2.png that are not alike, and a damaged one."""
    worlds.paint(tmp_path)
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])

    def write(*rows, name="data.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    return write


def report_of(check, data, **keys):
    """Exit status, and the only split of the JSON that is printed."""
    status, out, _ = check(data=data, format="json", **keys)
    report = json.loads(out)
    return status, report["splits"]["data"], report


def test_good_data_have_counts(check, tmp_path):
    status, out, err = check(data=worlds.write_coco(tmp_path))
    assert (status, err) == (0, "")
    assert out.startswith("train: 3 examples, 3 pictures\n  tasks: detect 3\n  objects: 5 (cat 3, grey dog 2)\n")
    assert "tokens of prefix and suffix: 39 at most" in out and "0 kinds of errors, 1 of warnings" in out
    assert "  warning: examples whose answer is empty (nothing to detect): 1\n" in out


FAULTS = {
    "bad_rows": [ROW | {"suffix": " "}, ROW | {"image": "9.png"}, ROW | {"suffix": "<loc1024>"}, ROW | {"sufix": "a"}],
    "too_long": [ROW | {"suffix": "a star " * 90}],
    "unreadable": [ROW | {"image": "bad.png"}],
    "incomplete_objects": [ROW | {"prefix": "detect star", "suffix": f"{BOX} star ; <loc0001><loc0002>"}],
    "empty_suffixes": [ROW | {"prefix": "detect star", "suffix": ""}],
    "unknown_labels": [ROW | {"prefix": "detect star", "suffix": f"{BOX} circle"}],
    "no_objects": [ROW | {"prefix": "detect star", "suffix": "a star"}],
    "reversed_boxes": [ROW | {"prefix": "detect star", "suffix": "<loc0300><loc0100><loc0100><loc0300> star"}],
    "tiny_boxes": [ROW | {"prefix": "detect star", "suffix": "<loc0100><loc0100><loc0102><loc0300> star"}],
    "repeated_boxes": [ROW | {"prefix": "detect star", "suffix": f"{BOX} star ; {BOX} star"}],
}
ERRORS = ("bad_rows", "too_long", "unreadable", "incomplete_objects")


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_counted_and_named(check, data, kind):
    status, record, _ = report_of(check, data(ROW, *FAULTS[kind]))
    faults = record["errors" if kind in ERRORS else "warnings"]
    assert list(faults) == [kind] and status == (kind in ERRORS)
    assert faults[kind]["count"] == len(FAULTS[kind]) == len(faults[kind]["places"])
    assert "data.jsonl line 2" in faults[kind]["places"][0]
    assert record["repeated_share"] == (0.5 if kind == "repeated_boxes" else 0)


def test_classes_are_counted(check, data):
    rows = [ROW | {"prefix": "detect star ; circle ; square", "suffix": " ; ".join([f"{BOX} star"] * 100)}]
    _, record, _ = report_of(check, data(*rows), text_length=900)
    assert record["classes"] == {"star": 100, "circle": 0, "square": 0}
    assert record["unbalanced"] and record["objects"] == 100


def test_the_histogram_of_lengths(check, data):
    _, record, _ = report_of(check, data(*(ROW | {"suffix": "a " * i} for i in range(1, 8))))
    assert sum(record["lengths"]["counts"]) == record["examples"] == 7
    assert record["lengths"]["width"] * len(record["lengths"]["counts"]) > record["longest"]


def test_the_same_picture_twice_and_in_two_splits(check, tmp_path):
    folder = worlds.write_jsonl(tmp_path / "set")
    status, out, _ = check(data=folder, format="json")
    report = json.loads(out)
    assert status == 0 and report["between"]["count"] == 1 and report["warnings"] == 2
    (folder / "train" / "2.png").write_bytes((folder / "train" / "1.png").read_bytes())
    _, out, _ = check(data=folder / "train", format="json")
    [split] = json.loads(out)["splits"].values()
    assert split["warnings"]["duplicates"]["count"] == 1
    assert "2.png is" in split["warnings"]["duplicates"]["places"][0]
    worlds.write_jsonl(tmp_path / "other")
    _, out, _ = check(data=folder / "train", val_data=tmp_path / "other" / "valid", format="json")
    assert json.loads(out)["between"]["count"] == 1


def test_a_size_that_is_not_the_picture_s(check, tmp_path):
    folder = worlds.write_coco(tmp_path)
    Image.new("RGB", (48, 64)).save(folder / "train" / "0.png")
    _, out, _ = check(data=folder, format="json")
    faults = json.loads(out)["splits"]["train"]["warnings"]
    assert faults["other_sizes"]["count"] == 1 and "is 48 x 64" in faults["other_sizes"]["places"][0]


def test_odd_boxes_of_a_data_set(check, tmp_path):
    folder = worlds.write_coco(tmp_path)
    value = worlds.coco()
    for annotation, box in zip(value["annotations"], ([20, 30, -9, -9], [-5, 0, 30, 9], [90, 0, 9, 9]), strict=False):
        annotation["bbox"] = box
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(value))
    _, out, _ = check(data=folder, format="json")
    faults = json.loads(out)["splits"]["train"]["warnings"]
    assert faults["reversed_boxes"]["count"] == 1 and faults["boxes_outside"]["count"] == 3


def test_the_report_and_the_preview_are_files(check, tmp_path):
    """num_preview examples; with data_task=segment, masks too; augment and seed change the pictures."""
    folder = worlds.write_coco(tmp_path / "set")
    keys = {"data": folder, "preview": True, "data_task": "segment"}
    status, _, err = check(**keys, output_dir=tmp_path / "a")
    assert status == 0 and err.count("wrote") == 2
    assert json.loads((tmp_path / "a" / "report.json").read_text())["splits"]["train"]["tasks"] == {"segment": 3}
    page = (tmp_path / "a" / "preview" / "index.html").read_text()
    names = sorted(path.name for path in (tmp_path / "a" / "preview").iterdir())
    assert names == ["example_000.png", "example_001.png", "example_002.png", "index.html"]
    assert all(f'src="{name}"' in page for name in names[:-1])
    for role in ("picture", "prefix", "suffix", "padding"):
        assert f'<span class="{role}">' in page
    assert '<span class="prefix">&lt;bos&gt;</span>' in page and '<span class="suffix">&lt;eos&gt;</span>' in page
    assert '<span class="prefix">\\n</span>' in page  # the line break that ends a prefix is seen
    check(**keys, output_dir=tmp_path / "b", num_preview=1)
    assert len(list((tmp_path / "b" / "preview").glob("*.png"))) == 1
    first = np.asarray(Image.open(tmp_path / "a" / "preview" / names[0]))
    pictures = []
    for seed in (0, 1):
        check(**keys, output_dir=tmp_path / f"c{seed}", augment="crop,flip", seed=seed)
        pictures.append(np.asarray(Image.open(tmp_path / f"c{seed}" / "preview" / names[0])))
    assert len({picture.tobytes() for picture in (first, *pictures)}) == 3


def test_where_pictures_are_and_what_the_data_are(check, data, tmp_path):
    """image_root and data_format."""
    path = data(ROW)
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / "data.txt")
    assert check(data=moved)[0] == 1
    assert check(data=moved, image_root=tmp_path)[0] == 0
    assert check(data=moved, image_root=tmp_path, data_format="csv")[0] == 1


def test_codes_need_the_named_vae(check, tmp_path):
    """mask_vae and checkpoint."""
    folder = worlds.write_coco(tmp_path)
    keys = {"data": folder, "preview": True, "output_dir": tmp_path / "out", "data_task": "segment"}
    status, _, err = check(**keys, mask_vae=tmp_path / "none.npz", checkpoint="tiny")
    assert status == 1 and "none.npz is missing: name the file of the mask VQ-VAE" in err
    status, _, err = check(data=folder, checkpoint=tmp_path)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "keys, message",
    [
        ({}, "no data is given"),
        ({"data": "none.jsonl"}, "none.jsonl is not there"),
        ({"data": "x", "text_length": 0}, "text_length=0 is not possible"),
        ({"data": "x", "num_preview": 0}, "num_preview=0 is not possible"),
        ({"data": "x", "format": "xml"}, "format='xml' is not possible"),
        ({"data": "x", "augment": "turn"}, "augment='turn' is not possible"),
        ({"data": "x", "data_format": "zip"}, "data_format='zip' is not possible"),
        ({"data": "x", "data_task": "zip"}, "data_task='zip' is not possible"),
        ({"data": "x", "checkpoint": ""}, "no checkpoint is given"),
    ],
)
def test_what_cannot_be_is_one_line(check, keys, message):
    status, out, err = check(**keys)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1


def test_a_key_that_changes_nothing_is_told(check, data):
    assert check(data=data(ROW), dtype="float32")[2] == "note: run=check does not use dtype\n"


def test_a_preview_needs_a_place(check, data):
    status, out, err = check(data=data(ROW), preview=True)
    assert status == 1 and not out and "preview needs a place for its pictures: set output_dir too" in err


def test_what_the_tokenizer_or_the_model_does_not_know(data, monkeypatch):
    """A token behind the model's rows, and a text that does not come back."""
    rows = [ROW, ROW | {"suffix": "a strange star"}, ROW | {"suffix": "lost"}]
    examples = open_data(data(*rows))
    count, decode = Processor.count_suffix, Tokenizer.decode

    def count_suffix(self, suffix):
        if "strange" in suffix:
            raise PromptError("<strange> is id 99999 of the tokenizer, but the model has 9 rows: leave it out")
        return count(self, suffix)

    monkeypatch.setattr(Processor, "count_suffix", count_suffix)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("lost", "\ufffd"))
    processor = load("tiny", prepare=False, compilation_cache=False).processor
    record = check_data({"data": lambda bad_row: examples}, processor, 99)["splits"]["data"]
    assert "line 2: <strange> is id 99999" in record["errors"]["unknown_tokens"]["places"][0]
    assert "line 3: 'lost'" in record["warnings"]["unknown_characters"]["places"][0]
    assert len(record["errors"]) == len(record["warnings"]) == 1


def test_a_place_that_is_not_possible_is_known_before_the_work(check, data):
    rows = data(ROW)
    for keys, message in [
        ({"preview": True}, "preview needs a place"),
        ({"output_dir": rows / "out"}, "out is not possible: Not a directory; name a folder"),
    ]:
        status, out, err = check(data=rows, **keys)
        assert (status, out) == (1, "") and message in err and err.count("\n") == 1
