"""config.run=generate: which objects are kept, one question per class, and files for other tools."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.runs.questions import Question, together

BOX = "<loc0000><loc0000><loc1023><loc0512>"
NEAR = "<loc0000><loc0000><loc1023><loc0400>"
SAME = "<loc0000><loc0000><loc1022><loc0512>"
FAR = "<loc0000><loc0700><loc0500><loc1000>"
MASK = "".join(f"<seg{i:03d}>" for i in range(16))


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def labels(out: str) -> list[str]:
    return [box["label"] for record in records(out) for box in record["boxes"]]


def test_what_is_said_twice_is_given_once(generate, answer_with, score_with):
    score_with(0.5, 0.75, 0.25)
    answer_with(f"{BOX} circle ; {SAME} circle ; {BOX} star")
    status, out, err = generate(prompt="detect circle ; star", format="json")
    assert status == 0 and "duplicates, left out: 1" in err
    assert [(box["label"], box["score"]) for box in records(out)[0]["boxes"]] == [("circle", 0.75), ("star", 0.25)]


def test_low_scores_and_covered_boxes_are_left_out(generate, answer_with, score_with):
    score_with(0.9, 0.6, 0.3)
    answer_with(f"{BOX} circle ; {NEAR} circle ; {FAR} star")
    keys = {"prompt": "detect circle ; star", "format": "json"}
    assert labels(generate(**keys)[1]) == ["circle", "circle", "star"]
    _, out, err = generate(**keys, min_score=0.5)
    assert labels(out) == ["circle", "circle"] and "score below min_score=0.5, left out: 1" in err
    _, out, err = generate(**keys, nms=0.5)
    assert labels(out) == ["circle", "star"] and "(nms=0.5), left out: 1" in err
    assert labels(generate(**keys, nms=0.95)[1]) == ["circle", "circle", "star"]


def test_what_is_left_out_is_not_drawn(generate, answer_with, score_with, tmp_path):
    score_with(0.3)
    answer_with(f"{BOX}{MASK} circle")
    assert generate(prompt="segment circle", min_score=0.5, output_dir=tmp_path / "out")[0] == 0
    assert not list((tmp_path / "out").glob("*.png"))


ANSWERS = {"detect circle": f"{BOX} circle", "detect star": "", "detect red square": f"{FAR} red square ; <loc0001> x"}


def test_classes_asked_apart_are_reported_together(generate, pictures, answer_with, monkeypatch):
    asked = []

    def answer(prompt):
        asked.append(prompt)
        return ANSWERS[prompt]

    answer_with(answer)
    prompt = "detect circle; star ; red square;circle"
    status, out, err = generate(image=pictures, prompt=prompt, split_classes=True, format="json")
    assert status == 0 and set(asked) == set(ANSWERS)
    for record, name in zip(records(out), ("a.png", "b.jpg"), strict=True):
        assert (record["image"], record["prompt"]) == (str(pictures / name), prompt)
        assert record["text"] == f"{BOX} circle ; {FAR} red square ; <loc0001> x"
        assert [box["label"] for box in record["boxes"]] == ["circle", "red square"]
        assert record["dropped"] == ["<loc0001> x"] and record["finish_reason"] == "eos"
    assert err.count("detect star: no boxes: no star was found") == 2
    assert err.count("detect red square: incomplete objects in the answer, left out: 1") == 2


def test_split_classes_is_the_same_as_asking_apart(generate, pictures):
    keys = {"image": pictures, "format": "json", "dtype": "float32"}
    apart = [generate(prompt=f"detect {name}", **keys)[1] for name in ("circle", "square")]
    expected = [
        " ; ".join(text for record in both if (text := record["text"].strip()))
        for both in zip(*map(records, apart), strict=True)
    ]
    for batch_size in (1, 16):
        status, out, _ = generate(prompt="detect circle ; square", split_classes=True, batch_size=batch_size, **keys)
        assert status == 0 and [record["text"] for record in records(out)] == expected
        assert [record["timing"]["new_tokens"] for record in records(out)] == [8, 8]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "form, asked",
    [
        ("bare", ["left star", "circle"]),
        ("{task} the {phrase}", ["segment the left star", "segment the circle"]),
        ("find {classes}", ["find left star ; circle"]),
    ],
)
def test_classes_are_asked_for_in_another_form(generate, answer_with, form, asked, stream):
    """prompt_form: the objects of answers without labels have the one that their prompt names, if it names one."""
    calls = answer_with(f"{BOX}{MASK}")
    status, out, err = generate(prompt="segment left star;circle", prompt_form=form, stream=stream)
    prompts = [call["prompt"] for call in calls] if stream else calls[0]["prompts"]
    assert status == 0 and [prompt.text for prompt in prompts] == asked
    assert all(prompt.is_bare and prompt.task.name == "segment" for prompt in prompts)
    names = ["left star", "circle"] if len(asked) == 2 else ["object"]
    assert [line.partition(":")[0].strip() for line in err.splitlines() if " x 0..15" in line] == names
    if not stream:
        assert out == " ; ".join([f"{BOX}{MASK}"] * len(asked)) + "\n"


def test_chat_asks_in_another_form(generate, answer_with, type_lines):
    calls = answer_with(BOX)
    type_lines("detect left man ; dog", "<image>caption en")
    status, _, err = generate(run="chat", prompt_form="bare")
    assert status == 0 and [call["prompt"].text for call in calls] == ["left man", "dog", "caption en"]
    assert "  left man: x 0..15" in err and "  dog: x 0..15" in err


def test_a_form_without_meaning_is_one_line(refused):
    assert "prompt_form='{label}' is not possible: give bare" in refused(prompt_form="{label}")
    assert "prompt_form='bar' is not possible: give bare" in refused(run="chat", prompt_form="bar")
    assert "prompt_form='bare' is not possible" in refused("--config=configs/swap.py", run="swap", prompt_form="bare")


def test_objects_without_a_label_are_told_drawn_and_exported(generate, answer_with, score_with, tmp_path):
    score_with(0.5)
    answer_with(f"{BOX}{MASK}{FAR} moon")
    keys = {"prompt": "left man", "output_dir": tmp_path, "export": "coco,yolo"}
    status, _, err = generate(**keys)
    assert status == 0 and "  object: x 0..15, y 0..20, score 0.50, mask of" in err
    [category, other] = json.loads((tmp_path / "coco_dataset.json").read_text())["categories"]
    assert (category["name"], other["name"]) == ("object", "moon")
    assert (tmp_path / "classes.txt").read_text() == "object\nmoon\n"
    assert [line[0] for line in (tmp_path / "labels" / "a.txt").read_text().splitlines()] == ["0", "1"]
    assert (tmp_path / "a_drawn.png").exists() and (tmp_path / "a_mask_0.png").exists()
    assert labels(generate(prompt="left man", format="json")[1]) == ["", "moon"]
    assert labels(generate(prompt="detect left man", format="json")[1]) == ["left man", "moon"]
    assert labels(generate(prompt="detect left man ; star", format="json")[1]) == ["", "moon"]


@pytest.mark.parametrize("prompt", ["caption en", "detect circle", "answer en a ; b"])
def test_other_prompts_are_asked_as_they_are(generate, answer_with, prompt):
    answer_with(lambda asked: f"to {asked}")
    assert generate(prompt=prompt, split_classes=True)[1] == f"to {prompt}\n"


def test_an_answer_in_parts_is_cut_off_when_a_part_is():
    timing = pj.Timing(0.5, 1.0, None, 2)
    one = pj.Output("a", np.array([5, 1]), np.array([-1.0, -2.0]), "eos", timing, *np.zeros((2, 2)))
    two = pj.Output(" ", np.array([7]), np.array([-3.0]), "length", timing, *np.ones((2, 1)))
    three = pj.Output("b", np.array([9, 1]), np.array([-4.0, -5.0]), "eos", timing, *np.array([[2.0, 3.0], [4.0, 5.0]]))
    both = together([one, two, three])
    assert (both.text, both.finish_reason, both.timing.new_tokens) == ("a ; b", "length", 5)
    assert both.tokens.tolist() == [5, 1, 7, 9, 1] and both.logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert both.mean_logprob == -3.0 and one.mean_logprob == -1.5
    assert both.near.tolist() == [0, 0, 1, 2, 3] and both.expected.tolist() == [0, 0, 1, 4, 5]
    assert together([one]) is one
    assert [part.text for part in Question.of("x").parts] == ["x"]


def test_coco_files(generate, pictures, answer_with, score_with, tmp_path):
    score_with(0.5)
    answer_with(lambda prompt: f"{BOX}{MASK} star ; {FAR} circle" if "star" in prompt else f"{FAR} blue circle")
    (tmp_path / "prompts.txt").write_text("segment circle ; star\ndetect blue circle\n")
    out_dir = tmp_path / "out"
    keys = {"image": pictures, "prompts_file": tmp_path / "prompts.txt", "output_dir": out_dir}
    status, _, err = generate(**keys, export="coco")
    assert status == 0 and "coco_results.json, " in err and "of 2 pictures" in err
    dataset = json.loads((out_dir / "coco_dataset.json").read_text())
    assert [(item["id"], item["name"]) for item in dataset["categories"]] == [
        (1, "circle"),
        (2, "star"),
        (3, "blue circle"),
    ]
    assert [(item["file_name"], item["width"], item["height"]) for item in dataset["images"]] == [
        (str(pictures / "a.png"), 30, 20),
        (str(pictures / "b.jpg"), 20, 30),
    ]
    results = json.loads((out_dir / "coco_results.json").read_text())
    assert [(item["image_id"], item["category_id"]) for item in results] == [(i, c) for i in (1, 2) for c in (2, 1, 3)]
    assert results[0]["bbox"] == [0, 0, 15.01, 20] and results[0]["score"] == 0.5
    assert results[0]["segmentation"]["size"] == [20, 30] and "segmentation" not in results[1]
    assert len(dataset["annotations"]) == 6


def test_yolo_files(generate, pictures, answer_with, tmp_path):
    (tmp_path / "my photos").mkdir()
    for folder, name in (("my photos", "first one.png"), (".", "first one.png"), (".", "second.png")):
        Image.open(pictures / "a.png").save(tmp_path / folder / name)
    answer_with(f"{BOX} star ; {FAR} moon")
    keys = {"prompt": "detect circle ; star", "output_dir": tmp_path / "out", "export": " yolo, yolo"}
    status, _, err = generate(image=tmp_path / "**" / "*.png", **keys)
    assert status == 0 and "first one_2.txt" in err
    assert (tmp_path / "out" / "classes.txt").read_text() == "circle\nstar\nmoon\n"
    files = sorted((tmp_path / "out" / "labels").iterdir())
    assert [file.name for file in files] == ["first one.txt", "first one_2.txt", "second.txt"]
    first, second = files[0].read_text().splitlines()
    assert first == "1 0.250244 0.500000 0.500489 1.000000" and second.startswith("2 ")


def test_pictures_without_objects_are_exported_too(generate, pictures, answer_with, tmp_path):
    answer_with("")
    assert generate(image=pictures, prompt="detect star", output_dir=tmp_path, export="yolo,coco")[0] == 0
    assert [file.read_text() for file in (tmp_path / "labels").iterdir()] == ["", ""]
    dataset = json.loads((tmp_path / "coco_dataset.json").read_text())
    assert len(dataset["images"]) == 2 and dataset["annotations"] == []
    assert json.loads((tmp_path / "coco_results.json").read_text()) == []


def test_masks_without_pycocotools_are_refused_before_the_model_is_loaded(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setattr("paligemma_jax.load", lambda *args, **kw: pytest.fail("the model was loaded"))
    assert 'pip install -e ".[export]"' in refused(prompt="segment star", output_dir=tmp_path, export="coco")


def test_only_coco_needs_pycocotools_for_masks(generate, answer_with, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    answer_with(f"{BOX}{MASK} star")
    keys = {"prompt": "segment star", "output_dir": tmp_path, "export": "yolo,fiftyone,labelstudio"}
    assert generate(**keys)[0] == 0 and (tmp_path / "a_mask_0.png").is_file()


def test_boxes_need_no_pycocotools(generate, answer_with, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    answer_with(f"{BOX} star")
    assert generate(prompt="detect star", output_dir=tmp_path, export="coco,yolo")[0] == 0
