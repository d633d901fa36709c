"""Held-out examples are measured by their loss and by answers, with the parameters that are given."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError, DataError
from paligemma_jax.evaluation import METRICS
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.output import Output
from paligemma_jax.training import held_out
from paligemma_jax.training.data import Example, open_data
from paligemma_jax.training.held_out import HeldOut

SUFFIXES = ("a red circle", "two", "a red circle and two blue squares", "", "<loc0001><loc0002><loc0003><loc0004> star")


class Share:
    """A metric that tells how many answers it saw."""

    name, read, needs_pycocotools = "share", None, False

    def __init__(self, objects=False, masks=False):
        self.seen, self.objects, self.masks = [], objects, masks

    def score(self, predictions, references):
        self.seen.append((list(predictions), list(references)))
        return {"main": 0.25, "other": 3}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    lines = []
    for i, suffix in enumerate(SUFFIXES):
        Image.new("RGB", (30, 20), (50 * i,) * 3).save(folder / f"{i}.png")
        image = f"{i}.png" if i != 2 else ["1.png", "2.png"]
        lines.append({"image": image, "prefix": "detect star" if not suffix else "caption en", "suffix": suffix})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return list(open_data(folder / "data.jsonl"))


@pytest.fixture(scope="module")
def model(small, random_params, processor):
    return pj.PaliGemma(small, random_params(small), processor)


@pytest.fixture(scope="module")
def other_params(model):
    return jax.tree.map(lambda x: 0.7 * x, model.params)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_the_loss_is_the_mean_over_examples_of_their_mean_over_tokens(model, examples, other_params, batch_size):
    """Whatever the batch size, and of the parameters that are given, not the handle's."""
    measured = HeldOut(model, examples, None, batch_size)
    for params in (model.params, other_params):
        handle = pj.PaliGemma(model.config, params, model.processor, runner=model.runner)
        columns = zip(*((list(e.images), e.prefix, e.suffix) for e in examples), strict=True)
        scores = handle.score(*map(list, columns))
        numbers, samples = measured(params)
        assert numbers == {"val_loss": pytest.approx(-np.mean([row.mean() for row in scores]), rel=1e-5)}
        assert samples == []


def test_answers_are_generated_with_the_given_parameters(model, examples, other_params):
    metric = Share()
    chosen = [examples[i] for i in (0, 1, 4)]
    measured, before = HeldOut(model, chosen, metric, 4), model.params
    for params in (model.params, other_params):
        numbers, samples = measured(params)
        handle = pj.PaliGemma(model.config, params, model.processor, runner=model.runner)
        images, prompts = [list(e.images) for e in chosen], [e.prefix for e in chosen]
        outputs = handle.generate(images, prompts, measured._max_new_tokens)
        assert metric.seen[-1] == ([output.text for output in outputs], [e.suffix for e in chosen])
        assert numbers["val_share"] == 0.25 and numbers["val_other"] == 3 and "val_main" not in numbers
        assert numbers["val_ended"] == np.mean([output.finish_reason == "eos" for output in outputs])
        assert [(s.prompt, s.expected, s.answer) for s in samples] == [
            (e.prefix, e.suffix, output.text) for e, output in zip(chosen, outputs, strict=True)
        ]
    assert metric.seen[0] != metric.seen[1] and model.params is before


def cut_off(text):
    zeros = np.zeros(1, np.float32)
    return Output(text, np.array([5], np.int32), zeros, "length", None, zeros, zeros)


class _Says(pj.PaliGemma):
    """Answers with the suffixes of a list, in order."""

    texts = ()

    def generate(self, images, prompts, max_new_tokens, batch_size):
        count = len(prompts)
        said, _Says.texts = _Says.texts[:count], _Says.texts[count:]
        return list(map(cut_off, said))


def test_boxes_that_are_said_twice_are_told(model, examples, monkeypatch):
    box = "<loc0001><loc0002><loc0003><loc0004> star"
    monkeypatch.setattr(held_out, "PaliGemma", _Says)
    monkeypatch.setattr(HeldOut, "_sample", lambda self, example, output: output.text)
    measured = HeldOut(model, examples[:4], Share(), 3)
    _Says.texts = [f"{box} ; {box}", f"{box} ; {re.sub('star', 'cat', box)}", "none", box]
    numbers, samples = measured(model.params)
    assert numbers["val_repeats"] == pytest.approx(1 / 3) and numbers["val_ended"] == 0 and len(samples) == 4
    _Says.texts = ["no", "box", "at", "all"]
    assert "val_repeats" not in measured(model.params)[0]


def test_metrics_of_objects_get_masks_where_they_can_be_made(model, examples, monkeypatch):
    box = "<loc0000><loc0000><loc1023><loc1023>"
    texts = [f"{box}{'<seg001>' * 16} star", "none"]
    measured = HeldOut(model, [examples[4], examples[0]], Share(objects=True), 2)
    assert measured._compared(texts) == (texts, [SUFFIXES[4], SUFFIXES[0]])  # there is no decoder
    monkeypatch.setattr(model, "mask_decoder", lambda: "decoder")
    monkeypatch.setattr(
        held_out.mask_vae, "decode", lambda params, codes: np.ones((len(codes), 64, 64)) * (params == "decoder")
    )
    found, right = measured._compared(texts)
    assert found[0].size == (30, 20) and found[0][0].label == "star" and found[0][0].mask.mean() > 0.9
    assert not len(found[1]) and len(right[0]) == 1 and right[0][0].mask is None
    monkeypatch.setattr(measured, "_metric", Share())
    assert measured._compared(texts)[0] == texts


def test_an_answer_without_mask_codes_is_no_object_to_a_metric_of_masks(model, examples, monkeypatch):
    """A model that has not learned them yet says such: it must not end the training."""
    box = "<loc0000><loc0000><loc1023><loc1023>"
    whole = Example(examples[0].images, "segment star", f"{box}{'<seg001>' * 16} star")
    with pytest.raises(CheckpointError, match="vae-oid"):
        HeldOut(model, [whole], METRICS["segmentation_iou"], 2)
    monkeypatch.setattr(model, "mask_decoder", lambda: "decoder")
    monkeypatch.setattr(held_out.mask_vae, "decode", lambda params, codes: np.ones((len(codes), 64, 64)))
    measured = HeldOut(model, [whole], METRICS["segmentation_iou"], 2)
    for text, iou in ((f"{box} star", 0.0), (f"{box} star ; {whole.suffix}", 1.0)):
        assert METRICS["segmentation_iou"].score(*measured._compared([text]))["mask_iou"] == iou
    with pytest.raises(DataError, match=r"line 5 has an object without mask codes.*metric=segmentation_iou"):
        HeldOut(model, [whole, examples[4]], METRICS["segmentation_iou"], 2)


def test_a_signal_is_looked_at_between_batches(model, examples):
    def check():
        check.count += 1
        if check.count == 3:
            raise KeyboardInterrupt

    check.count = 0
    with pytest.raises(KeyboardInterrupt):
        HeldOut(model, examples, None, 2)(model.params, check)


def test_objects_of_the_answer_are_drawn(model, examples, monkeypatch):
    """With masks where there is a decoder of masks; a box of several pictures is of none."""
    asked = []

    def objects(output, size, masks=True):
        asked.append((size, masks))
        return ["star"], []

    monkeypatch.setattr(model, "objects", objects)
    measured = HeldOut(model, examples, None, 2)
    assert measured._sample(examples[0], cut_off("x")).objects == ["star"]
    monkeypatch.setattr(model, "mask_decoder", lambda: {})
    assert measured._sample(examples[0], cut_off("x")).objects == ["star"]
    assert asked == [((30, 20), False), ((30, 20), True)]
    assert measured._sample(examples[2], cut_off("x")).objects == [] and len(asked) == 2


def test_what_cannot_be_measured(model, examples):
    with pytest.raises(DataError, match="no examples to validate on"):
        HeldOut(model, [], None, 2)
    with pytest.raises(DataError, match="metric=share is of objects, and no suffix of val_data has any"):
        HeldOut(model, examples[:3], Share(objects=True), 2)
    long = Example(examples[0].images, "caption en", "a red circle " * 99, "x line 3")
    with pytest.raises(DataError, match=r"x line 3: an example has \d+ tokens, the model 256 positions"):
        HeldOut(model, [*examples, long], None, 2)


def test_answers_are_read_as_in_evaluation(model, examples, monkeypatch):
    """Rules of a metric for answers, such as those of refcoco, count while training too; references have none."""
    asked = []

    def read(text, size, decode):
        asked.append(text)
        return Detections(size=size)

    metric = dataclasses.replace(METRICS["detection_f1"], read=read)
    monkeypatch.setattr(HeldOut, "_has_masks", lambda self: True)
    monkeypatch.setattr(pj.PaliGemma, "mask_decoder", lambda self: {})
    measured = HeldOut(model, [example for example in examples if "<loc" in example.suffix], metric, 2)
    answers, right = measured._compared(["nothing said"])
    assert asked == ["nothing said"] and not answers[0] and len(right[0]) == 1
