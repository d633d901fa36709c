"""config.run=inspect: files, what is said about them, and errors before the work."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.runs import inspect as inspect_run

KINDS = ("norms", "similarity", "attention", "occlusion", "lens", "embeddings")


@pytest.fixture
def inspect(main, checkpoint, pictures, tmp_path):
    """inspect(KEY=VALUE, ...): `main` with configs/inspect.py, the random checkpoint and a picture."""

    def run(**keys: object) -> tuple[int, str, str]:
        defaults = {"checkpoint": checkpoint, "image": pictures / "a.png", "max_new_tokens": 4, "words": 2}
        defaults |= {
            "overwrite": True,
            "compilation_cache": False,
            "prompt": "detect red circle",
            "output_dir": tmp_path / "out",
        }
        overrides = [f"--config.{key}={value}" for key, value in (defaults | keys).items()]
        return main("--config=configs/inspect.py", *overrides)

    return run


@pytest.fixture
def refused(inspect):
    """refused(KEY=VALUE, ...): what a run says that ends with one line about the user's error."""

    def run(**keys: object) -> str:
        status, out, err = inspect(**keys)
        assert (status, out) == (1, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def test_every_map_is_written_as_a_picture_and_a_plain_array(inspect, tmp_path):
    answer = "<loc0001><loc0002><loc1000><loc1023> red circle"
    status, out, _ = inspect(maps=",".join(KINDS), report=True, answer=answer, occlusion_size=2)
    lines = out.splitlines()
    assert status == 0 and lines[0] == answer
    folder = tmp_path / "out"
    files = {path.name for path in folder.iterdir() if path.is_file()}
    pngs = ["norms", "similarity_table", "similarity", "similarity_layers", "attention", "attention_answer"]
    pngs += ["attention_heads", "occlusion", "occlusion_words", "lens_nearest", "lens_said", "lens_text", "embeddings"]
    arrays = [name for name in pngs if name.rpartition("_")[2] not in ("layers", "answer", "heads", "words")]
    arrays += ["similarity_patches", "lens_nearest_cosines", "lens_said_probabilities", "lens_text_probabilities"]
    assert files == {*(f"{n}.png" for n in pngs), *(f"{n}.npy" for n in arrays), "lens.json", "report.html"}
    for name in pngs:
        with Image.open(folder / f"{name}.png") as image:
            assert image.format == "PNG"
    for name in arrays:
        assert np.isfinite(np.load(folder / f"{name}.npy", allow_pickle=False)).all()
    np.testing.assert_allclose(np.load(folder / "attention.npy").sum(axis=(-2, -1)).max(), 1, atol=1e-5)
    words = json.loads((folder / "lens.json").read_text())
    assert (words["prompt"], words["answer"], len(words["patches"])) == ("detect red circle", answer, 4)
    assert len(words["patches"][3]["layers"]) == 3 and len(words["patches"][3]["nearest"]) == 2
    assert words["tokens"][0]["text"] == "<loc0001>" and len(words["tokens"][0]["layers"][0]) == 2
    said = words["prompt_tokens"]
    assert said[0]["after"] == "<bos>" and "".join(item["after"] for item in said[1:]) == "detect red circle\n"
    assert said[-1]["layers"] == words["tokens"][0]["layers"]
    probabilities = np.load(folder / "lens_text_probabilities.npy")
    assert probabilities.shape == (3, len(said) + len(words["tokens"]) - 1, 2)
    assert probabilities[2, 0, 0] == pytest.approx(said[0]["layers"][2][0]["probability"], abs=1e-5)
    assert "<!DOCTYPE html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert f"wrote {folder / 'attention.png'}, attention.npy" in lines
    peaks = [line for line in lines if "highest in row" in line]
    assert len(peaks) == 5 and sum('"red circle"' in line for line in peaks) == 2


def test_only_what_is_asked_for(inspect, generate, tmp_path):
    status, out, _ = inspect(maps="norms, attention", layer=2, head=1)
    assert status == 0
    assert out.startswith(generate(prompt="detect red circle", dtype="float32")[1])
    names = {path.stem.partition("_")[0] for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {"norms", "attention"}
    shown = np.load(tmp_path / "out" / "attention.npy")[1, 0].mean(axis=0)
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    peak = f"highest in row {row + 1}, column {column + 1}: {shown.max():.3g}"
    assert f"attention of the answer, layer 2, head 1: {peak}" in out.splitlines()


def test_the_highest_patch_is_told_by_its_row_and_column(inspect, monkeypatch, tmp_path):
    """Of a map whose highest patch is neither on the diagonal nor where it would be with rows and columns swapped."""
    look = inspect_run.inspect_answer

    def odd(*args, **options):
        return dataclasses.replace(look(*args, **options), norms=np.array([0.25, 0.5, 9.0, 0.125], np.float32))

    monkeypatch.setattr(inspect_run, "inspect_answer", odd)
    out = inspect(maps="norms", answer="red")[1]
    assert "norm of a soft token: highest in row 2, column 1: 9" in out.splitlines()
    assert np.load(tmp_path / "out" / "norms.npy").tolist() == [[0.25, 0.5], [9, 0.125]]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"constrain": True}, marks=pytest.mark.slow),
        {"constrain": True, "speculate": "on"},
        {"num_beams": 2},
    ],
)
def test_the_answer_is_that_of_generate(inspect, generate, keys):
    plain = inspect(maps="norms", max_new_tokens=12)[1].splitlines()[0]
    status, out, _ = inspect(maps="norms", max_new_tokens=12, **keys)
    expected = generate(prompt="detect red circle", dtype="float32", max_new_tokens=12, **keys)[1]
    assert status == 0 and out.startswith(expected)
    assert out.splitlines()[0] != plain or "constrain" not in keys


def test_what_is_prepared_is_what_runs(inspect, monkeypatch):
    told, load = [], pj.load
    monkeypatch.setattr(pj, "load", lambda *args, **options: told.extend(options["warm_up"]) or load(*args, **options))
    keys = {"constrain": True, "speculate": "off", "temperature": 0.5, "max_new_tokens": 3}
    assert inspect(maps="norms", **keys)[0] == 0
    [request] = told
    assert request.options == pj.GenerateOptions(3, pj.Sampling(temperature=0.5), constrain=True, speculate=False)
    assert request.prompt.text == "detect red circle" and len(request.images) == 1


def test_a_picture_whose_name_is_not_utf_8(inspect, pictures, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    path.write_bytes((pictures / "a.png").read_bytes())
    status, _, err = inspect(maps="norms", image=path, report=True)
    assert (status, err) == (0, "")
    assert "caf?.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "keys, text",
    [
        ({"prompt": "detect circle ; red square"}, "circle"),
        ({"prompt": "ocr"}, "ocr"),
        ({"prompt": "caption en", "text": "blue squares"}, "blue squares"),
    ],
)
def test_the_text_of_the_similarity(inspect, keys, text):
    status, out, _ = inspect(maps="similarity", **keys)
    assert status == 0 and f'similarity to "{text}", mean of the upper layers' in out


@pytest.mark.parametrize("shape", [(4, 32), (2, 4, 32)])
def test_a_file_of_embeddings_needs_no_model(inspect, tmp_path, shape):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    status, out, _ = inspect(embeddings_file=tmp_path / "mine.npy", checkpoint="nowhere")
    assert status == 0 and "4 x 32 numbers" in out and f"wrote {tmp_path / 'out' / 'mine.png'}" in out
    with Image.open(tmp_path / "out" / "mine.png") as image:
        assert image.width > 300


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"maps": "norms,attentoin"}, "names 'attentoin', which is not known: did you mean attention?"),
        ({"maps": " , "}, "maps is empty"),
        ({"layer": "top"}, "layer='top' is not possible: give mean, or an integer"),
        ({"layer": 0}, "layer='0'"),
        ({"layer": 4}, "layer=4 is not possible: this model has 2"),
        ({"head": 9}, "head=9 is not possible: this model has 4"),
        ({"words": 0}, "words=0"),
        ({"occlusion_way": "blur"}, "give pixels, tokens"),
        ({"occlusion_size": -1}, "occlusion_size=-1"),
        ({"occlusion_size": 3, "maps": "occlusion"}, "3 patches is not possible: give 1 to 2"),
        ({"prompt": " "}, "no text to compare"),
        ({"prompts_file": "x.txt"}, "prompts_file='x.txt' is not possible, inspect looks into one answer"),
        ({"split_classes": True}, "split_classes=True"),
        ({"stream": True}, "stream=True"),
        ({"export": "coco"}, "export='coco'"),
        ({"save_embeddings": "a.npy"}, "save_embeddings='a.npy'"),
        ({"load_embeddings": "a.npy"}, "load_embeddings='a.npy'"),
        ({"format": "json"}, "set format=text"),
        ({"speculate": "yes"}, "give auto, on, off"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"image": "no.png"}, "'no.png' does not exist"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"embeddings_file": "no.npy"}, "no.npy does not exist"),
    ],
)
def test_errors_are_one_line(refused, keys, message):
    assert message in refused(**keys)


def test_a_folder_is_too_much(refused, pictures):
    assert "holds 2 pictures" in refused(image=pictures)


def test_pickles_are_not_opened(refused, tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{}], object), allow_pickle=True)
    assert "evil.npy" in refused(embeddings_file=tmp_path / "evil.npy")


def test_other_configs_say_what_is_missing(main):
    status, _, err = main("--config.run=inspect", "--config.compilation_cache=false")
    assert status == 1 and "which run=inspect needs: take --config=configs/inspect.py" in err
