"""config.run=generate: what is printed and written for one picture and for many."""

import gzip
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.tasks.prompts import read_prompt

BOX = "<loc0000><loc0000><loc1023><loc0512>"
MASK = "".join(f"<seg{i:03d}>" for i in range(16))
KEYS = ["image", "prompt", "text", "finish_reason", "mean_logprob", "boxes", "masks", "details", "dropped", "timing"]
TIMING_KEYS = ["load_s", "compile_s", "prefill_ms", "decode_ms_per_token", "new_tokens", "masks_ms", "draw_ms"]


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_stdout_holds_just_the_answer_of_the_model(generate, checkpoint, pictures):
    expected = pj.load(checkpoint).generate(str(pictures / "a.png"), "caption en", 4)[0].text
    status, out, err = generate()
    assert (status, out) == (0, expected + "\n")
    assert "cut off after 4 tokens" in err


def test_streaming_prints_the_same(generate):
    assert generate(stream=True)[:2] == generate()[:2]


@pytest.mark.parametrize("stream", [False, True])
def test_speculation_can_be_asked_for(generate, monkeypatch, stream):
    plain = generate(dtype="float32", speculate="off")[:2]
    monkeypatch.setattr("paligemma_jax.engine.steps.decode", None)  # plain decoding would fail
    assert generate(dtype="float32", speculate="on", stream=stream)[:2] == plain


@pytest.mark.parametrize("prompt", ["detect", "segment ;"])
def test_a_prompt_without_classes_is_told(generate, answer_with, prompt):
    answer_with("")
    _, _, err = generate(prompt=prompt)
    assert f"no class is named: say what to look for, as in {prompt.split()[0]} cat ; dog" in err


def test_json_record(generate, checkpoint, pictures):
    status, out, _ = generate(format="json", dtype="float32")
    assert status == 0
    [record] = records(out)
    assert list(record) == KEYS
    assert list(record["timing"]) == TIMING_KEYS
    assert (record["image"], record["prompt"]) == (str(pictures / "a.png"), "caption en")
    assert (record["finish_reason"], record["masks"], record["dropped"]) == ("length", [], [])
    [out] = pj.load(checkpoint, dtype="float32").generate(str(pictures / "a.png"), "caption en", 4)
    assert record["mean_logprob"] == pytest.approx(float(np.mean(out.logprobs)), abs=1e-3)
    assert record["timing"]["new_tokens"] == 4
    assert all(record["timing"][key] >= 0 for key in TIMING_KEYS)


def test_a_profile_is_written_and_announced(generate, tmp_path):
    status, out, err = generate(profile=tmp_path / "new" / "trace")
    [trace] = (tmp_path / "new" / "trace").glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(trace, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert any("prefill" in name for name in names if name), "the work is not in it"
    assert (status, out) == generate()[:2]
    assert f"wrote {trace}: open it at https://ui.perfetto.dev" in err


def test_folder_with_a_prompts_file(generate, pictures, tmp_path):
    """Every prompt about every picture, in whatever batches, as if each were asked alone."""
    (tmp_path / "prompts.txt").write_text("caption en\n\n  detect circle  \n", encoding="utf-8")
    keys = {"image": pictures, "prompts_file": tmp_path / "prompts.txt", "format": "json", "dtype": "float32"}
    asked = [
        (str(pictures / name), prompt) for name in ("a.png", "b.jpg") for prompt in ("caption en", "detect circle")
    ]
    singles = [generate(image=name, prompt=prompt, dtype="float32")[1].removesuffix("\n") for name, prompt in asked]
    for batch_size in (1, 16):
        status, out, _ = generate(**keys, batch_size=batch_size)
        found = [(record["image"], record["prompt"], record["text"]) for record in records(out)]
        assert status == 0 and found == [(*pair, text) for pair, text in zip(asked, singles, strict=True)]


def test_several_answers_have_headers(generate, pictures, answer_with):
    answer_with("a circle")
    status, out, err = generate(image=pictures / "*.*g")
    assert (status, err) == (0, "")
    assert out == "".join(f"==> {pictures / name}: caption en <==\na circle\n" for name in ("a.png", "b.jpg"))


def test_notes_about_several_answers_name_the_picture(generate, pictures, answer_with):
    answer_with("")
    _, _, err = generate(image=pictures, prompt="detect star")
    names = [str(pictures / name) for name in ("a.png", "b.jpg")]
    passed_over = f"note: {pictures}: passed over 1 file: notes.txt (no picture by its ending)\n"
    assert err == passed_over + "".join(f"note: {name}: detect star: no boxes: no star was found\n" for name in names)


def test_boxes_and_masks_are_drawn_and_listed(generate, pictures, answer_with, score_with, tmp_path):
    score_with(0.5)
    answer_with(f"{BOX} circle ; {BOX}{MASK} blue square ; <loc0001> half")
    status, out, err = generate(format="json", output_dir=tmp_path / "out", prompt="segment blue square")
    assert status == 0
    [record] = records(out)
    boxes = [
        {"label": name, "box": [0.0, 0.0, pytest.approx(15.01), 20.0], "score": 0.5}
        for name in ("circle", "blue square")
    ]
    assert record["boxes"] == boxes and record["dropped"] == ["<loc0001> half"]
    file = tmp_path / "out" / "a_mask_0.png"
    assert record["masks"] == [{**boxes[1], "file": str(file)}]
    mask = np.asarray(Image.open(file))
    assert mask.shape == (20, 30) and not mask[:, 15:].any()
    drawn = Image.open(tmp_path / "out" / "a_drawn.png")
    assert drawn.size == (30, 20) and drawn.tobytes() != Image.open(pictures / "a.png").tobytes()
    assert "left out: 1" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_drawn.png", "a_mask_0.png"]


def test_text_tells_boxes_on_stderr(generate, answer_with, score_with):
    score_with(0.5)
    answer_with(f"{BOX} circle")
    status, out, err = generate(prompt="detect circle")
    assert (status, out) == (0, f"{BOX} circle\n")
    assert err == "  circle: x 0..15, y 0..20, score 0.50\n"


def test_results_of_pictures_with_one_name_are_kept_apart(generate, pictures, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures / "a.png", tmp_path / folder / "a.png")
    assert generate(image=tmp_path / "*" / "a.png", output_dir=tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_2_drawn.png", "a_drawn.png"]


def test_masks_without_their_decoder_become_boxes(generate, checkpoint, answer_with, tmp_path, monkeypatch):
    monkeypatch.delenv("PALIGEMMA_MASK_VAE", raising=False)
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "vae-oid.npz").unlink()
    answer_with(f"{BOX}{MASK} circle")
    status, out, err = generate(checkpoint=tmp_path / "bare", format="json")
    assert status == 0
    [record] = records(out)
    assert len(record["boxes"]) == 1 and record["masks"] == []
    assert "boxes only" in err and "vae-oid.npz" in err
    status, _, err = generate(checkpoint=tmp_path / "bare", mask_vae=tmp_path / "none.npz")
    assert status == 1 and "none.npz is missing" in err


def test_an_empty_answer_is_explained(generate, answer_with):
    answer_with("")
    assert generate(prompt="detect star") == (0, "\n", "note: no boxes: no star was found\n")
    assert generate() == (0, "\n", "note: the answer is empty\n")


HINT = 'note: models know lower-case words, names with " ; " between them: try'


@pytest.mark.parametrize(
    "prompt, better",
    [
        ("detect Circle; Star", "detect circle ; star"),
        ("segment a,b", "segment a ; b"),
        ("Detect circle", "detect circle"),
        ("Caption EN", "caption en"),
        ("detect circle", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_to_an_unusual_prompt_gets_a_hint(generate, answer_with, prompt, better, stream):
    answer_with("")
    _, out, err = generate(prompt=prompt, stream=stream)
    assert out == "\n" and (f'{HINT} "{better}"\n' in err if better else HINT not in err)


def test_a_hint_is_for_answers_without_a_result_only(generate, answer_with):
    answer_with("yes")  # in words, where boxes are meant
    assert f'{HINT} "detect star"' in generate(prompt="Detect star")[2]
    assert HINT not in generate(prompt="Caption EN")[2]
    for text in (f"{BOX} Star", f"{BOX}", "<loc0001> Star"):
        answer_with(text)
        assert HINT not in generate(prompt="detect Star")[2]


@pytest.mark.parametrize(
    "prompt", ["<image>detect circle;star", "<image><bos>detect circle ; star\\n", "detect circle ; star\n"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_placeholders_and_line_ends_are_taken_off(generate, answer_with, prompt, stream):
    """As other tools want them: the model is asked what it would be without, and the record says what was typed."""
    calls = answer_with("")
    _, _, err = generate(prompt=prompt, stream=stream)
    asked = calls[0]["prompt"] if stream else calls[0]["prompts"][0]
    assert asked == read_prompt("detect circle ; star") and "no boxes: no circle ; star was found" in err
    assert records(generate(prompt=prompt, format="json")[1])[0]["prompt"] == prompt


def test_more_placeholders_than_pictures_are_one_line(refused):
    assert "begins with 2 <image> and has 1 image: write one for each, or none" in refused(prompt="<image><image>x")


def test_doubt_is_told_beside_the_answer(generate, answer_with):
    """By the words: locations and mask codes are never likely, and have scores."""
    low = -0.71

    def scores(tokens):
        return np.full(len(tokens), low), np.full(len(tokens), 0.5), np.full(len(tokens), 0.5)

    for text in ("a circle", f"{BOX} circle", BOX, ""):
        low = -0.71
        answer_with(text, scores)
        told = "note: the model doubts this answer: its words have a mean log-probability of -0.71\n"
        for options in ({}, {"stream": True}, {"format": "json"}):
            status, out, err = generate(prompt="detect circle", **options)
            assert status == 0 and told in err and "doubts" not in out
        low = -0.69
        assert "doubts" not in generate(prompt="detect circle")[2]
    sure_of_words = np.array([-9.0] * 4 + [-0.1] * 9)
    answer_with(f"{BOX} circle", lambda tokens: (sure_of_words[: len(tokens)], *np.full((2, len(tokens)), 0.5)))
    assert "doubts" not in generate(prompt="detect circle")[2]


def test_a_corrupt_picture_does_not_stop_the_others(generate, pictures, answer_with, tmp_path):
    answer_with("a circle")
    shutil.copytree(pictures, tmp_path / "mixed")
    broken = tmp_path / "mixed" / "a.png"
    broken.write_bytes(broken.read_bytes()[:100])
    status, out, err = generate(image=tmp_path / "mixed")
    assert (status, out) == (1, f"==> {tmp_path / 'mixed' / 'b.jpg'}: caption en <==\na circle\n")
    passed_over, error = err.splitlines()
    assert "passed over 1 file: notes.txt" in passed_over and error.startswith(f"error: {broken} is damaged")


@pytest.mark.parametrize("prompt, warned", [("what is this?", True), ("cap en", False)])
def test_pt_checkpoints_warn_about_free_prompts(generate, answer_with, prompt, warned):
    answer_with("a circle")
    status, _, err = generate(hub_id="google/paligemma-3b-pt-224", prompt=prompt)
    assert status == 0 and ("badly" in err) == warned


@pytest.mark.parametrize(
    "folder, keys, expected",
    [
        (False, {}, 1),
        (True, {"num_beams": 3}, 6),  # a row for each beam
        (True, {"split_classes": True, "prompt": "detect a ; b ; c"}, 6),
        (True, {"split_classes": True, "prompt": "detect a ; b ; c", "batch_size": 4}, 3),
        (True, {"stream": True}, 1),
    ],
)
def test_the_model_is_loaded_for_the_prompts_that_are_answered_at_once(
    generate, pictures, loaded_with, folder, keys, expected
):
    assert generate(image=pictures if folder else pictures / "a.png", **keys)[0] == 1
    assert [told["batch_size"] for told in loaded_with] == [expected]


def test_resampling_can_be_chosen(generate, monkeypatch, answer_with):
    seen = []
    load = pj.load
    monkeypatch.setattr(pj, "load", lambda *args, **kw: seen.append(load(*args, **kw)) or seen[-1])
    answer_with("a circle")
    for resample in ("bilinear", "auto"):
        assert generate(resample=resample)[0] == 0
    assert [model.processor.image_settings.resample for model in seen] == ["bilinear", "bicubic"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams=2"),
        ({"num_beams": 2, "stream": True}, "cannot stream"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 300}, "do not fit the model's 256 positions"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"min_score": 1.5}, "min_score=1.5 is not possible: give a number from 0 to 1"),
        ({"min_score": "nan"}, "min_score=nan"),
        ({"nms": -0.5}, "nms=-0.5"),
        ({"video_fps": 0.0}, "video_fps=0.0 is not possible: give a number above 0"),
        ({"video_fps": "inf"}, "video_fps=inf"),
        ({"export": "coco,csv", "output_dir": "x"}, "'csv' is not one of coco, yolo"),
        ({"export": "coco"}, "export='coco' needs a place for its files: set output_dir too"),
        ({"stream": True, "split_classes": True}, "leave out one of them"),
        ({"loc_scale": 1000}, "give 1023, 1024"),
        ({"format": "jsn"}, "did you mean json?"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"resample": "nearest"}, "give auto, bicubic, bilinear"),
        ({"speculate": True}, "give auto, on, off"),
        ({"quantization": "int3"}, "give none, int8, int4"),
        ({"stream": True, "format": "json"}, "stream prints text"),
        ({"checkpoint": ""}, "no checkpoint is given"),
        ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"image": "/nowhere.png"}, "nowhere.png' does not exist"),
        ({"prompts_file": "/nowhere.txt"}, "/nowhere.txt does not exist"),
    ],
)
def test_bad_values_are_one_line(refused, keys, message):
    assert message in refused(**keys)


def test_bad_files_are_one_line(refused, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    assert "damaged" in refused(image=tmp_path / "broken.png")
    (tmp_path / "empty.txt").write_text("\n")
    assert "is empty" in refused(prompts_file=tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(prompts_file=tmp_path / "binary.txt")
    (tmp_path / "file").touch()
    assert "file" in refused(output_dir=tmp_path / "file")
    assert "file" in refused(profile=tmp_path / "file")
