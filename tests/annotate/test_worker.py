"""A model that annotates: its rows are what `generate` and `objects` give, and one bad picture is one bad picture."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.annotate import rows, worker
from paligemma_jax.annotate.inputs import find
from paligemma_jax.annotate.worker import Annotator, Job, read_picture
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError, NumericsError, PromptError
from paligemma_jax.models import mask_vae
from paligemma_jax.processing.image import ImageSettings, load_image
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.prompts import read_prompt
from paligemma_jax.tasks.segmentation import attach_masks
from tests.annotate.conftest import output

OPTIONS = pj.GenerateOptions(max_new_tokens=6)
TEXTS = ("caption en", "detect a circle")


@pytest.fixture(scope="module")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, size in enumerate(((20, 30), (28, 28), (50, 9), (9, 9))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no picture")
    return find(str(folder))


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(tuple(map(read_prompt, TEXTS)), OPTIONS, model="small", run_id="r")


def made(annotator: Annotator, pictures: list[worker.Picture]) -> list[list[rows.Row]]:
    return annotator.rows(pictures, annotator.answer(pictures))


def test_rows_are_what_generate_says(model, sources, job):
    annotator = Annotator(model, job)
    found = made(annotator, [annotator.read(source) for source in sources])
    assert [len(each) for each in found] == [2] * 5
    images = [load_image(source.path) for source in sources[:4]]
    answers = zip(*(model.generate(images, text, options=OPTIONS) for text in TEXTS), strict=True)
    for source, image, each, both in zip(sources, images, found, answers, strict=False):
        data = Path(source.path).read_bytes()
        for text, row, said in zip(TEXTS, each, both, strict=True):
            assert (row["text"], row["num_tokens"], row["finish_reason"]) == (
                *(said.text, len(said.tokens), said.finish_reason),
            )
            assert (row["width"], row["height"], row["image"]) == (*image.size, source.name)
            assert row["key"] == hashlib.sha256(data + text.encode()).hexdigest()
            assert (row["status"], row["error"], row["model"], row["run_id"]) == ("ok", None, "small", "r")
    assert [row["task"] for row in found[0]] == ["caption", "detect"]
    for row in found[4]:
        assert row["status"] == "failed" and "4.png is not a picture" in row["error"]
        assert row["text"] is row["width"] is row["num_tokens"] is None and row["boxes"] == row["masks"] == []


@pytest.mark.parametrize("resample", ["bicubic", "nearest"])
def test_a_picture_resized_ahead_gives_the_same_pixels(sources, resample):
    settings = ImageSettings(28, resample)
    for source in sources[:3]:
        whole = settings.to_pixels(load_image(source.path))
        assert np.array_equal(settings.to_pixels(load_image(read_picture(source, settings).image)), whole)


@pytest.mark.parametrize(
    "settings, why", [({"shapes": "square"}, "shortest_edge"), ({"shapes": "same"}, "do_resize is false")]
)
def test_a_picture_that_does_not_suit_the_network_fails_alone(sources, settings, why):
    pictures = [read_picture(source, ImageSettings(28, **settings)) for source in sources]
    assert [not picture.error for picture in pictures] == [False, True, False, settings["shapes"] == "square", False]
    assert why in pictures[0].error


def fails(model, monkeypatch, error, when):
    """From now on `generate` raises when it is asked about these pictures (by number) and prompts."""
    real = pj.PaliGemma.generate

    def generate(self, images, prompts, *, image_embeddings, **options):
        if when(len(prompts), prompts[0].text, float(np.asarray(image_embeddings, np.float64).sum())):
            raise error
        return real(self, images, prompts, image_embeddings=image_embeddings, **options)

    monkeypatch.setattr(pj.PaliGemma, "generate", generate)


@pytest.mark.parametrize("error", [ImageError("odd"), PromptError("odd"), NumericsError("odd")])
def test_a_batch_that_fails_fails_for_its_culprit_only(model, sources, job, monkeypatch, error):
    annotator = Annotator(model, job)
    pictures = [annotator.read(source) for source in sources[:3]]
    good = made(annotator, pictures)
    bad = float(np.asarray(model.embed_image([pictures[1].image]), np.float64).sum())
    fails(
        model,
        monkeypatch,
        error,
        lambda count, text, total: text == TEXTS[1] and (count > 1 or abs(total - bad) < 1e-3),
    )
    found = made(annotator, pictures)
    assert (found[0], found[2], found[1][0]) == (good[0], good[2], good[1][0])
    assert (found[1][1]["status"], found[1][1]["error"], found[1][1]["width"]) == ("failed", "odd", 28)


def test_damaged_weights_end_the_run(model, sources, job, monkeypatch):
    annotator = Annotator(model, job)
    fails(model, monkeypatch, NumericsError("all is lost"), lambda *args: True)
    with pytest.raises(NumericsError, match="all is lost"):
        annotator.answer([annotator.read(source) for source in sources])


def test_what_would_fail_for_every_picture_is_known_before(model, job, monkeypatch):
    with pytest.raises(PromptError, match="do not fit"):
        Annotator(model, dataclasses.replace(job, options=pj.GenerateOptions(max_new_tokens=10_000)))
    masks = dataclasses.replace(job, prompts=(read_prompt("segment a circle"),))
    with pytest.raises(CheckpointError, match="mask"):
        Annotator(model, masks)
    monkeypatch.setattr(pj.PaliGemma, "mask_decoder", lambda self: {})
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match="pycocotools"):
        Annotator(model, masks)
    Annotator(model, job)  # which needs none


def test_boxes_and_masks_of_a_row():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    objects = [Detection("cat", (1.001, 2, 5, 4), 0.98765, mask=mask), Detection("", (0, 0, 8, 6))]
    row = rows.answered("k", "a.png", (8, 6), read_prompt("segment cat"), output("x"), objects)
    assert row["boxes"] == [
        {"label": "cat", "score": 0.9877, "x0": 1.0, "y0": 2.0, "x1": 5.0, "y1": 4.0},
        {"label": "", "score": None, "x0": 0.0, "y0": 0.0, "x1": 8.0, "y1": 6.0},
    ]
    assert row["masks"] == [coco.encode_mask(mask), None]
    assert rows.answered("k", "a.png", (8, 6), read_prompt("detect cat"), output("x"), objects[1:])["masks"] == []


def test_objects_are_selected_as_the_job_says(model, job, monkeypatch):
    asked = []
    boxes = [Detection("a", (0, 0, 4, 4), 0.9), Detection("a", (0, 0, 4, 3), 0.5), Detection("a", (5, 5, 6, 6), 0.1)]

    def objects(self, *args, **options):
        asked.append((args[1:], options))
        return boxes, []

    monkeypatch.setattr(pj.PaliGemma, "objects", objects)
    picture = worker.Picture("a", None, (8, 6), Image.new("RGB", (1, 1)))
    for keys, kept in (({}, 3), ({"min_score": 0.3}, 2), ({"nms": 0.5}, 2), ({"min_score": 0.3, "nms": 0.5}, 1)):
        annotator = Annotator(model, dataclasses.replace(job, loc_scale=1024, **keys))
        [[_, row]] = annotator.rows([picture], [[output("x")] * 2])
        assert len(row["boxes"]) == kept
    assert asked[1] == (((8, 6), 1024), {"masks": False, "labels": job.prompts[1].labels})


def test_masks_of_a_group_are_those_of_each_answer(make_model, job, monkeypatch):
    """Decoded together, each once, in calls of a fixed size."""
    sizes = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8, 128)
    masks, model = mask_vae.init_params(jax.random.key(0), sizes), make_model("gemma2")
    model = pj.PaliGemma(model.config, model.params, model.processor, masks)
    rng = np.random.default_rng(0)
    codes = [tuple(rng.integers(0, 128, 16).tolist()) for _ in range(20)]
    found = [[Detection("a", (1, 1, 30, 20), 0.5, code), Detection("b", (0, 0, 9, 9))] for code in [*codes, codes[0]]]
    objects, calls = iter(found), []
    monkeypatch.setattr(pj.PaliGemma, "objects", lambda *args, **options: (next(objects), []))
    real = mask_vae.decode
    monkeypatch.setattr(mask_vae, "decode", lambda params, codes: calls.append(codes.shape) or real(params, codes))
    pictures = [worker.Picture(str(i), None, (40, 30), Image.new("RGB", (1, 1))) for i in range(21)]
    one = dataclasses.replace(job, prompts=job.prompts[:1])
    made_of = Annotator(model, one).rows(pictures, [[output("x")]] * 21)
    assert calls == [(4, 16)] * 5
    for [row], items in zip(made_of, found, strict=True):
        [alone, _] = attach_masks(items, (40, 30), lambda codes: real(masks, codes))
        assert row["masks"] == [coco.encode_mask(alone.mask), None]
