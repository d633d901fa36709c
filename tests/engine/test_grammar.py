"""Answers that can be nothing but well-formed objects, whatever the weights say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paligemma_jax as pj
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.tasks.detection import Detection, format_objects, parse
from paligemma_jax.tasks.prompts import Prompt, class_prompts, read_prompt
from paligemma_jax.tasks.reading import NUM_CODES, is_label

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
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 20, 30, 3), np.uint8))


def assert_well_formed(prompt: str, output: pj.Output) -> None:
    found, dropped = parse(output.text, SIZE)
    assert not dropped and output.finish_reason == "eos"
    assert {item.label for item in found} <= set(read_prompt(prompt).labels)
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
            if read_prompt(prompt).labels:
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
        speculated = model.generate(pictures, PROMPTS, 40, sampling, constrain=True, speculate=True)
        assert [o.text for o in speculated] == [o.text for o in plain]
        for first, second in zip(plain, speculated, strict=True):
            np.testing.assert_allclose(first.near, second.near, atol=1e-4)
            np.testing.assert_allclose(first.expected, second.expected, atol=0.1)
        assert "".join(model.stream(pictures[1], PROMPTS[1], 40, sampling, constrain=True)) == plain[1].text


def test_scores_are_those_of_the_free_model(model, pictures):
    for way in ("greedy", "beams"):
        [output] = model.generate(pictures[1], PROMPTS[1], 70, constrain=True, **WAYS[way])
        [expected] = model.score(pictures[1], PROMPTS[1], output.text)
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)

        logits = model.logits(pictures[1], PROMPTS[1], output.text)[0].astype(np.float64)
        probabilities = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        start = model.processor.tokenizer.loc_start
        locations, at = probabilities[:, start : start + 1024], np.arange(1024)
        chosen = output.tokens - start
        near = np.where(abs(at - chosen[:, None]) <= 32, locations, 0).sum(-1) * ((chosen >= 0) & (chosen < 1024))
        np.testing.assert_allclose(output.near, near, atol=1e-4)
        np.testing.assert_allclose(output.expected, locations @ at / locations.sum(-1), atol=0.1)


def test_other_labels_need_no_new_program(model, pictures):
    model.generate(pictures[0], "detect red circle", 12, constrain=True)
    count = len(model.runner)
    model.generate(pictures[0], "detect a square", 12, constrain=True)
    assert len(model.runner) == count


LABELS = st.lists(
    st.text(st.sampled_from("abc é一-é'0"), min_size=1, max_size=12)
    .map(lambda s: " ".join(s.split()))
    .filter(is_label),
    min_size=1,
    max_size=6,
    unique=True,
)


def walk(config, tokenizer, prompt: str | Prompt, text: str, limit: int = 1000) -> int:
    """How many tokens of a text and <eos> the grammar allows."""
    table = jnp.asarray(grammar.tables(tokenizer, [read_prompt(prompt)], config))
    position = grammar.start(table)
    tokens = [*tokenizer.encode(text), config.eos_token_id]
    for step, token in enumerate(tokens):
        left = jnp.array([limit - 1 - step])
        logits = _allow(table, position, left, jnp.zeros((1, config.image_token_id)))
        if not np.isfinite(logits[0, token]):
            return step
        position = _advance(table, position, jnp.array([token]))
    return len(tokens)


_allow, _advance = jax.jit(grammar.allow), jax.jit(grammar.advance)


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


_BOX, _CODES = "<loc0010><loc0020><loc0011><loc0021>", "<seg007>" * NUM_CODES


@pytest.mark.parametrize(
    "task, text, allowed",
    [
        ("segment", f"{_BOX}{_CODES}", True),  # as fine-tunes on RefCOCO answer
        ("segment", f"{_BOX}{_CODES} left man", True),
        ("segment", f"{_BOX}{_CODES}{_BOX}{_CODES}", True),
        ("segment", f"{_BOX}{_CODES} ; {_BOX}{_CODES} left man ; {_BOX}{_CODES}", True),
        ("detect", _BOX * 3, True),
        ("detect", "", True),
        ("segment", _BOX, False),
        ("segment", f"{_BOX}{_CODES} right man", False),
        ("segment", f"{_BOX}{_CODES}<seg000>", False),
        ("detect", f"{_BOX}{_CODES}", False),
        ("detect", f"{_BOX}<loc0001>", False),
        ("detect", f"{_BOX}<loc0010><loc0020><loc0009><loc0030>", False),
    ],
)
def test_objects_asked_for_in_another_form_may_do_without_a_label(model, task, text, allowed):
    tokenizer = model.processor.tokenizer
    [prompt] = class_prompts(task, "left man", "bare")
    length = len(tokenizer.encode(text)) + 1
    assert (walk(model.config, tokenizer, prompt, text) == length) == allowed
    if allowed:
        assert walk(model.config, tokenizer, prompt, text, limit=length) == length
        assert walk(model.config, tokenizer, prompt, text, limit=length - 1) < length or not text


def test_a_free_row_has_no_grammar(model):
    """Whatever it says, beside a row that has one."""
    prompts = [None, *map(read_prompt, ("caption en", "detect", "detect ;", "detect cat"))]
    table = jnp.asarray(grammar.tables(model.processor.tokenizer, prompts, model.config))
    position, allowed = grammar.start(table), model.config.image_token_id
    logits, tokens = jnp.ones((5, model.config.text.vocab_size)), [model.config.eos_token_id, 5, 1000, allowed - 1]
    for token in tokens:
        found = np.asarray(_allow(table, position, jnp.zeros(5, jnp.int32), logits))
        assert (found[:4, :allowed] == 1).all() and not np.isfinite(found[:, allowed:]).any()
        assert np.isfinite(found[4]).sum() == 1 or token != tokens[0]  # no room for an object
        position = _advance(table, position, jnp.full(5, token))


def test_any_id_of_the_end_ends_and_added_tokens_are_free(model):
    """In a row with a grammar wherever an answer may end; in one without, beside it, as ever."""
    tokenizer, size = model.processor.tokenizer, model.config.text.vocab_size
    config = dataclasses.replace(model.config, more_eos_ids=(7,), added_ids=((size - 3, size - 1),))
    prompts = [None, *map(read_prompt, ("caption en", "detect", "detect ;", "detect cat"))]
    table = jnp.asarray(grammar.tables(tokenizer, prompts, config))
    position, left = grammar.start(table), jnp.full(5, 30, jnp.int32)
    logits = jnp.ones((5, size))
    for token in (tokenizer.loc_start, *tokenizer.encode("<loc0000><loc0000><loc0000> cat")):
        position = _advance(table, position, jnp.full(5, token))
    found = np.isfinite(np.asarray(_allow(table, position, left, logits)))
    assert found[:4, : size - 1].all() and not found[:4, size - 1].any()
    assert found[4, [1, 7]].all() and found[4].sum() == 3, "both, and what goes on"
    np.testing.assert_array_equal(_advance(table, position, jnp.full(5, 7)).node[4], 1)


def test_without_labels_there_is_no_program_of_a_grammar(model, pictures):
    for prompt in ("caption en", "detect ;"):
        model.generate(pictures[2], prompt, 2)
        count = len(model.runner)
        model.generate(pictures[2], prompt, 2, constrain=True)
        assert len(model.runner) == count


def test_sequences_of_a_row_share_its_grammar(model):
    """Row after row, as beams and drafts are laid out."""
    prompts = [read_prompt("detect cat"), None]
    table = jnp.asarray(grammar.tables(model.processor.tokenizer, prompts, model.config))
    position = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), grammar.start(table))
    logits = jnp.zeros((4, model.config.image_token_id))
    allowed = np.isfinite(_allow(table, position, jnp.array([0, 99, 0, 99]), logits)).sum(axis=1)
    np.testing.assert_array_equal(allowed, [1, 1025, model.config.image_token_id, model.config.image_token_id])
    position = _advance(table, position, jnp.array([1, model.processor.tokenizer.loc_start, 7, 7]))
    np.testing.assert_array_equal(position.node[2:], 0)
    assert len({*np.asarray(position.node)}) == 3


def test_tables_have_few_sizes(model):
    """Powers of two, so that a server may leave room for labels to come."""
    tokenizer = model.processor.tokenizer
    short, long = (read_prompt("detect " + " ; ".join(labels)) for labels in (["cat"], [f"cat {i}" for i in range(40)]))
    sizes = [grammar.tables(tokenizer, prompts, model.config).shape for prompts in ([short], [None], [short, long])]
    assert sizes[0] == (1, 32, 5 + 3 * 4) and sizes[1] == sizes[0] and sizes[2][0] == 2
    assert sizes[2][1] > 32 and sizes[2][1] & (sizes[2][1] - 1) == 0
    assert grammar.tables(tokenizer, [short], model.config, min_nodes=64).shape[1] == 64
