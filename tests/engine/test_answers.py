"""Batches, padding, early stop, limits of rows, and which programs are compiled."""

import dataclasses

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.engine.generate import Generation, answers, embed_images, programs
from paligemma_jax.engine.runner import Call, Runner
from paligemma_jax.errors import PromptError
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Batch, Processor
from paligemma_jax.processing.request import GenerateOptions, Sampling

PROMPTS = (7, 12, 9, 10, 6)
GREEDY = Sampling()
WARM = Sampling(temperature=1.0)
HOT = Sampling(temperature=1.5, top_k=20, seed=3)
NO_EOS = 100  # a reserved id, which is never chosen


def options(sampling=GREEDY, max_new_tokens=14, min_new_tokens=0) -> GenerateOptions:
    return GenerateOptions(max_new_tokens, sampling, min_new_tokens=min_new_tokens)


def said(progress, row) -> np.ndarray:
    return progress.tokens[row, : progress.step[row]]


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_batch_equals_its_rows_alone(gemma2, random_params, make_inputs, answer, sampling):
    params = random_params(gemma2)
    *_, together = answer(gemma2, params, make_inputs(gemma2, PROMPTS), options(sampling))
    for row in range(len(PROMPTS)):
        inputs = make_inputs(gemma2, PROMPTS, range(row, row + 1))
        *_, alone = answer(gemma2, params, inputs, options(sampling), requests=["alone"])
        chosen = said(alone, 0)
        np.testing.assert_array_equal(said(together, row), chosen)
        logprobs = (progress.scores.logprobs[i, : len(chosen)] for progress, i in ((together, row), (alone, 0)))
        np.testing.assert_allclose(*logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def endless(gemma2):
    """A geometry whose <eos> is never chosen."""
    return dataclasses.replace(gemma2, eos_token_id=NO_EOS)


@pytest.fixture(scope="module")
def free(endless, random_params, make_inputs, runner, make_group) -> np.ndarray:
    """Tokens [B, 14] that are drawn with WARM where nothing ends."""
    *_, last = answers(
        Call(runner, random_params(endless)), make_group(endless, make_inputs(endless, PROMPTS), options(WARM))
    )
    assert set(last.step) == {14} and last.done.all()
    return last.tokens[:, :14]


@pytest.fixture(scope="module")
def place(free) -> int:
    """Where the first row says something for the first time, after its second token."""
    return next(i for i in range(2, 6) if free[0, i] not in free[0, :i])


@pytest.fixture(scope="module")
def ending(gemma2, free, place):
    """A geometry whose <eos> is what the first row says there."""
    return dataclasses.replace(gemma2, eos_token_id=int(free[0, place]))


def test_chunks_change_nothing_and_each_row_keeps_its_own_limit(endless, random_params, make_inputs, answer, free):
    """Rows of a batch have limits of their own, and the others do not see it."""
    params, inputs = random_params(endless), make_inputs(endless, PROMPTS)
    limits = [1, 7, 14, 2, 13, 1, 1, 1]
    *earlier, last = answer(endless, params, inputs, [options(WARM, n) for n in limits], num_steps=3)
    np.testing.assert_array_equal(last.step, limits)
    assert last.done.all() and len(earlier) == 5  # 1 + 5 * 3 tokens
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(said(last, row), free[row, :limit])
        assert (last.tokens[row, limit:] == endless.pad_token_id).all()
        assert not last.scores.logprobs[row, limit:].any()
    for limit in (1, 7):
        *_, last = answer(endless, params, inputs, options(WARM, limit), num_steps=3)
        np.testing.assert_array_equal(last.tokens[:, :limit], free[:, :limit])
        assert set(last.step) == {limit} and last.done.all()


def test_rows_end_on_their_own_and_the_loop_with_the_last(ending, random_params, make_inputs, answer, free, place):
    *earlier, last = answer(ending, random_params(ending), make_inputs(ending, PROMPTS), options(WARM, 30))
    np.testing.assert_array_equal(said(last, 0), free[0, : place + 1])
    for row in range(len(PROMPTS)):
        count = last.step[row]
        assert ending.eos_token_id not in last.tokens[row, : count - 1]
        assert last.tokens[row, count - 1] == ending.eos_token_id or count == 30
        assert (last.tokens[row, count:] == ending.pad_token_id).all()
        assert (last.scores.logprobs[row, count:] == 0.0).all()
    assert last.step.max() == 30 or 1 + 5 * len(earlier) <= last.step.max() + 5  # at most a chunk is wasted
    assert not earlier[-1].done.all()


def test_nothing_is_decoded_when_all_rows_end_at_once(gemma2, random_params, make_inputs, answer):
    inputs = make_inputs(gemma2, PROMPTS, range(1))
    [first] = answer(gemma2, random_params(gemma2), inputs, options(max_new_tokens=1))
    config = dataclasses.replace(gemma2, eos_token_id=int(first.tokens[0, 0]))
    [only] = answer(config, random_params(gemma2), inputs, options())
    np.testing.assert_array_equal(said(only, 0), said(first, 0))


def test_an_answer_has_its_least_number_of_tokens(ending, random_params, make_inputs, answer, free, place):
    """<eos> is not said before, drawn or greedily; rows that ask for no such thing are as ever."""
    params, inputs = random_params(ending), make_inputs(ending, PROMPTS)
    ways = [WARM, WARM, WARM, WARM, GREEDY, WARM, WARM, WARM]
    *_, plain = answer(ending, params, inputs, [options(way) for way in ways])
    least = [place + 3, 0, 14, 1, 14, 2, 0, 0]
    each = [options(way, min_new_tokens=n) for way, n in zip(ways, least, strict=True)]
    *_, last = answer(ending, params, inputs, each)
    for row, minimum in enumerate(least):
        tokens = said(last, row)
        assert len(tokens) >= minimum and ending.eos_token_id not in tokens[: max(0, minimum - 1)]
        if plain.step[row] >= minimum:
            np.testing.assert_array_equal(tokens, said(plain, row))
        else:
            np.testing.assert_array_equal(tokens[: plain.step[row] - 1], said(plain, row)[:-1])
    assert plain.step[0] == place + 1 and len(said(last, 2)) == len(said(last, 4)) == 14
    *_, exact = answer(ending, params, inputs, [options(way, 6, min_new_tokens=6) for way in ways])
    assert set(exact.step) == {6}


def test_the_end_counts_toward_the_least_number_of_tokens(ending, random_params, make_inputs, answer, free, place):
    """It may be said as the token that reaches it."""
    params, inputs = random_params(ending), make_inputs(ending, PROMPTS)
    *_, last = answer(ending, params, inputs, options(WARM, min_new_tokens=place + 1))
    np.testing.assert_array_equal(said(last, 0), free[0, : place + 1])
    *_, last = answer(ending, params, inputs, options(WARM, min_new_tokens=place + 2))
    assert last.step[0] > place + 1


def test_new_settings_of_a_kind_and_new_prompts_compile_nothing(endless, random_params, make_inputs, answer, runner):
    params = random_params(endless)
    answer(endless, params, make_inputs(endless, PROMPTS), options(WARM))
    before = len(runner)
    each = [options(Sampling(temperature=0.3 * i, seed=9), 20 + i) for i in range(8)]
    answer(endless, params, make_inputs(endless, (11, 6, 9, 7, 8, 10)), each)
    assert len(runner) == before


def test_pictures_are_embedded_once_each_in_powers_of_two(gemma2, random_params, make_call, monkeypatch):
    sizes = []
    call = make_call(random_params(gemma2))
    run = call.run
    monkeypatch.setattr(call, "run", lambda f, pixels, **static: sizes.append(len(pixels)) or run(f, pixels, **static))
    pixels = np.random.default_rng(0).uniform(-1, 1, (7, 28, 28, 3)).astype(np.float32)
    soft_tokens = embed_images(call, gemma2, pixels)
    assert sizes == [4, 2, 1]
    assert soft_tokens.shape == (7, gemma2.vision.num_tokens, gemma2.text.width)
    alone = embed_images(call, gemma2, pixels[5:6])
    np.testing.assert_allclose(soft_tokens[5:6], alone, atol=1e-5)


def test_steps_of_every_call_are_counted(endless, random_params, make_inputs, make_group, make_call):
    call = make_call(random_params(endless))
    counted = []
    call.add_steps = counted.append
    list(answers(call, make_group(endless, make_inputs(endless, PROMPTS), options(WARM), num_steps=3)))
    assert counted == [3] * 5


def test_neighbours_of_a_kind_run_together(gemma2, tokenizer):
    kinds = "aabbbba"
    batch = Batch(None, np.zeros((len(kinds), 16), np.int32), None, None, None)
    each = [options(max_new_tokens=1 + (kind == "b")) for kind in kinds]
    generation = Generation(gemma2, tokenizer, [], each, batch, None)
    assert [list(rows) for rows in generation.runs(16, lambda o: o.max_new_tokens)] == [[0, 1], [2, 3, 4, 5], [6]]
    assert [list(rows) for rows in generation.runs(3, lambda o: o.max_new_tokens)] == [[0, 1], [2, 3, 4], [5], [6]]
    assert [list(rows) for rows in generation.runs(4)] == [[0, 1, 2, 3], [4, 5, 6]]


# The declared list of programs


TEXTS = ["caption en", "detect a red circle"]
WAYS = {
    "greedy": {},
    "sampled": {"sampling": Sampling(temperature=1.0, seed=5)},
    "speculation": {"speculate": True},
    "beams": {"sampling": Sampling(num_beams=2)},
    "constrained": {"constrain": True},
}


@pytest.fixture(scope="module")
def processor(gemma2, tokenizer) -> Processor:
    text = dataclasses.replace(gemma2.text, num_layers=1, vocab_size=tokenizer.vocab_size + 64)
    config = dataclasses.replace(gemma2, text=text, image_token_id=tokenizer.vocab_size)
    return Processor(config, tokenizer, ImageSettings(config.vision.image_size))


@pytest.mark.parametrize("way", WAYS)
def test_after_the_declared_programs_nothing_is_left_to_compile(processor, random_params, runner, way):
    """They are declared by shapes of parameters and by images that are told apart only."""
    params = random_params(processor.config)
    model = pj.PaliGemma(processor.config, params, processor, runner=runner)
    requests = [pj.Request.of(i, text, max_new_tokens=6, **WAYS[way]) for i, text in enumerate(TEXTS)]
    declared = list(programs(runner, jax.eval_shape(lambda: params), processor, requests, batch_size=2))
    assert len(declared) == 3  # image encoder, prefill, decode
    before = len(runner)
    runner.compile(declared)
    known = len(runner)
    assert known >= before + 2
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8))
    outputs = model.generate(pictures, TEXTS, options=requests[0].options)
    assert len(runner) == known
    assert outputs[0].timing.compile_s < 1 and all(len(output.tokens) for output in outputs)


def test_programs_of_mixed_requests_are_those_that_answer_them(processor, random_params):
    """Groups, rows that share an image, and batches of several sizes."""
    model = pj.PaliGemma(processor.config, random_params(processor.config), processor)
    first, second = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    requests = [
        pj.Request.of(first, TEXTS[0], max_new_tokens=4),
        pj.Request.of([first, second], TEXTS[1], max_new_tokens=9, min_new_tokens=2),
        pj.Request.of(second, TEXTS[0], max_new_tokens=3, sampling=WARM),
        pj.Request.of(second, TEXTS[0], max_new_tokens=3, sampling=Sampling(num_beams=2)),
    ]
    declared = list(programs(model.runner, jax.eval_shape(lambda: model.params), processor, requests, 2))
    assert len(declared) == 1 + 3 * 2  # two images; two rows, one row, a search
    assert len(model.runner) == 0
    model.runner.compile(declared)
    model.answer(requests, batch_size=2)
    assert len(model.runner) == len({program.key for program in declared}) == len(declared)


def test_requests_that_do_not_fit_are_known_before_there_are_weights(processor, random_params):
    shapes = jax.eval_shape(lambda: random_params(processor.config))
    request = pj.Request.of(0, TEXTS[0], max_new_tokens=processor.config.text.max_positions)
    with pytest.raises(PromptError, match="positions"):
        list(programs(Runner(None), shapes, processor, [request], 1))


def test_params_of_another_structure_are_another_program(gemma2, random_params, make_inputs, make_group, runner):
    group = make_group(gemma2, make_inputs(gemma2, PROMPTS), options())
    arguments = group.inputs, group.options
    static = group.strategy.prefill_static
    single, half = (
        runner.declare(group.strategy.prefill, random_params(gemma2, dtype), *arguments, **static).key
        for dtype in ("float32", "bfloat16")
    )
    assert single != half
    shapes = jax.eval_shape(lambda: random_params(gemma2))
    assert runner.declare(group.strategy.prefill, shapes, *arguments, **static).key == single
