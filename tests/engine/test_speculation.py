"""Speculation against plain decoding: the same answers in fewer passes, whatever is proposed."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import ops
from paligemma_jax.engine import generate
from paligemma_jax.engine.strategies.speculation import Context, choose_num_drafts, context, outline, propose
from paligemma_jax.ops.autotune import Table, spec_of
from paligemma_jax.ops.cpu import gemv
from paligemma_jax.processing.request import GenerateOptions, Sampling
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.prompts import read_prompt

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PROMPTS = (7, 12, 9, 10, 6)
GREEDY = Sampling()
HOT = Sampling(temperature=1.5, top_k=20, seed=3)
KINDS = ((10, 20), (20, 24))


def options(sampling=GREEDY, max_new_tokens=14, min_new_tokens=0) -> GenerateOptions:
    return GenerateOptions(max_new_tokens, sampling, min_new_tokens=min_new_tokens)


def mixed(max_new_tokens=14) -> list[GenerateOptions]:
    """Of eight rows: every other one is drawn."""
    return [options(HOT if row % 2 else GREEDY, max_new_tokens) for row in range(8)]


@pytest.fixture
def both(answer):
    """both(config, params, inputs, known, options, num_drafts=3, num_steps=2): all `Progress` with speculation.

    It is compared with plain decoding.
    """

    def run(config, params, inputs, known, asked=options(), num_drafts=3, num_steps=2):  # noqa: B008
        *_, plain = answer(config, params, inputs, asked, num_steps=2)
        found = answer(config, params, inputs, asked, num_steps, context=known, num_drafts=num_drafts)
        assert_same(found[-1], plain)
        return found

    return run


def assert_same(found, plain) -> None:
    for name in ("tokens", "step", "done"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    for first, second in zip(jax.tree.leaves(found.scores), jax.tree.leaves(plain.scores), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-4)


def context_of(answers, width=32) -> Context:
    """What holds these answers [B, n], so that what is similar is followed by what comes."""
    text = np.full((len(answers), width), -1, np.int32)
    text[:, width - answers.shape[1] :] = answers
    return Context(text, KINDS, outlined=False)


@pytest.fixture
def answers_of(answer):
    """answers_of(config, params, inputs, options): tokens [B, n] of plain decoding."""

    def run(config, params, inputs, asked=options()) -> np.ndarray:  # noqa: B008
        *_, last = answer(config, params, inputs, asked, num_steps=2)
        return last.tokens[:, : last.step.max()]

    return run


@pytest.mark.parametrize("wrong", [0, 4, 1], ids=["right", "every fourth wrong", "all wrong"])
def test_answers_are_those_of_plain_decoding(config, params, make_inputs, both, answers_of, wrong):
    """In a ragged batch, greedy and drawn, whose rows get ahead of each other: drafts go wrong at their own columns."""
    inputs = make_inputs(config, PROMPTS)
    answers = answers_of(config, params, inputs, mixed())
    if wrong:
        columns = np.add.outer(np.arange(len(answers)), np.arange(answers.shape[1])) % wrong == 0
        answers = np.where(columns, (answers + 1) % 90, answers)
    *_, last = both(config, params, inputs, context_of(answers), mixed())
    assert last.done.all() and last.step.max() <= 14


def test_a_row_alone_gives_the_same(gemma2, random_params, make_inputs, both, answers_of):
    inputs = make_inputs(gemma2, PROMPTS, range(1, 2))
    answers = answers_of(gemma2, random_params(gemma2), inputs)
    for num_drafts in (1, 4):
        both(gemma2, random_params(gemma2), inputs, context_of(answers), num_drafts=num_drafts)


def test_accepted_drafts_save_passes(gemma2, random_params, make_inputs, both, answers_of):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, options(HOT))
    assert len(set(answers[0].tolist())) > 8  # few columns are alike
    found = both(gemma2, params, inputs, context_of(answers), options(HOT), num_steps=1)
    assert [int(progress.step[0]) for progress in found] == [1, 5, 9, 13, 14]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_lengths_are_kept(gemma2, random_params, make_inputs, both, answers_of, limit):
    inputs, params = make_inputs(gemma2, PROMPTS), random_params(gemma2)
    known = context_of(answers_of(gemma2, params, inputs, mixed()))
    *_, last = both(gemma2, params, inputs, known, mixed(limit))
    assert last.step.max() == limit


def test_rows_have_limits_and_least_numbers_of_tokens_of_their_own(
    gemma2, random_params, make_inputs, both, answers_of
):
    inputs, params = make_inputs(gemma2, PROMPTS), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, options(HOT))
    config = dataclasses.replace(gemma2, eos_token_id=int(answers[0, 1]))
    pairs = [(9, 5), (3, 0), (14, 14), (1, 1), (7, 0), (14, 2), (1, 0), (2, 2)]
    each = [options(HOT, most, least) for most, least in pairs]
    *_, last = both(config, params, inputs, context_of(answers), each)
    assert last.step[0] >= 5 and last.step[2] == 14
    for row, (most, least) in enumerate(pairs):
        assert least <= last.step[row] <= most
        assert config.eos_token_id not in last.tokens[row, : max(0, least - 1)]


def test_rows_end_within_accepted_drafts(gemma2, random_params, make_inputs, both, answers_of):
    """The context goes on behind what has become another <eos>; the network would choose there what it says."""
    inputs, params = make_inputs(gemma2, PROMPTS), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, options(HOT, 24))
    ended = next(t for t in answers[0, 3:8] if t not in answers[0, :3])
    config = dataclasses.replace(gemma2, more_eos_ids=(int(ended),))
    *_, last = both(config, params, inputs, context_of(answers), options(HOT, 24), num_drafts=7, num_steps=3)
    assert 4 <= last.step[0] <= 8 and last.tokens[0, last.step[0] - 1] == ended
    assert (last.tokens[0, last.step[0] :] == config.pad_token_id).all()
    assert not last.scores.logprobs[0, last.step[0] :].any()


def test_nothing_is_decoded_when_all_rows_end_at_once(gemma2, random_params, make_inputs, both, answers_of):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs)
    config = dataclasses.replace(gemma2, eos_token_id=int(answers[0, 0]))
    assert len(both(config, params, inputs, context_of(answers))) == 1


def test_new_prompts_and_settings_compile_nothing(gemma2, random_params, make_inputs, both, runner):
    params = random_params(gemma2)
    both(gemma2, params, make_inputs(gemma2, (8, 9)), context_of(np.ones((2, 5), np.int32)), options(HOT))
    before = len(runner)
    other = dataclasses.replace(HOT, temperature=0.4, seed=8)
    both(gemma2, params, make_inputs(gemma2, (11, 6)), context_of(np.ones((2, 9), np.int32)), options(other, 20))
    assert len(runner) == before


def test_the_time_of_a_token_counts_the_tokens_of_the_longest_row(
    gemma2, random_params, make_inputs, make_group, make_call, answers_of
):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    known = context_of(answers_of(gemma2, params, inputs))
    call, counted = make_call(params), []
    call.add_steps = counted.append
    list(generate.answers(call, make_group(gemma2, inputs, options(), 2, context=known)))
    assert sum(counted) == 14 - 1


def proposed(text, previous, length=None) -> list[int]:
    text = jnp.array([text], jnp.int32)
    return propose(text, jnp.array([length or text.shape[1]]), jnp.array([previous], jnp.int32), KINDS)[0].tolist()


def test_drafts_are_copied_from_behind_the_most_similar_column():
    absent = [-1] * 3
    assert proposed([1, 2, 3, 4, 9, 2, 5, 6, 7, 1, 2], absent) == [3, 4, 9]  # "1 2" rather than the later "2"
    assert proposed([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], absent) == [5, 6, 1]  # of equals the latest
    assert proposed([3, 1, 2, 1, 2], absent) == [1, 2, 1]  # a copy that reaches the end starts again
    assert proposed([1, 2, 3, 4, 1, 2, 0, 2, 8], absent, length=6) == [3, 4, 1]  # what comes later is not there yet
    assert proposed([5, 6, 7], absent) == [7, 7, 7]  # nothing is like it: ids of the text all the same


def test_locations_match_any_other_and_values_come_from_the_last_pass():
    outline = [3, 10, 10, 20, 7, 4]
    assert proposed([*outline, 3, 11, 12], [-1, -1, -1]) == [20, 7, 4]
    assert proposed([*outline, 3, 11, 12], [22, 8, 5]) == [22, 7, 4]  # only what is of the copied kind
    assert proposed([*outline, 3, 11, 12], [13, 21, 6]) == [20, 7, 4]
    text = [3, 11, 12, 21, 7, 3, 11, 12]
    assert proposed([*outline, *text], [22, 8, 5]) == [21, 7, 3]  # the same values: what followed them is better


def test_outlines_are_answers_in_the_tasks_format():
    for prompt, codes in (("detect cat ;  red dog", None), ("segment cat ; red dog", 16)):
        found, dropped = parse(outline(read_prompt(prompt)), (100, 100))
        assert [thing.label for thing in found] == ["cat", "red dog", "red dog"] and not dropped
        assert all((len(thing.codes) if thing.codes else None) == codes for thing in found)
    assert [outline(read_prompt(prompt)) for prompt in ("caption en", "detect", "detect ;", "")] == [""] * 4


def test_the_context_is_an_outline_and_the_prompt(tokenizer):
    prompts = [read_prompt("segment a red circle"), read_prompt("caption en")]
    known = context(tokenizer, prompts)
    assert known.outlined and known.text.shape[1] & (known.text.shape[1] - 1) == 0
    expected = outline(prompts[0]) + "segment a red circle\n", "caption en\n"
    for row, text in zip(known.text, expected, strict=True):
        assert tokenizer.decode(row[row >= 0].tolist()) == text
        assert (row[: np.argmax(row >= 0)] == -1).all() and row[-1] == tokenizer.newline_id
    (loc, loc_end), (seg, seg_end) = known.kinds
    assert [tokenizer.decode([i]) for i in (loc, loc_end - 1)] == ["<loc0000>", "<loc1023>"]
    assert [tokenizer.decode([i]) for i in (seg, seg_end - 1)] == ["<seg000>", "<seg127>"]
    assert not context(tokenizer, prompts[1:]).outlined


@pytest.mark.parametrize("form, count", [(None, 7), ("int8", gemv.MOST_ROWS - 1), ("int4", gemv.MOST_ROWS - 1)])
def test_one_outlined_row_of_a_large_model_speculates_where_passes_are_cheap(form, count):
    def weights(size, dtype="bfloat16", quantize_activations=True):
        weight = jax.ShapeDtypeStruct((size // 2048, 2048), dtype)
        if form:
            weight = ops.quantized_shape(weight, form, quantize_activations)
        return {"language_model": {"norm": jnp.ones(2, "bfloat16"), "weight": weight}}

    one, two = (Context(np.zeros((rows, 32), np.int32), KINDS, outlined=True) for rows in (1, 2))
    plain = dataclasses.replace(one, outlined=False)
    spec = spec_of(weights(2**29)["language_model"]["weight"], unsigned=False)
    few = {True: [1.1, 3.0, 1.0, 1.2], False: [1.0, 3.0, 1.1, 1.6]}  # one row and several, in one way and the other
    for cheap, many in ((True, [3.0, 3.0, 1.2, 1.0, 2.0]), (False, [1.0, 3.0, 1.4, 2.0, 2.0])):
        seconds = few[cheap] if form else many
        labels = [f"{kernel}/{rows}" for kernel, rows in spec.candidates()]
        table = Table({str(spec): dict(zip(labels, seconds, strict=True))})
        assert choose_num_drafts(weights(2**29), one, None, table) == cheap * count
        assert not choose_num_drafts(weights(2**29), one, None, Table())  # nothing was measured, as off the CPU
        assert not any(choose_num_drafts(weights(2**29), known, None, table) for known in (two, plain))
        small = choose_num_drafts(weights(2**28), one, None, table)
        assert small == choose_num_drafts(weights(2**29), one, False, table) == 0
        assert choose_num_drafts(weights(2**28), plain, True, table) == count
        if form is None:
            assert not choose_num_drafts(weights(2**29, "float32"), one, None, table)
        else:
            assert choose_num_drafts(weights(2**29, "float32"), one, None, table) == cheap * count
        if form == "int8":
            assert not choose_num_drafts(weights(2**29, quantize_activations=False), one, None, table)


def test_decoding_keeps_no_second_copy_of_the_embedding_table(gemma2, random_params, make_inputs, make_group, runner):
    """XLA on CPU would convert a half-precision table to float32, once for a whole chunk of passes."""
    config = dataclasses.replace(gemma2, text=dataclasses.replace(gemma2.text, vocab_size=50_000, width=64))
    target = ops.Target("cpu")
    params = ops.prepare(random_params(config, "bfloat16"), target)
    known = context_of(np.ones((1, 5), np.int32))
    inputs = make_inputs(config, PROMPTS, range(1))
    group = make_group(config, inputs, options(max_new_tokens=2), 2, context=known, num_drafts=4)
    strategy = group.strategy
    first = runner.declare(
        strategy.prefill, params, group.inputs, group.options, *strategy.extra, **strategy.prefill_static
    )
    decode = runner.declare(strategy.decode, params, first.result, **strategy.decode_static)
    used = ops.compile_traced(target, decode.traced).memory_analysis()
    table = params["language_model"]["embed_tokens"]["weight"]
    assert used.temp_size_in_bytes < table.size * table.dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, top_p=0.9, seed=4)], ids=["greedy", "sampled"])
def test_the_shipped_model_says_the_same_in_fewer_passes(shipped, sampling, monkeypatch):
    picture = ASSETS / "examples" / "stars.png"
    texts = ["detect star", "segment star ; circle", "caption en"]
    for rows in (3, 1):
        runs = []
        for speculate in (True, False):
            driven, plain = [], generate.answers
            with monkeypatch.context() as patch:
                patch.setattr(generate, "answers", lambda *args: driven.extend(plain(*args)) or driven)  # noqa: B023
                shipped.generate(picture, texts[:rows], 96, sampling, speculate=speculate)
            runs.append(driven)
        assert_same(runs[0][-1], runs[1][-1])
    assert len(runs[0]) < 0.8 * (int(runs[0][-1].step[0]) - 1) / 2  # two passes between two looks


@pytest.fixture(scope="module")
def shipped():
    return pj.load(ASSETS / "tiny", dtype="float32")
