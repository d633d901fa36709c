"""Readers of the public formats: what is asked about which pictures, and what is right."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.evaluate import check, prompt_of, spread
from paligemma_jax.evaluation.examples import Objects, to_mask
from paligemma_jax.evaluation.tasks import TASKS
from paligemma_jax.evaluation.tasks import read as read_task
from tests.evaluation import public_files

READ = {  # by task: id, pictures, prompt, reference and group of each example
    "coco_captions": [
        ("7", ["val2017/000000000007.jpg"], "caption en", ("A dog.",), ""),
        ("9", ["val2017/000000000009.jpg"], "caption en", ("A cat.", "a grey cat"), ""),
    ],
    "textcaps": [
        ("a1", ["train_images/a1.jpg"], "caption en", ("A sign.", "Stop sign."), ""),
        ("b2", ["train_images/b2.jpg"], "caption en", ("A bus.",), ""),
    ],
    "vqav2": [
        ("42000", ["val2014/COCO_val2014_000000000042.jpg"], "answer en what 0?", ("a0",) * 10, "other"),
        ("42001", ["val2014/COCO_val2014_000000000042.jpg"], "answer en what 1?", ("a1",) * 10, "number"),
    ],
    "textvqa": [("5", ["train_images/f00.jpg"], "answer en which brand?", ("nokia",) * 9 + ("toshiba",), "")],
    "stvqa": [("8", ["coco-text/1.jpg"], "answer en what word?", ("Stop", "STOP"), "")],
    "docvqa": [("11", ["documents/x_1.png"], "What date?", ("Jan 5", "January 5"), "")],
    "infovqa": [("12", ["infographicsvqa_images/20.jpeg"], "answer en How many?", ("5",), "")],
    "chartqa": [
        ("human-0", ["test/png/human.png"], "human 1?", "10", "human"),
        *(
            (f"augmented-{i}", ["test/png/augmented.png"], f"augmented {i + 1}?", f"{i + 1}0", "augmented")
            for i in range(3)
        ),
    ],
    "science_qa": [
        (
            "1",
            ["test/1/image.png"],
            r"Question: Which?\nContext: Look.\nOptions: (A) iron, (B) wood\nAnswer:",
            "B",
            "",
        )
    ],
    "ai2d": [("22.png-0", ["images/22.png"], "answer en  Which one? choose from: sun \t moon", "moon", "")],
    "nlvr2": [
        (
            f"test1-0-1-{i}",
            ["test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png"],
            f"answer en There are {i}.",
            (str(bool(i)), str(bool(i)).lower()),
            "",
        )
        for i in range(2)
    ],
    "pope": [(str(i), ["val2014/COCO_1.jpg"], f"Is there {i}?", "no", "") for i in (1, 2)],
    "jsonl": [(str(i), ["1.png"], f"answer en {i}?", f"yes {i}", "") for i in range(3)],
}
BOX = ((2.0, 1.0, 4.0, 2.0),)
OBJECTS = {
    "coco_detection": [("3", ["val2017/p.jpg"], "detect dog ; sheep", Objects((8, 4), ("dog",), BOX), "")],
    "refcoco": [
        (str(i), ["train2014/p.jpg"], phrase, Objects((8, 4), ("",), BOX, (public_files.POLYGON,)), "")
        for i, phrase in enumerate(("left dog", "dog"))
    ],
}
ALL = READ | OBJECTS
SPLITS = {"coco_captions": "val2017"}  # others have their usual one


def read(name: str, root: Path):
    task = dataclasses.replace(TASKS[name], split=SPLITS.get(name, TASKS[name].split))
    return task, read_task(task, root)


@pytest.mark.parametrize("name", TASKS)
def test_a_public_data_set_is_read_as_it_lies_on_disk(name, tmp_path):
    getattr(public_files, name)(tmp_path)
    task, examples = read(name, tmp_path)
    check(task, examples)
    found = [
        (e.id, [str(Path(p).relative_to(tmp_path)) for p in e.images], prompt_of(task, e), e.reference, e.group)
        for e in examples
    ]
    assert found == ALL[name]


@pytest.mark.parametrize("name", READ)
def test_saying_what_is_right_scores_best(name, tmp_path):
    """All metrics of the task take the references that its reader makes."""
    getattr(public_files, name)(tmp_path)
    _, examples = read(name, tmp_path)
    right = [e.reference if isinstance(e.reference, str) else e.reference[0] for e in examples]
    said = [f"The answer is {text}." if name == "science_qa" else text for text in right]
    for metric in TASKS[name].metrics:
        score = METRICS[metric](said, [example.reference for example in examples]).main
        assert score == 1 if metric != "cider" else score > 1


def test_karpathys_splits(tmp_path):
    public_files.karpathy(tmp_path)
    [example] = TASKS["coco_captions"].read(tmp_path, "karpathy_val")
    assert example.id == "3" and example.reference == ("caption 3", "other")
    assert example.images == (str(tmp_path / "val2014/COCO_val2014_3.jpg"),)


def test_a_jsonl_file_may_be_named_and_have_several_answers_and_pictures(tmp_path):
    row = {"image": ["a.png", "b.png"], "prefix": "p", "answers": ["x", "y"]}
    public_files.as_jsonl(tmp_path / "mine.jsonl", [row])
    [example] = TASKS["jsonl"].read(tmp_path / "mine.jsonl", "test")
    assert example.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png")) and example.reference == ("x", "y")


def test_masks_are_those_of_polygons_and_run_lengths():
    inside = np.zeros((4, 8), bool)
    inside[1:3, 2:6] = True
    assert (to_mask(public_files.POLYGON, (8, 4)) == inside).all()
    column = {"size": [4, 8], "counts": [9, 2, 2, 2, 2, 2, 2, 2, 9]}  # down the columns, from outside
    assert (to_mask(column, (8, 4)) == inside).all()
    with pytest.raises(DataError, match="do not fill a mask"):
        to_mask({"size": [4, 8], "counts": [9, 2]}, (8, 4))
    [item] = Objects((8, 4), ("",), BOX, (public_files.POLYGON,)).detections()
    assert item.box == (2, 1, 6, 3) and (item.mask == inside).all()


def test_a_pickle_is_refused_with_a_way_to_convert_it(tmp_path):
    public_files.refcoco(tmp_path)
    (tmp_path / "refs.json").rename(tmp_path / "refs(unc).p")
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is a pickle.*docs/evaluation\.md"):
        read("refcoco", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_missing_is_named(name, tmp_path):
    with pytest.raises(DataError, match=r"docs/evaluation\.md"):
        read(name, tmp_path)
    getattr(public_files, name)(tmp_path)
    task, examples = read(name, tmp_path)
    Path(examples[-1].images[-1]).unlink()
    with pytest.raises(DataError, match=r"is missing \(1 of \d pictures"):
        check(task, examples)


def broken_jsonl(text):
    def write(root):
        (root / "test.jsonl").write_text(text)

    return write


def without_answers(root):
    public_files.textvqa(root)
    path = root / "TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    del content["data"][0]["answers"]
    public_files.as_json(path, content)


def with_a_question_that_nobody_answered(root):
    public_files.vqav2(root)
    public_files.as_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": []})


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("jsonl", broken_jsonl("{"), "line 1 is not JSON"),
        ("jsonl", broken_jsonl("3"), "line 1 holds a JSON int"),
        ("jsonl", broken_jsonl('{"image": "1.png", "prefix": "p"}'), "neither suffix nor answers"),
        ("jsonl", broken_jsonl('{"prefix": "p", "suffix": "s"}'), "without 'image'"),
        ("textvqa", without_answers, "has no answers, as test splits"),
        ("vqav2", with_a_question_that_nobody_answered, "nothing about question 42000"),
        ("docvqa", lambda root: (root / "val_v1.0.json").write_text("{"), "not valid JSON"),
        ("docvqa", lambda root: public_files.as_json(root / "val_v1.0.json", []), "without 'data'"),
        ("docvqa", lambda root: public_files.as_json(root / "val_v1.0.json", {"data": 3}), "does not hold docvqa"),
    ],
)
def test_files_that_are_not_what_they_should_be(name, write, message, tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        read(name, tmp_path)


def test_a_split_without_examples_and_a_metric_that_does_not_fit(tmp_path):
    with pytest.raises(DataError, match="no examples"):
        check(TASKS["jsonl"], [])
    public_files.coco_detection(tmp_path)
    _, examples = read("coco_detection", tmp_path)
    with pytest.raises(DataError, match="compares texts"):
        check(TASKS["jsonl"], examples)
    of_boxes = dataclasses.replace(TASKS["jsonl"], metrics=("detection_f1",))
    texts = [dataclasses.replace(example, reference=("a cat", "cats")) for example in examples]
    with pytest.raises(DataError, match="detection_f1 is of objects, and no reference of jsonl has any"):
        check(of_boxes, texts)
    check(of_boxes, [*texts, dataclasses.replace(texts[0], reference="<loc0000><loc0000><loc0500><loc0500> cat")])


def test_every_metric_of_a_task_is_known():
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)
    assert {task.name for task in TASKS.values()} == set(TASKS) == set(ALL)


def test_the_papers_numbers_depend_on_resolution_and_split():
    assert TASKS["textvqa"].reference(896, "val") == 76.48 and TASKS["vqav2"].reference(896, "val2014") is None
    assert TASKS["pope"].reference(448, "popular") == 88.40 and TASKS["pope"].reference(224, "train") is None


def test_a_part_of_the_examples_is_spread_over_all():
    assert spread("abcdefghij", 3) == ["a", "d", "g"]
    assert [spread("abc", limit) for limit in (0, 3, 9)] == [["a", "b", "c"]] * 3


def test_the_documentation_has_every_task_and_metric():
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert set(TASKS) | set(METRICS) <= set(rows)
    tables = page.partition("## How data sets lie on disk")[0]
    for task in TASKS.values():
        [row] = [line for line in tables.splitlines() if line.startswith(f"| `{task.name}` |")]
        prompt, metrics, length, split, paper = (part.strip() for part in row.split("|")[2:7])
        assert f"`{task.prompt}`" in prompt and all(f"`{name}`" in metrics for name in task.metrics[:1])
        assert (int(length), split.strip("`")) == (task.max_new_tokens, task.split)
        numbers = [v for found in task.paper.values() for v in (found.values() if isinstance(found, dict) else [found])]
        assert all(f"{number:.2f}" in paper for number in numbers) and bool(paper) == bool(numbers)
        assert task.num_beams == 1 or f"{task.num_beams} beams" in prompt
