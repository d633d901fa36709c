"""Speculation against plain decoding: the same answers in fewer passes, whatever is guessed."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.generation import engine
from paligemma_jax.generation.sampling import Sampling, row_keys
from paligemma_jax.generation.speculation import Hints, choose_num_guesses, decode, generate, guess, hints, outline
from paligemma_jax.models import cpu, few_rows, quantized
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.tasks.detection import parse

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PROMPTS = (7, 12, 9, 10, 6)
NEW_TOKENS = 14
GREEDY = Sampling()
HOT = Sampling(temperature=1.5, top_k=20, seed=3)
KINDS = ((10, 20), (20, 24))


def both(config, params, inputs, clock, known, sampling=GREEDY, max_new_tokens=NEW_TOKENS, guesses=3, chunk=2):
    """Tokens and log-probabilities [n, B] with and without speculation, and the former's chunks."""
    keys = row_keys(sampling.seed, [str(i) for i in range(len(inputs.tokens))])
    arguments = (params, config, inputs, keys, sampling.rule(), max_new_tokens, chunk, clock)
    plain = joined(engine.generate(*arguments))
    chunks = list(generate(*arguments, known, guesses))
    return joined(chunks), plain, chunks


def joined(chunks) -> tuple[np.ndarray, np.ndarray]:
    tokens, odds = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    return tokens, odds.logprobs


def assert_same(found, plain) -> None:
    """Plain decoding may go on for the rest of a chunk after the last row has ended."""
    for first, second, atol in zip(found, plain, (0, 1e-4), strict=True):
        np.testing.assert_allclose(first, second[: len(first)], atol=atol)
        assert not second[len(first) :].any()


def hints_of(answers, width=32) -> Hints:
    """Hints that hold these answers [B, n], so that what was matched is followed by what comes."""
    text = np.full((len(answers), width), -1, np.int32)
    text[:, width - answers.shape[1] :] = answers
    return Hints(text, KINDS, outlined=False)


def answers_of(config, params, inputs, clock, sampling=GREEDY, num_tokens=NEW_TOKENS) -> np.ndarray:
    keys = row_keys(sampling.seed, [str(i) for i in range(len(inputs.tokens))])
    chunks = engine.generate(params, config, inputs, keys, sampling.rule(), num_tokens, 2, clock)
    return joined(chunks)[0].T


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [0, 4, 1], ids=["right", "every fourth wrong", "all wrong"])
def test_answers_are_those_of_plain_decoding(config, params, make_inputs, clock, sampling, wrong):
    """In a ragged batch, whose rows get ahead of each other when their hints go wrong at places of their own."""
    inputs = make_inputs(config, PROMPTS)
    answers = answers_of(config, params, inputs, clock, sampling)
    if wrong:
        places = np.add.outer(np.arange(len(answers)), np.arange(answers.shape[1])) % wrong == 0
        answers = np.where(places, (answers + 1) % 90, answers)
    found, plain, _ = both(config, params, inputs, clock, hints_of(answers), sampling)
    assert_same(found, plain)
    assert len(found[0]) == min(NEW_TOKENS, len(plain[0]))


def test_a_row_alone_gives_the_same(gemma2, random_params, make_inputs, clock):
    inputs = make_inputs(gemma2, PROMPTS, range(1, 2))
    answers = answers_of(gemma2, random_params(gemma2), inputs, clock)
    for guesses in (1, 4):
        found, plain, _ = both(gemma2, random_params(gemma2), inputs, clock, hints_of(answers), guesses=guesses)
        assert_same(found, plain)


def test_right_guesses_save_passes(gemma2, random_params, make_inputs, clock):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, clock, HOT)
    assert len(set(answers[0].tolist())) > 8  # few places are alike
    _, _, chunks = both(gemma2, params, inputs, clock, hints_of(answers), HOT, guesses=3, chunk=1)
    assert [len(tokens) for tokens, _ in chunks] == [1, 4, 4, 4, 1]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_lengths_are_kept(gemma2, random_params, make_inputs, clock, limit):
    inputs, params = make_inputs(gemma2, PROMPTS), random_params(gemma2)
    known = hints_of(answers_of(gemma2, params, inputs, clock))
    found, plain, _ = both(gemma2, params, inputs, clock, known, max_new_tokens=limit, guesses=4)
    assert len(found[0]) == limit
    assert_same(found, plain)


def test_rows_end_within_right_guesses(gemma2, random_params, make_inputs, clock):
    """The hints go on behind what has become <eos>; the network would choose there what they say."""
    inputs, params = make_inputs(gemma2, PROMPTS), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, clock, HOT, 24)
    ended = next(t for t in answers[0, 3:8] if t not in answers[0, :3])
    config = dataclasses.replace(gemma2, eos_token_id=int(ended))
    found, plain, _ = both(config, params, inputs, clock, hints_of(answers), HOT, 24, guesses=7, chunk=3)
    assert_same(found, plain)
    length = int(np.argmax(found[0][:, 0] == ended)) + 1
    assert 4 <= length <= 8
    assert (found[0][length:, 0] == config.pad_token_id).all() and (found[1][length:, 0] == 0).all()


def test_nothing_is_decoded_when_all_rows_end_at_once(gemma2, random_params, make_inputs, clock):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    answers = answers_of(gemma2, params, inputs, clock)
    config = dataclasses.replace(gemma2, eos_token_id=int(answers[0, 0]))
    _, _, chunks = both(config, params, inputs, clock, hints_of(answers))
    assert len(chunks) == 1


def test_new_prompts_and_settings_compile_nothing(gemma2, random_params, make_inputs, clock):
    params = random_params(gemma2)
    inputs = make_inputs(gemma2, (8, 9))
    both(gemma2, params, inputs, clock, hints_of(np.ones((2, 5), np.int32)), HOT)
    before = decode._cache_size()
    other = dataclasses.replace(HOT, temperature=0.4, seed=8)
    both(gemma2, params, make_inputs(gemma2, (11, 6)), clock, hints_of(np.ones((2, 9), np.int32)), other, 20)
    assert decode._cache_size() == before


def test_the_time_of_a_token_counts_the_tokens_of_the_longest_row(gemma2, random_params, make_inputs, clock):
    inputs, params = make_inputs(gemma2, PROMPTS, range(1)), random_params(gemma2)
    known = hints_of(answers_of(gemma2, params, inputs, clock))
    keys = row_keys(0, ["0"])
    counted = []
    clock.add_steps = counted.append
    list(generate(params, gemma2, inputs, keys, GREEDY.rule(), NEW_TOKENS, 2, clock, known, 3))
    assert sum(counted) == NEW_TOKENS - 1


def guessed(text, leftover, length=None) -> list[int]:
    text = jnp.array([text], jnp.int32)
    return guess(text, jnp.array([length or text.shape[1]]), jnp.array([leftover], jnp.int32), KINDS)[0].tolist()


def test_guesses_are_copied_from_behind_the_most_alike_place():
    absent = [-1] * 3
    assert guessed([1, 2, 3, 4, 9, 2, 5, 6, 7, 1, 2], absent) == [3, 4, 9]  # "1 2" rather than the later "2"
    assert guessed([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], absent) == [5, 6, 1]  # of equals the latest
    assert guessed([3, 1, 2, 1, 2], absent) == [1, 2, 1]  # a copy that reaches the end starts again
    assert guessed([1, 2, 3, 4, 1, 2, 0, 2, 8], absent, length=6) == [3, 4, 1]  # what comes later is not there yet
    assert guessed([5, 6, 7], absent) == [7, 7, 7]  # nothing is like it: ids of the text all the same


def test_locations_match_any_other_and_values_come_from_the_last_pass():
    outline = [3, 10, 10, 20, 7, 4]
    assert guessed([*outline, 3, 11, 12], [-1, -1, -1]) == [20, 7, 4]
    assert guessed([*outline, 3, 11, 12], [22, 8, 5]) == [22, 7, 4]  # only what is of the copied kind
    assert guessed([*outline, 3, 11, 12], [13, 21, 6]) == [20, 7, 4]
    text = [3, 11, 12, 21, 7, 3, 11, 12]
    assert guessed([*outline, *text], [22, 8, 5]) == [21, 7, 3]  # the same values: what followed them is better


def test_outlines_are_answers_in_the_tasks_format():
    for prompt, codes in (("detect cat ;  red dog", None), ("segment cat ; red dog", 16)):
        found, dropped = parse(outline(prompt), (100, 100))
        assert [thing.label for thing in found] == ["cat", "red dog", "red dog"] and not dropped
        assert all((len(thing.codes) if thing.codes else None) == codes for thing in found)
    assert [outline(prompt) for prompt in ("caption en", "detect", "detect ;", "")] == [""] * 4


def test_hints_are_an_outline_and_the_prompt(gemma2, tokenizer):
    config = dataclasses.replace(gemma2, image_token_id=tokenizer.vocab_size)
    processor = Processor(config, tokenizer, ImageSettings(config.vision.image_size))
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 2
    batch = processor(pictures, ["segment a red circle", "caption en"])
    prompts = engine.prompts(tokenizer, engine.prepare(batch, jnp.zeros((2, 4, 8)), range(2)))
    assert prompts == ["segment a red circle", "caption en"]
    known = hints(tokenizer, prompts)
    assert known.outlined and known.text.shape[1] & (known.text.shape[1] - 1) == 0
    expected = outline("segment a red circle") + "segment a red circle\n", "caption en\n"
    for row, text in zip(known.text, expected, strict=True):
        assert tokenizer.decode(row[row >= 0].tolist()) == text
        assert (row[: np.argmax(row >= 0)] == -1).all() and row[-1] == tokenizer.newline_id
    (loc, loc_end), (seg, seg_end) = known.kinds
    assert [tokenizer.decode([i]) for i in (loc, loc_end - 1)] == ["<loc0000>", "<loc1023>"]
    assert [tokenizer.decode([i]) for i in (seg, seg_end - 1)] == ["<seg000>", "<seg127>"]
    assert not hints(tokenizer, prompts[1:]).outlined


@pytest.mark.parametrize("bits, count", [(16, 7), (8, few_rows.MOST - 1), (4, few_rows.MOST - 1)])
def test_it_wins_for_one_outlined_row_of_a_large_model_where_passes_are_cheap(monkeypatch, bits, count):
    def weights(size, dtype="bfloat16", rounds=True):
        weight = jax.ShapeDtypeStruct((size // 2048, 2048), dtype)
        if bits < 16:
            weight = quantized.abstract(weight, bits, rounds)
        return {"language_model": {"norm": jnp.ones(2, "bfloat16"), "weight": weight}}

    one, two = (Hints(np.zeros((rows, 32), np.int32), KINDS, outlined=True) for rows in (1, 2))
    plain = dataclasses.replace(one, outlined=False)
    few = {True: [1.1, 3.0, 1.0, 1.2], False: [1.0, 3.0, 1.1, 1.6]}  # one row and several, in one way and the other
    for cheap, many in ((True, [3.0, 3.0, 1.2, 1.0, 2.0]), (False, [1.0, 3.0, 1.4, 2.0, 2.0])):
        monkeypatch.setattr(cpu, "_times", lambda dtype, width, times=many: times)
        monkeypatch.setattr(cpu, "_whole_times", lambda dtype, width, times=few[cheap]: times)
        monkeypatch.setattr(quantized, "_packed_times", lambda width, groups, times=few[cheap]: times)
        assert choose_num_guesses(weights(2**29), one, None) == cheap * count
        assert not any(choose_num_guesses(weights(2**29), known, None) for known in (two, plain))
        assert choose_num_guesses(weights(2**28), one, None) == choose_num_guesses(weights(2**29), one, False) == 0
        assert choose_num_guesses(weights(2**28), plain, True) == count
        if bits == 16:
            assert not choose_num_guesses(weights(2**29, "float32"), one, None)
        else:
            assert choose_num_guesses(weights(2**29, "float32"), one, None) == cheap * count
            assert not choose_num_guesses(weights(2**29, rounds=False), one, None)


def test_decoding_keeps_no_second_copy_of_the_embedding_table(gemma2, random_params, make_inputs, clock, monkeypatch):
    """XLA on CPU would convert a half-precision table to float32, once for a whole chunk of passes."""
    config = dataclasses.replace(gemma2, text=dataclasses.replace(gemma2.text, vocab_size=50_000, width=64))
    params = random_params(config, "bfloat16")
    calls = []

    def call(function, *args, **static):
        calls.append(function.lower(*args, **static).compile().memory_analysis())
        return function(*args, **static)

    monkeypatch.setattr(clock, "call", call)
    inputs, keys = make_inputs(config, PROMPTS, range(1)), row_keys(0, ["0"])
    known = hints_of(np.ones((1, 5), np.int32))
    list(generate(params, config, inputs, keys, GREEDY.rule(), 2, 2, clock, known, num_guesses=4))
    assert calls[-1].temp_size_in_bytes < params["language_model"]["embed_tokens"]["weight"].nbytes


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, top_p=0.9, seed=4)], ids=["greedy", "sampled"])
def test_the_shipped_model_says_the_same_in_fewer_passes(shipped, sampling):
    picture = ASSETS / "examples" / "stars.png"
    prompts = ["detect star", "segment star ; circle", "caption en"]
    tokenizer, config = shipped.processor.tokenizer, shipped.config
    clock = pj.generation.clock.Clock({})
    batch = shipped.processor(picture, prompts)
    soft_tokens = engine.embed_pictures(shipped.params, config, batch.pixels, clock)
    for rows in (range(3), range(1)):
        inputs = engine.prepare(batch, soft_tokens, rows)
        known = hints(tokenizer, engine.prompts(tokenizer, inputs))
        found, plain, chunks = both(config, shipped.params, inputs, clock, known, sampling, 96, guesses=7, chunk=1)
        assert_same(found, plain)
    assert len(chunks) < 0.8 * np.argmax(found[0][:, 0] == config.eos_token_id)


@pytest.fixture(scope="module")
def shipped():
    return pj.load(ASSETS / "tiny", dtype="float32")
