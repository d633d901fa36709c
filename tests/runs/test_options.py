"""Keys of the runs do what they say: another value than the default changes what it should; see test_every_key.py."""

import dataclasses
import inspect
import json
import re
import types

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from configs import make_tiny
from paligemma_jax.inspection import findings
from paligemma_jax.runs import evaluate
from paligemma_jax.shapes_world import stages
from paligemma_jax.shapes_world.foreign_scenes import foreign_sample
from paligemma_jax.tasks.prompts import read_prompt

SAMPLED = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "seed": 3}
BOX = "<loc0000><loc0000><loc1023><loc0512>"
OVERLAPS = "<loc0000><loc0219><loc1023><loc0731>"  # BOX by 219 locations to the right: IoU 293 / 731 = 0.4
MASK = "".join(f"<seg{i:03d}>" for i in range(16))


@pytest.fixture
def run(main, checkpoint, pictures, tmp_path, type_lines):
    """run(NAME, KEY=VALUE, ...): one of the runs that use a model, with few tokens and no output beside the answers."""

    def start(name: str, **keys: object) -> tuple[int, str, str]:
        defaults = {"checkpoint": checkpoint, "image": pictures / "a.png", "prompt": "caption en"}
        defaults |= {"max_new_tokens": 4, "compilation_cache": False}
        if name == "inspect":
            defaults |= {"maps": "norms", "output_dir": tmp_path / "maps"}
        if name == "swap":
            defaults |= {"other_image": pictures / "b.jpg", "output_dir": tmp_path / "swap", "mix": "", "bits": ""}
        if name == "chat":
            type_lines((defaults | keys)["prompt"])
        config = f"configs/{name if name in ('inspect', 'swap') else 'tiny'}.py"
        settings = {"run": name} | defaults | keys
        return main(f"--config={config}", *(f"--config.{key}={value}" for key, value in settings.items()))

    return start


# How an answer is made


@pytest.mark.parametrize("name, stream", [("generate", 0), ("generate", 1), ("chat", 0), ("inspect", 0), ("swap", 0)])
@pytest.mark.parametrize(
    "keys",
    [
        SAMPLED | {"max_new_tokens": 9, "speculate": "off", "constrain": True},
        {"num_beams": 3, "max_new_tokens": 9, "speculate": "auto"},
    ],
    ids=["sampled", "beams"],
)
def test_how_an_answer_is_made_is_told_to_the_model(run, answer_with, name, stream, keys):
    """temperature, top_k, top_p, min_p, num_beams, seed, max_new_tokens, speculate and constrain."""
    calls = answer_with("a circle")
    streamed = bool(stream) or name == "chat"
    status, _, err = run(name, **keys, **({"stream": True} if stream else {}))
    if "num_beams" in keys and streamed:
        assert status == 1 and "num_beams=3 cannot stream" in err and not calls
        return
    assert status == 0 and calls
    fields = {field.name for field in dataclasses.fields(pj.Sampling)}
    for asked in calls:
        options = asked["options"]
        assert options.sampling == pj.Sampling(**{key: value for key, value in keys.items() if key in fields})
        assert options.max_new_tokens == 9
        assert (options.speculate, options.constrain) == ((False, True) if "constrain" in keys else (None, False))


def test_speculate_is_on_off_or_left_to_the_model(generate, answer_with):
    calls = answer_with("a circle")
    for value in ("on", "off", "auto"):
        assert generate(speculate=value)[0] == 0
    assert [asked["options"].speculate for asked in calls] == [True, False, None]


@pytest.mark.parametrize("name", ["generate", "swap"])
def test_answers_are_worked_out_by_batch_size(run, answer_with, name):
    calls = answer_with("a circle")
    assert run(name, batch_size=5)[0] == run(name)[0] == 0
    assert [asked["batch_size"] for asked in calls] == [5, 16]


def test_the_prompt_and_the_image_are_those_asked_about(run, answer_with, pictures):
    calls = answer_with("a circle")
    assert run("generate", prompt="ocr", image=pictures / "b.jpg")[0] == 0
    [asked] = calls
    assert asked["prompts"] == [read_prompt("ocr")] and asked["images"][0].size == (20, 30)


@pytest.mark.parametrize("name", ["generate", "chat", "evaluate", "inspect", "swap"])
def test_what_is_loaded_is_what_the_config_says(run, loaded_with, checkpoint, name, tmp_path):
    """checkpoint, adapter, dtype, quantization, mask_vae and mesh."""
    keys = {"dtype": "float16", "quantization": "int4", "mask_vae": tmp_path / "other.npz", "adapter": "org/lora"}
    keys |= {"mesh": "tensor=2"}
    assert run(name, **keys)[2].endswith("error: enough\n")
    assert run(name, checkpoint=tmp_path, dtype="bfloat16")[2].endswith("error: enough\n")
    assert [{key: call[key] for key in ("path", *keys)} for call in loaded_with] == [
        keys | {"path": str(checkpoint), "mask_vae": str(keys["mask_vae"])},
        {"path": str(tmp_path), "dtype": "bfloat16"} | dict.fromkeys(("quantization", "mask_vae", "adapter", "mesh")),
    ]


def test_platform_and_compilation_cache_are_told_to_jax(generate, loaded_with, monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.__setitem__(name, value))
    generate(platform="cpu")
    assert updates == {"jax_platforms": "cpu"} and len(loaded_with) == 1
    updates.clear()
    kept = []
    monkeypatch.setattr("paligemma_jax.runs.command_line.keep_compiled", lambda: kept.append(True))
    generate(compilation_cache=True)
    assert kept and not updates and [call["compilation_cache"] for call in loaded_with] == [False, True]


# Which objects are kept, and where they are


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize(
    "keys, kept, told",
    [
        ({}, [15, 21], None),
        ({"nms": 0.3}, [15], "(nms=0.3), left out: 1"),
        ({"nms": 0.5}, [15, 21], None),
        ({"min_score": 0.5}, [15], "score below min_score=0.5, left out: 1"),
        ({"min_score": 0.375}, [15, 21], None),
    ],
)
def test_objects_of_low_score_or_much_overlap_are_left_out(run, answer_with, score_with, name, keys, kept, told):
    """nms and min_score, of two boxes with an IoU of 0.4 and scores on both sides of the limit."""
    score_with(0.75, 0.375)
    answer_with(f"{BOX} circle ; {OVERLAPS} circle")
    status, _, err = run(name, prompt="detect circle", **keys)
    assert status == 0
    assert [int(right) for right in re.findall(r"circle: x \d+\.\.(\d+), y 0\.\.20", err)] == kept
    assert told in err if told else "left out" not in err


def test_nms_compares_boxes_of_one_label_only(generate, answer_with):
    answer_with(f"{BOX} circle ; {OVERLAPS} star")
    assert generate(prompt="detect circle ; star", nms=0.3)[2].count(", score ") == 2


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_loc_scale_is_the_far_edge(run, answer_with, name):
    answer_with("<loc0000><loc0000><loc1023><loc0972> circle")  # of 30 pixels: 28.50 or 28.48
    ends = [re.search(r"x 0\.\.(\d+)", run(name, prompt="detect circle", loc_scale=n)[2])[1] for n in (1023, 1024)]
    assert ends == ["29", "28"]


def test_loc_scale_is_that_of_all_numbers_in_a_record(generate, answer_with):
    half = f"{BOX} circle ; <loc0000><loc0000><loc0512><loc0512>{MASK} circle"
    answer_with(half, lambda tokens: (np.zeros(len(tokens)), np.ones(len(tokens)), np.full(len(tokens), 256.0)))
    for scale, corner in ((1023, 15.01), (1024, 15.0)):
        out = generate(prompt="segment circle", format="json", loc_scale=scale)[1]
        record = json.loads(out)
        assert [box["box"][2] for box in record["boxes"]] == [corner, corner]
        assert record["masks"][0]["box"][3] == round(512 / scale * 20, 2)
        expected = [round(256 / scale * side, 2) for side in (30, 20, 30, 20)]
        assert [item["expected_box"] for item in record["details"]] == [expected, expected]


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_masks_are_those_of_the_named_decoder(run, answer_with, checkpoint, name, tmp_path):
    """mask_vae: one whose decoder says yes everywhere, and one that says no."""
    answer_with(f"{BOX}{MASK} circle")
    with np.load(checkpoint / "vae-oid.npz") as file:
        arrays = dict(file)
    sizes = []
    for sign in (1, -1):
        flat = {"decoder.12.weight": arrays["decoder.12.weight"] * 0, "decoder.12.bias": np.full(1, sign, np.float32)}
        np.savez(tmp_path / "vae.npz", **(arrays | flat))
        err = run(name, prompt="segment circle", mask_vae=tmp_path / "vae.npz")[2]
        sizes.append(int(re.search(r"mask of (\d+) pixels", err)[1]))
    assert sizes == [15 * 20, 0]


# Runs of their own


@pytest.fixture
def evaluated(monkeypatch):
    """evaluated(MODULE, NAME): the calls of a measure to come, by the names of its parameters; it gives one number."""

    def patch(module: types.ModuleType, name: str) -> list[dict]:
        calls, signature = [], inspect.signature(getattr(module, name))

        def measure(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            calls.append(dict(bound.arguments))
            return {"chance": 0.25} if name == "pointing" else {"task": {"exact": 1.0}}

        monkeypatch.setattr(module, name, measure)
        return calls

    return patch


def test_measure_is_answers_or_pointing(generate, evaluated, tmp_path):
    """measure, data, num_scenes and scenes_seed of a pointing evaluation, and its output."""
    calls = evaluated(evaluate, "pointing")
    keys = {"measure": "pointing", "data": "foreign", "num_scenes": 3, "scenes_seed": 9, "output": tmp_path / "m.json"}
    status, out, _ = generate(run="evaluate", **keys)
    assert (status, out) == (0, "pointing chance  0.2500\n")
    [asked] = calls
    assert (asked["num_scenes"], asked["seed"]) == (3, 9) and asked["source"] is foreign_sample
    assert json.loads((tmp_path / "m.json").read_text()) == {"pointing": {"chance": 0.25}}


def test_constrain_is_told_to_an_evaluation(generate, evaluated):
    calls = evaluated(evaluate.evaluation, "evaluate")
    assert generate(run="evaluate", constrain=True)[0] == generate(run="evaluate")[0] == 0
    assert [asked["constrain"] for asked in calls] == [True, False]


@pytest.mark.parametrize(
    "keys, size, way",
    [({}, None, "pixels"), ({"occlusion_size": 1, "occlusion_way": "tokens"}, 1, "tokens")],
)
def test_occlusion_hides_as_it_is_told(run, monkeypatch, tmp_path, keys, size, way):
    """occlusion_size and occlusion_way."""
    calls = []

    def occlusion(model, picture, prompt, answer, size=None, way="pixels", batch_size=16, progress=True):
        calls.append((prompt, answer, size, way))
        return np.zeros((len(model.processor.tokenizer.encode(answer)) + 1, 4), np.float32)

    monkeypatch.setattr(findings, "occlusion", occlusion)
    status, out, _ = run("inspect", maps="occlusion", answer="red circle", **keys)
    assert status == 0 and out.startswith("red circle\n") and calls == [("caption en", "red circle", size, way)]
    assert {path.suffix for path in (tmp_path / "maps").glob("*.*") if path.is_file()} == {".png", ".npy"}


def test_words_is_how_many_are_named(run, tmp_path):
    """words, and that an answer which is given is not asked for."""
    assert run("inspect", maps="lens", answer="red", words=3)[0] == 0
    assert np.load(tmp_path / "maps" / "lens_nearest.npy").shape == (4, 3)
    record = json.loads((tmp_path / "maps" / "lens.json").read_text())
    assert {len(layer) for patch in record["patches"] for layer in [patch["nearest"], *patch["layers"]]} == {3}


def test_stages_of_make_tiny_are_told_every_number(main, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(stages, "build", lambda work, output, recipe: calls.append((work, output, recipe)))
    names = [field.name for field in dataclasses.fields(stages.Recipe)]
    changed = {name: 2 + i for i, name in enumerate(names)}
    changed |= {"start_from": "earlier", "mask_vae": "train", "wide_share": 0.5}
    keys = changed | {"work_dir": tmp_path / "work", "output_dir": tmp_path / "out", "compilation_cache": False}
    assert set(make_tiny.get_config()) - set(keys) == {"run", "checkpoint", "hub_id", "dtype", "platform"}
    assert main("--config=configs/make_tiny.py", *(f"--config.{key}={value}" for key, value in keys.items()))[0] == 0
    [(work, output, recipe)] = calls
    assert (work, output) == (str(tmp_path / "work"), str(tmp_path / "out"))
    assert dataclasses.asdict(recipe) == changed


@pytest.mark.parametrize(
    "key, message",
    [("mask_vae=new", "give keep, train"), ("wide_share=1.5", "give a number from 0 to 1")],
)
def test_stages_that_cannot_be_are_one_line(main, monkeypatch, key, message):
    monkeypatch.setattr(stages, "build", None)
    status, _, err = main("--config=configs/make_tiny.py", f"--config.{key}", "--config.compilation_cache=false")
    assert status == 1 and message in err
