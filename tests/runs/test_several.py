"""Two of everything: pictures, prompts, objects and answers that must not be taken for one another; their numbers."""

import json
import shutil
import time

import numpy as np
import pytest

from paligemma_jax.tasks.prompts import read_prompt

BOX = "<loc0000><loc0000><loc1023><loc0512>"
FAR = "<loc0200><loc0700><loc0500><loc1000>"
MASK = "".join(f"<seg{i:03d}>" for i in range(16))
PROMPTS = ("detect circle", "detect star ; moon")


@pytest.fixture
def two_prompts(tmp_path) -> dict[str, object]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return {"prompts_file": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_yolo_files_of_two_prompts_about_two_pictures(
    generate, pictures, answer_with, two_prompts, tmp_path, batch_size
):
    """A picture's file has the objects of both prompts, once each, with the classes of both."""
    answer_with({PROMPTS[0]: f"{BOX} circle", PROMPTS[1]: f"{FAR} moon ; {BOX} star"}.get)
    assert generate(image=pictures, export="yolo", batch_size=batch_size, **two_prompts)[0] == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "circle\nstar\nmoon\n"
    wide, far = "0.250244 0.500000 0.500489 1.000000", "0.830890 0.342131 0.293255 0.293255"
    files = {path.name: path.read_text() for path in (tmp_path / "out" / "labels").iterdir()}
    assert files == dict.fromkeys(("a.txt", "b.txt"), f"0 {wide}\n2 {far}\n1 {wide}\n")


def test_coco_files_of_two_prompts_about_two_pictures(generate, pictures, answer_with, two_prompts, tmp_path):
    answer_with({PROMPTS[0]: f"{BOX} circle", PROMPTS[1]: f"{FAR} moon ; {BOX} star"}.get)
    assert generate(image=pictures, export="coco", **two_prompts)[0] == 0
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert [(item["image_id"], item["category_id"], item["bbox"][0]) for item in results] == [
        *((1, 1, 0), (1, 3, 20.53), (1, 2, 0)),
        *((2, 1, 0), (2, 3, 13.69), (2, 2, 0)),
    ]
    dataset = json.loads((tmp_path / "out" / "coco_dataset.json").read_text())
    assert [item["id"] for item in dataset["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [item["image_id"] for item in dataset["annotations"]] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_go_to_their_own_picture_and_prompt(generate, pictures, answer_with, two_prompts, stream):
    calls = answer_with(lambda prompt: f"to {prompt}")
    status, out, _ = generate(image=pictures, stream=stream, **two_prompts)
    names = [str(pictures / name) for name in ("a.png", "b.jpg")]
    assert status == 0 and out == "".join(f"==> {n}: {p} <==\nto {p}\n" for n in names for p in PROMPTS)
    if not stream:
        [asked] = calls
        assert asked["prompts"] == [*map(read_prompt, PROMPTS)] * 2
        assert [picture.size for picture in asked["images"]] == [(30, 20)] * 2 + [(20, 30)] * 2


def embedding(number: float) -> np.ndarray:
    return np.full((4, 32), number, np.float32)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_loaded_embeddings_are_those_of_their_pictures(
    generate, pictures, answer_with, two_prompts, tmp_path, stream, batch_size
):
    """Of three pictures the second cannot be read: the third still has its own embeddings, for both prompts."""
    shutil.copytree(pictures, tmp_path / "three")
    shutil.copy(pictures / "a.png", tmp_path / "three" / "c.png")
    (tmp_path / "three" / "b.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    np.save(tmp_path / "given.npy", np.stack([embedding(i) for i in (1, 2, 3)]))
    calls = answer_with("a circle")
    keys = {"image": tmp_path / "three", "load_embeddings": tmp_path / "given.npy", "stream": stream}
    status, out, err = generate(**keys, batch_size=batch_size, **two_prompts)
    assert status == 1 and "b.jpg" in err and out.count("==> ") == 4
    given = np.concatenate([np.asarray(asked["image_embeddings"]) for asked in calls])
    np.testing.assert_array_equal(given, np.stack([embedding(i) for i in (1, 1, 3, 3)]))


def test_saved_embeddings_leave_out_what_cannot_be_read(generate, pictures, answer_with, tmp_path):
    shutil.copytree(pictures, tmp_path / "three")
    shutil.copy(pictures / "b.jpg", tmp_path / "three" / "c.jpg")
    (tmp_path / "three" / "b.jpg").write_bytes(b"nothing")
    answer_with("a circle")
    for folder, name in ((tmp_path / "three", "some.npy"), (pictures, "both.npy")):
        err = generate(image=folder, save_embeddings=tmp_path / name)[2]
        assert ("shape (2, 4, 32), without 1 that could not be read" in err) == (name == "some.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), np.load(tmp_path / "both.npy"))


def test_details_are_those_of_their_boxes(generate, answer_with, tokenizer):
    """Two boxes, a location of each with a probability of its own, and a label that is less sure."""
    numbers = {0: 0.5, 1023: 0.25, 512: 0.125, 200: 0.9, 700: 0.8, 500: 0.7, 1000: 0.6}

    def odds(tokens: np.ndarray) -> tuple[np.ndarray, ...]:
        places = tokens - tokenizer.loc_start
        chances = np.array([numbers.get(int(place), 1.0) for place in places])
        near = np.where(places == 700, 0.0625, np.where(places == 512, 0.25, 1.0))
        return np.log(chances), near, np.clip(places + 10.0, 0, 1023)

    answer_with(f"{BOX} circle ; {FAR} star", odds)
    [record] = records(generate(prompt="detect circle ; star", format="json")[1])
    assert [box["label"] for box in record["boxes"]] == ["circle", "star"]
    assert [box["score"] for box in record["boxes"]] == pytest.approx([0.25**0.25, 0.0625**0.25], abs=1e-4)
    assert [item["side_probabilities"] for item in record["details"]] == [
        [0.5, 0.5, 0.125, 0.25],  # x0, y0, x1, y1
        [0.8, 0.9, 0.6, 0.7],
    ]
    for item, places in zip(record["details"], ((10, 10, 522, 1023), (710, 210, 1010, 510)), strict=True):
        sizes = (30, 20, 30, 20)
        assert item["expected_box"] == [round(p / 1023 * s, 2) for p, s in zip(places, sizes, strict=True)]


def test_masks_and_boxes_of_two_objects_stay_together(generate, answer_with, score_with, tmp_path):
    score_with(0.25, 0.5, 0.75)
    answer_with(f"{FAR}{MASK} star ; {BOX} circle ; {BOX}{MASK} moon")
    [record] = records(generate(prompt="segment star ; moon", format="json", output_dir=tmp_path / "out")[1])
    assert [(box["label"], box["score"]) for box in record["boxes"]] == [
        ("star", 0.25),
        ("circle", 0.5),
        ("moon", 0.75),
    ]
    files = [tmp_path / "out" / f"a_mask_{i}.png" for i in range(2)]
    assert record["masks"] == [record["boxes"][i] | {"file": str(f)} for i, f in zip((0, 2), files, strict=True)]


# Numbers that are printed


def test_a_record_tells_the_times_of_its_answer(generate, answer_with, monkeypatch):
    """compile_s in seconds, prefill_ms and decode_ms_per_token in milliseconds, as the answer has them."""
    calls = answer_with(lambda prompt: prompt)
    start = time.perf_counter()
    [record] = records(generate(prompt="red circle", format="json")[1])
    tokens = len(calls[0]["self"].processor.tokenizer.encode("red circle")) + 1
    load_s = record["timing"].pop("load_s")
    assert record["timing"].pop("masks_ms") > 0 and record["timing"].pop("draw_ms") >= 0
    assert record["timing"] == {"compile_s": 3.0, "prefill_ms": 1.0, "decode_ms_per_token": 2.0, "new_tokens": tokens}
    assert 0 < load_s == calls[0]["self"].load_s < time.perf_counter() - start


def test_chat_tells_how_fast_an_answer_came(generate, answer_with, type_lines):
    calls = answer_with("red circle")
    type_lines("caption en")
    err = generate(run="chat")[2]
    tokens = len(calls[0]["self"].processor.tokenizer.encode("red circle")) + 1
    assert err.splitlines()[-1] == f"{tokens} tokens, 500.0 tokens/s (decode), prefill 1 ms, compiling 3.0 s"


def test_an_answer_of_one_token_has_no_rate(generate, answer_with, type_lines, monkeypatch):
    answer_with("")
    type_lines("caption en")
    assert generate(run="chat")[2].splitlines()[-1].startswith("1 token, ")
