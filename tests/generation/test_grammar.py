"""Answers that can be nothing but well-formed objects, whatever the weights say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paligemma_jax as pj
from paligemma_jax.generation import grammar
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import NUM_CODES, Detection, format_objects, parse

PROMPTS = ["detect red circle", "segment a ; two blue squares", "caption en", "detect red ; red circle ; the ; a"]
SIZE = (1023, 1023)
WAYS = {
    "greedy": {},
    "hot": {"sampling": pj.Sampling(temperature=2.0, seed=1)},
    "filtered": {"sampling": pj.Sampling(temperature=2.0, top_p=0.5, top_k=7, seed=2)},
    "beams": {"sampling": pj.Sampling(num_beams=3)},
    "speculation": {"sampling": pj.Sampling(temperature=2.0, seed=1), "speculate": True},
}


@pytest.fixture(scope="module")
def model(gemma2, random_params, tokenizer) -> pj.PaliGemma:
    text = dataclasses.replace(gemma2.text, vocab_size=tokenizer.vocab_size + 64)
    config = dataclasses.replace(gemma2, text=text, image_token_id=tokenizer.vocab_size)
    return pj.PaliGemma(config, random_params(config), Processor(config, tokenizer, ImageSettings(28)))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 20, 30, 3), np.uint8))


def assert_well_formed(prompt: str, output: pj.Output) -> None:
    found, dropped = parse(output.text, SIZE)
    assert not dropped and output.finish_reason == "eos"
    assert {item.label for item in found} <= set(class_names(prompt))
    assert {len(item.codes or ()) for item in found} <= {NUM_CODES if prompt.startswith("segment") else 0}
    assert format_objects(found, SIZE) == output.text  # corners were in order, separators as they should be


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way in ("greedy", "beams") else pytest.mark.slow) for way in WAYS]
)
def test_answers_are_well_formed_whatever_the_weights(model, pictures, way):
    seen = 0
    for limit in (1, 9, 40):
        outputs = model.generate(pictures, PROMPTS, limit, constrain=True, **WAYS[way])
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            if class_names(prompt):
                assert_well_formed(prompt, output)
                seen += len(parse(output.text, SIZE)[0])
    assert seen > 2


def test_three_rows_and_labels_that_cannot_be_written(model, pictures):
    """Rows are padded to a power of two; a location in a label would be read as one."""
    prompts = ["detect\tred", "segment <seg001> star ; a", "detect <loc0001>"]
    outputs = model.generate(pictures[:3], prompts, 60, constrain=True, sampling=pj.Sampling(temperature=2.0))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_well_formed(prompt, output)
    assert outputs[2].text == "" and "star" not in outputs[1].text
    for picture, prompt, output in zip(pictures, prompts, outputs, strict=False):
        options = {"constrain": True, "sampling": pj.Sampling(temperature=2.0)}
        assert model.generate(picture, prompt, 60, **options)[0].text == output.text


def test_other_rows_and_the_free_answers_stay_as_they_are(model, pictures):
    free = model.generate(pictures, PROMPTS, 12)
    together = model.generate(pictures, PROMPTS, 12, constrain=True)
    assert together[2].text == free[2].text and free[0].text != together[0].text
    alone = model.generate(pictures[0], PROMPTS[0], 12, constrain=True)
    assert alone[0].text == together[0].text


def test_speculation_and_streams_give_the_same(model, pictures):
    hot = pj.Sampling(temperature=2.0, seed=1)
    for sampling in (pj.Sampling(), hot):
        plain = model.generate(pictures, PROMPTS, 40, sampling, constrain=True)
        guessed = model.generate(pictures, PROMPTS, 40, sampling, constrain=True, speculate=True)
        assert [o.text for o in guessed] == [o.text for o in plain]
        for first, second in zip(plain, guessed, strict=True):
            np.testing.assert_allclose(first.near, second.near, atol=1e-4)
            np.testing.assert_allclose(first.expected, second.expected, atol=0.1)
        assert "".join(model.stream(pictures[1], PROMPTS[1], 40, sampling, constrain=True)) == plain[1].text


def test_odds_are_those_of_the_free_model(model, pictures):
    for way in ("greedy", "beams"):
        [output] = model.generate(pictures[1], PROMPTS[1], 70, constrain=True, **WAYS[way])
        [expected] = model.score(pictures[1], PROMPTS[1], output.text)
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)

        logits = model.logits(pictures[1], PROMPTS[1], output.text)[0].astype(np.float64)
        probabilities = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        start = model.processor.tokenizer.loc_start
        locations, place = probabilities[:, start : start + 1024], np.arange(1024)
        chosen = output.tokens - start
        near = np.where(abs(place - chosen[:, None]) <= 32, locations, 0).sum(-1) * ((chosen >= 0) & (chosen < 1024))
        np.testing.assert_allclose(output.near, near, atol=1e-4)
        np.testing.assert_allclose(output.expected, locations @ place / locations.sum(-1), atol=0.1)


def test_other_labels_need_no_new_program(model, pictures):
    model.generate(pictures[0], "detect red circle", 12, constrain=True)
    count = len(model._programs)
    model.generate(pictures[0], "detect a square", 12, constrain=True)
    assert len(model._programs) == count


LABELS = st.lists(
    st.text(st.sampled_from("abc é一-é'0"), min_size=1, max_size=12).map(lambda s: " ".join(s.split())).filter(bool),
    min_size=1,
    max_size=6,
    unique=True,
)


def walk(config, tokenizer, prompt: str, text: str, limit: int = 1000) -> int:
    """How many tokens of a text and <eos> the grammar allows."""
    table = grammar.build(tokenizer, [prompt], config, limit)
    place = grammar.start(table, 1)
    tokens = [*tokenizer.encode(text), config.eos_token_id]
    for step, token in enumerate(tokens):
        logits = _allow(table, place, jnp.int32(step), jnp.zeros((1, config.image_token_id)))
        if not np.isfinite(logits[0, token]):
            return step
        place = _move(table, place, jnp.array([token]))
    return len(tokens)


_allow, _move = jax.jit(grammar.allow), jax.jit(grammar.move)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(labels=LABELS, data=st.data())
def test_every_proper_answer_is_allowed_and_only_with_room(model, labels, data):
    task = data.draw(st.sampled_from(["detect", "segment"]))
    codes = st.tuples(*[st.integers(0, 127)] * NUM_CODES) if task == "segment" else st.none()
    side = st.tuples(st.integers(0, 1023), st.integers(0, 1023)).map(sorted)
    thing = st.builds(
        lambda label, x, y, codes: Detection(label, (x[0], y[0], x[1], y[1]), codes=codes),
        st.sampled_from(labels),
        side,
        side,
        codes,
    )
    text = format_objects(data.draw(st.lists(thing, max_size=3)), SIZE)
    tokenizer, prompt = model.processor.tokenizer, f"{task} {' ; '.join(labels)}"
    length = len(tokenizer.encode(text)) + 1
    assert walk(model.config, tokenizer, prompt, text) == length
    assert walk(model.config, tokenizer, prompt, text, limit=length) == length
    assert walk(model.config, tokenizer, prompt, text, limit=length - 1) < length or not text


@pytest.mark.parametrize(
    "text, allowed",
    [
        ("a cat", 0),
        ("<loc0010><loc0020><loc0009><loc0030> cat", 2),  # y1 < y0
        ("<loc0010><loc0020><loc0011><loc0019> cat", 3),  # x1 < x0
        ("<loc0010><loc0020><loc0011><loc0021><seg000> cat", 4),
        ("<loc0010><loc0020><loc0011> cat", 3),
        ("<loc0010><loc0020><loc0011><loc0021>", 4),
    ],
)
def test_malformed_answers_are_stopped_where_they_go_wrong(model, text, allowed):
    assert walk(model.config, model.processor.tokenizer, "detect cat", text) == allowed


def test_without_classes_there_is_no_grammar(model):
    assert grammar.build(model.processor.tokenizer, ["caption en", "detect", "detect ;"], model.config, 9) is None
