"""config.run=evaluate with configs/evaluate.py on public files; metrics are tested with evaluation/."""

import json

import pytest

from paligemma_jax.evaluation import bootstrap, tasks
from tests.evaluation import public_files
from tests.kills import ROOT
from tests.training.data import worlds

COUNT = 5
SHIPPED = ROOT / "assets" / "tiny"


@pytest.fixture
def data(tmp_path):
    """Five questions, the answers being "yes 0" and so on."""
    public_files.jsonl(tmp_path / "data", COUNT)
    return tmp_path / "data"


@pytest.fixture
def evaluate(main, checkpoint, data):
    """evaluate(KEY=VALUE, ...): the run on the questions with the random checkpoint."""

    def run(**keys):
        defaults = {"checkpoint": checkpoint, "compilation_cache": False, "data": data, "task": "jsonl"}
        return main("--config=configs/evaluate.py", *(f"--config.{k}={v}" for k, v in (defaults | keys).items()))

    return run


@pytest.fixture
def fails(evaluate):
    """fails(KEY=VALUE, ...): what a run says that ends with one line about the user's error."""

    def run(**keys):
        status, out, err = evaluate(**keys)
        assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def number(prompt):
    return int("".join(filter(str.isdigit, prompt)))


def right_below(limit):
    return lambda prompt: f"yes {number(prompt)}" if number(prompt) < limit else "no"


def asked(calls):
    return [call["prompts"] for call in calls]


def lines(path):
    return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


def test_a_table_records_and_a_result(evaluate, answer_with, tmp_path):
    answer_with(right_below(3))
    status, out, err = evaluate(output_dir=tmp_path / "out")
    assert status == 0
    assert out.splitlines()[0] == "jsonl, split test, 5 examples, in percent"
    assert out.splitlines()[1].split()[:2] == ["exact", "60.00"] and "95% interval" in out
    assert f"wrote {tmp_path / 'out' / 'result.json'}" in err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    low, high = result["main"].pop("interval")
    assert 0 <= low < 0.6 < high <= 1
    assert result["main"] == {"name": "exact", "value": 0.6} and result["examples"] == COUNT
    assert result["metrics"] == {"exact": {"exact": 0.6, "exact_lower": 0.6}} and result["paper"] is None
    first = lines(tmp_path / "out")[0]
    assert first["prompt"] == "answer en 0?" and first["prediction"] == "yes 0" and first["references"] == ["yes 0"]
    assert first["scores"] == {"exact": {"exact": 1.0, "exact_lower": 1.0}}
    assert first["images"] == [str(tmp_path / "data" / "1.png")] and len(lines(tmp_path / "out")) == COUNT


def test_json_without_a_folder(evaluate, answer_with):
    answer_with(right_below(3))
    status, out, _ = evaluate(format="json")
    assert status == 0 and json.loads(out)["main"]["value"] == 0.6


def test_a_run_that_was_stopped_goes_on(evaluate, answer_with, tmp_path):
    keys = {"batch_size": 2, "format": "json"}
    answer_with(right_below(3))
    _, whole, _ = evaluate(output_dir=tmp_path / "whole", **keys)

    def stop_at_3(prompt):
        if number(prompt) == 3:
            raise KeyboardInterrupt
        return right_below(3)(prompt)

    answer_with(stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(output_dir=tmp_path / "out", **keys)
    assert len(lines(tmp_path / "out")) == 2
    calls = answer_with(right_below(3))
    status, out, _ = evaluate(output_dir=tmp_path / "out", **keys)
    assert asked(calls) == [["answer en 2?", "answer en 3?"], ["answer en 4?"]]
    assert status == 0 and out == whole and lines(tmp_path / "out") == lines(tmp_path / "whole")
    calls = answer_with("nothing is asked")
    assert evaluate(output_dir=tmp_path / "out", **keys)[:2] == (0, whole) and not calls


def test_other_settings_are_refused_until_the_folder_may_begin_anew(evaluate, fails, answer_with, tmp_path):
    answer_with(right_below(3))
    evaluate(output_dir=tmp_path / "out")
    assert "differs in max_new_tokens" in fails(output_dir=tmp_path / "out", max_new_tokens=3)
    assert "differs in examples, images" in fails(output_dir=tmp_path / "out", limit=2)
    status, out, _ = evaluate(output_dir=tmp_path / "out", limit=2, overwrite=True)
    assert status == 0 and "2 examples" in out and len(lines(tmp_path / "out")) == 2


def test_limit_split_metric_and_prompt(evaluate, answer_with, data):
    (data / "test.jsonl").rename(data / "val.jsonl")
    calls = answer_with(lambda prompt: prompt.removeprefix("say ").upper())
    status, out, _ = evaluate(split="val", limit=2, metric="anls, exact", prompt="say {prefix}", format="json")
    assert status == 0 and asked(calls) == [["say answer en 0?", "say answer en 2?"]]
    result = json.loads(out)
    assert list(result["metrics"]) == ["anls", "exact"] and result["main"]["name"] == "anls"
    assert result["split"] == "val" and result["examples"] == 2


def test_how_answers_are_made(evaluate, answer_with):
    calls = answer_with("yes")
    assert evaluate(max_new_tokens=7, num_beams=3, batch_size=4)[0] == 0
    assert [len(call["prompts"]) for call in calls] == [4, 1]
    assert {call["options"].max_new_tokens for call in calls} == {7}
    assert {call["options"].sampling.num_beams for call in calls} == {3}
    calls = answer_with("yes")
    evaluate()
    assert [(call["options"].max_new_tokens, call["options"].sampling.num_beams) for call in calls] == [(100, 1)]


def test_seed_and_resamples_are_those_of_the_interval(evaluate, answer_with, monkeypatch):
    seen = []
    real = bootstrap.interval

    def interval(scores, resamples, seed):
        seen.append((resamples, seed))
        return real(scores, resamples, seed=seed)

    monkeypatch.setattr("paligemma_jax.evaluation.evaluate.interval", interval)
    answer_with("yes")
    evaluate(resamples=10, seed=4)
    evaluate()
    assert seen == [(10, 4), (1000, 0)]


def test_what_is_loaded_is_what_the_config_says(evaluate, loaded_with, tmp_path, checkpoint):
    mask_vae = tmp_path / "masks.npz"
    mask_vae.write_bytes((checkpoint / "vae-oid.npz").read_bytes())
    keys = {"dtype": "bfloat16", "quantization": "int8", "mask_vae": mask_vae}
    assert evaluate(**keys)[0] == 1
    [call] = loaded_with
    assert (call["dtype"], call["quantization"], call["mask_vae"]) == ("bfloat16", "int8", str(mask_vae))
    assert call["adapter"] is None


def test_an_adapter_must_be_there(fails, tmp_path):
    assert str(tmp_path / "none") in fails(adapter=tmp_path / "none")


def test_resampling_can_be_chosen(evaluate, answer_with):
    calls = answer_with("yes")
    for keys in ({}, {"resample": "bilinear"}):
        evaluate(**keys)
    assert [call["self"].processor.image_settings.resample for call in calls] == ["bicubic", "bilinear"]


def test_loc_scale_is_the_far_edge(evaluate, answer_with, tmp_path):
    public_files.coco_detection(tmp_path / "coco")
    answer_with("<loc0256><loc0256><loc0512><loc1023> dog")
    widths = []
    for scale in (1023, 1024):
        keys = {"task": "coco_detection", "data": tmp_path / "coco", "output_dir": tmp_path / str(scale)}
        status, _, _ = evaluate(loc_scale=scale, **keys)
        assert status == 0
        [record] = lines(tmp_path / str(scale))
        [[label, box, _]] = record["scores"]["detection_ap"]["boxes"]
        assert label == "dog" and record["scores"]["detection_f1"]["true"] == 1
        widths.append(box[2])
    assert widths == [8.0, 7.99]


def test_masks_of_refcoco_are_those_of_the_decoder(evaluate, answer_with, tmp_path):
    public_files.refcoco(tmp_path / "coco")
    segs = "".join(f"<seg{i:03d}>" for i in range(16))
    answer_with("<loc0256><loc0256><loc0767><loc0767>" + segs)
    status, out, _ = evaluate(task="refcoco", data=tmp_path / "coco", format="json", limit=1)
    assert status == 0
    measured = json.loads(out)["metrics"]["refcoco"]
    assert measured["valid"] == 1 and measured["box_accuracy_75"] == 1 and 0 <= measured["mask_iou"] <= 1


@pytest.mark.parametrize("metric", ["segmentation_iou", "refcoco", "detection_f1", "detection_ap"])
def test_boxes_and_masks_may_be_told_by_tokens(metric, evaluate, answer_with, tmp_path):
    """Of two answers one is right to the letter, the other has nothing in common with the truth."""
    label = "" if metric == "refcoco" else " dog"
    right = "<loc0100><loc0200><loc0900><loc0500>" + "".join(f"<seg{i:03d}>" for i in range(16)) + label
    rows = [{"image": "1.png", "prefix": f"segment dog ; {i}", "suffix": right} for i in range(2)]
    public_files.jsonl(tmp_path / "data")
    public_files.as_jsonl(tmp_path / "data" / "test.jsonl", rows)
    wrong = right.replace("<loc0900>", "<loc0101>")
    answer_with(lambda prompt: wrong if prompt.endswith("1") else right)
    keys = {"metric": metric, "mask_vae": SHIPPED / "vae-oid.npz", "format": "json"}
    status, out, err = evaluate(data=tmp_path / "data", **keys)
    assert status == 0, err
    main = json.loads(out)["main"]
    assert main["value"] == pytest.approx(0.5, abs=0.01) and (main["interval"] is None) == (metric == "detection_ap")


def test_the_mean_of_groups_and_the_papers_number(evaluate, answer_with, tmp_path, monkeypatch):
    public_files.chartqa(tmp_path / "charts")
    answer_with(lambda prompt: "10")
    resolution = 28  # of the random checkpoint
    monkeypatch.setitem(tasks.TASKS["chartqa"].paper, resolution, 12.5)
    status, out, _ = evaluate(task="chartqa", data=tmp_path / "charts", format="json")
    result = json.loads(out)
    assert status == 0 and result["groups"] == {"augmented": pytest.approx(1 / 3), "human": 1.0}
    assert result["main"]["name"] == "mean_of_groups" and result["main"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["metrics"]["relaxed"]["relaxed_accuracy"] == 0.5
    assert result["paper"]["value"] == 0.125 and "2407.07726" in result["paper"]["model"]
    _, out, _ = evaluate(task="chartqa", data=tmp_path / "charts")
    assert "the paper's" in out and "12.50" in out and "2407.07726, 28 px, split test" in out


def test_two_pictures_are_seen_together(evaluate, answer_with, tmp_path):
    public_files.nlvr2(tmp_path / "nlvr2")
    calls = answer_with("true")
    status, out, _ = evaluate(task="nlvr2", data=tmp_path / "nlvr2", format="json")
    assert status == 0 and json.loads(out)["main"]["value"] == 0.5
    assert [len(images) for images in calls[0]["images"]] == [2, 2]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"task": "docqa"}, "did you mean docvqa?"),
        ({"metric": "anl"}, "metric='anl' is not possible: did you mean anls?"),
        ({"metric": "detection_f1,exact", "task": "coco_detection"}, "has no annotations/instances"),
        ({"data": ""}, "data is empty"),
        ({"data": "nowhere"}, "docs/evaluation.md"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"resamples": 0}, "resamples=0"),
        ({"limit": -1}, "limit=-1"),
        ({"prompt": "answer {question}"}, "its fields are {prefix}"),
        ({"loc_scale": 1000}, "loc_scale=1000"),
        ({"format": "xml"}, "format='xml'"),
    ],
)
def test_bad_values_are_refused(fails, keys, message):
    assert message in fails(**keys)


def test_results_do_not_lie_among_the_pictures(fails, data):
    assert "is the folder of the pictures" in fails(output_dir=data)


def test_a_result_of_somebody_else_is_not_replaced(fails, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    assert "is of no run that is known here" in fails(output_dir=tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["result.json"]


def test_no_note_about_keys_that_other_evaluations_do_not_use(evaluate, answer_with):
    answer_with("yes")
    assert "does not use" not in evaluate(batch_size=4)[2]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_data_sets_that_training_takes_are_measured_too(evaluate, answer_with, tmp_path, kind):
    folder = worlds.write_coco(tmp_path / "set")
    right = iter([worlds.suffix(scene) for scene in worlds.SCENES])
    answer_with(lambda prompt: next(right))
    place = folder if kind == "folder" else next(folder.rglob("*.json"))
    status, out, err = evaluate(data=place, split="train", metric="detection_f1", format="json")
    assert status == 0, err
    assert json.loads(out)["main"]["value"] == 1.0
