"""Beam search against every possible answer, against greedy decoding, and in batches."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from paligemma_jax.processing.request import GenerateOptions, Sampling

PROMPTS = (7, 12, 9, 10, 6)


@pytest.fixture
def search(answer):
    """search(config, params, inputs, num_beams, max_new_tokens): tokens [n] and log-probabilities [n] of all rows."""

    def run(config, params, inputs, num_beams, max_new_tokens, **more) -> list[tuple[np.ndarray, np.ndarray]]:
        options = GenerateOptions(max_new_tokens, Sampling(num_beams=num_beams), **more)
        *_, last = answer(config, params, inputs, options, by_beams=True)
        return _rows(last)

    return run


@pytest.fixture
def greedy(answer):
    """greedy(config, params, inputs, max_new_tokens): the same by plain decoding."""
    return lambda config, params, inputs, count: _rows(answer(config, params, inputs, GenerateOptions(count))[-1])


def _rows(progress) -> list[tuple[np.ndarray, np.ndarray]]:
    assert progress.done.all()
    rows = zip(progress.tokens, progress.scores.logprobs, progress.step, strict=True)
    return [(tokens[:count], logprobs[:count]) for tokens, logprobs, count in rows]


def _cut(config, tokens, logprobs):
    """Up to the first <eos>."""
    ends = np.flatnonzero(np.isin(tokens, config.eos_token_ids))
    count = ends[0] + 1 if len(ends) else len(tokens)
    return tokens[:count], logprobs[:count]


@pytest.fixture(scope="module")
def small(gemma2):
    """Only ids 0 to 3 may be chosen, so that all answers can be listed; 1 and 3 end them."""
    return dataclasses.replace(gemma2, image_token_id=4, more_eos_ids=(3,))


def test_with_enough_beams_it_finds_the_best_of_all_answers(small, random_params, make_inputs, full_logits, search):
    params, length = random_params(small), 3
    inputs = make_inputs(small, PROMPTS)
    found = search(small, params, inputs, 16, length)
    for row in range(len(PROMPTS)):
        best = -np.inf
        for ids in itertools.product(range(4), repeat=length):
            logprobs = jax.nn.log_softmax(full_logits(small, params, inputs, row, ids), axis=-1)
            ids, chosen = _cut(small, np.array(ids), np.asarray(logprobs)[np.arange(length), ids])
            if chosen.mean() > best:
                best, expected = chosen.mean(), ids
        np.testing.assert_array_equal(found[row][0], expected)
        np.testing.assert_allclose(found[row][1].mean(), best, atol=1e-4)


def test_one_beam_is_greedy_and_four_are_better_on_the_whole(gemma2, random_params, make_inputs, search, greedy):
    params, inputs = random_params(gemma2), make_inputs(gemma2, PROMPTS)
    plain = greedy(gemma2, params, inputs, 12)
    single = search(gemma2, params, inputs, 1, 12)
    several = search(gemma2, params, inputs, 4, 12)
    for row in range(len(PROMPTS)):
        np.testing.assert_array_equal(single[row][0], plain[row][0])
        np.testing.assert_allclose(single[row][1], plain[row][1], atol=1e-4)

    # Not in every row: beams may leave the greedy path for one that looks better at first.
    assert np.mean([logprobs.mean() for _, logprobs in several]) > np.mean([logprobs.mean() for _, logprobs in plain])


def test_logprobs_belong_to_the_tokens(gemma2, random_params, make_inputs, full_logits, search):
    params, inputs = random_params(gemma2), make_inputs(gemma2, PROMPTS)
    for row, (tokens, logprobs) in enumerate(search(gemma2, params, inputs, 4, 12)[: len(PROMPTS)]):
        expected = jax.nn.log_softmax(full_logits(gemma2, params, inputs, row, tokens), axis=-1)
        np.testing.assert_allclose(logprobs, np.asarray(expected)[np.arange(len(tokens)), tokens], atol=1e-4)


def test_a_batch_equals_its_rows_alone_and_a_second_run_the_first(gemma2, random_params, make_inputs, search):
    params = random_params(gemma2)
    together = search(gemma2, params, make_inputs(gemma2, PROMPTS), 4, 12)
    again = search(gemma2, params, make_inputs(gemma2, PROMPTS), 4, 12)
    for row in range(len(PROMPTS)):
        alone = search(gemma2, params, make_inputs(gemma2, PROMPTS, range(row, row + 1)), 4, 12)
        np.testing.assert_array_equal(together[row][0], alone[0][0])
        np.testing.assert_array_equal(together[row][1], again[row][1])


def test_each_row_keeps_its_own_limit(gemma2, random_params, make_inputs, answer, search):
    params, inputs = random_params(gemma2), make_inputs(gemma2, PROMPTS)
    limits = [1, 5, 12, 3, 12, 12, 12, 12]
    *_, last = answer(
        gemma2, params, inputs, [GenerateOptions(n, Sampling(num_beams=4)) for n in limits], by_beams=True
    )
    for row, limit in enumerate(limits[: len(PROMPTS)]):
        tokens, logprobs = search(gemma2, params, inputs, 4, limit)[row]
        np.testing.assert_array_equal(last.tokens[row, : last.step[row]], tokens)
        np.testing.assert_array_equal(last.scores.logprobs[row, : last.step[row]], logprobs)
        assert len(tokens) <= limit


def test_no_beam_ends_before_the_least_number_of_tokens(small, random_params, make_inputs, search):
    params, inputs = random_params(small), make_inputs(small, PROMPTS)
    assert min(len(tokens) for tokens, _ in search(small, params, inputs, 4, 12)) < 6
    for tokens, _ in search(small, params, inputs, 4, 12, min_new_tokens=6):
        assert len(tokens) >= 6 and not {1, 3} & {*tokens[:5].tolist()}
