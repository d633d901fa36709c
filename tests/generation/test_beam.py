"""Beam search against every possible answer, against greedy decoding, and in batches."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from paligemma_jax.generation import beam
from paligemma_jax.generation.engine import generate
from paligemma_jax.generation.sampling import Sampling, row_keys

PROMPTS = (7, 12, 9, 10, 6)
CHUNK = 5


def search(config, params, inputs, num_beams, max_new_tokens, clock):
    """Answers of all rows: tokens [n] and log-probabilities [n], cut after <eos>."""
    rule = Sampling().rule()
    tokens, odds = beam.search(params, config, inputs, num_beams, rule, max_new_tokens, CHUNK, clock)
    return [_cut(config, tokens[:, i], odds.logprobs[:, i]) for i in range(tokens.shape[1])]


def greedy(config, params, inputs, max_new_tokens, clock):
    keys = row_keys(0, range(len(inputs.tokens)))
    chunks = list(generate(params, config, inputs, keys, Sampling().rule(), max_new_tokens, CHUNK, clock))
    tokens, odds = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    return [_cut(config, tokens[:, i], odds.logprobs[:, i]) for i in range(tokens.shape[1])]


def _cut(config, tokens, logprobs):
    ends = np.flatnonzero(tokens == config.eos_token_id)
    count = ends[0] + 1 if len(ends) else len(tokens)
    return tokens[:count], logprobs[:count]


@pytest.fixture(scope="module")
def small(gemma2):
    """Only ids 0 to 3 may be chosen, so that all answers can be listed; <eos> is 1."""
    return dataclasses.replace(gemma2, image_token_id=4)


def test_with_enough_beams_it_finds_the_best_of_all_answers(small, random_params, make_inputs, full_logits, clock):
    params, length = random_params(small), 3
    inputs = make_inputs(small, PROMPTS)
    found = search(small, params, inputs, 16, length, clock)
    for row in range(len(PROMPTS)):
        best = -np.inf
        for ids in itertools.product(range(4), repeat=length):
            logprobs = jax.nn.log_softmax(full_logits(small, params, inputs, row, ids), axis=-1)
            ids, chosen = _cut(small, np.array(ids), np.asarray(logprobs)[np.arange(length), ids])
            if chosen.mean() > best:
                best, expected = chosen.mean(), ids
        np.testing.assert_array_equal(found[row][0], expected)
        np.testing.assert_allclose(found[row][1].mean(), best, atol=1e-4)


def test_one_beam_is_greedy_and_four_are_better_on_the_whole(gemma2, random_params, make_inputs, clock):
    params, inputs = random_params(gemma2), make_inputs(gemma2, PROMPTS)
    plain = greedy(gemma2, params, inputs, 12, clock)
    single = search(gemma2, params, inputs, 1, 12, clock)
    several = search(gemma2, params, inputs, 4, 12, clock)
    for row in range(len(PROMPTS)):
        np.testing.assert_array_equal(single[row][0], plain[row][0])
        np.testing.assert_allclose(single[row][1], plain[row][1], atol=1e-4)

    # Not in every row: beams may leave the greedy path for one that looks better at first.
    assert np.mean([logprobs.mean() for _, logprobs in several]) > np.mean([logprobs.mean() for _, logprobs in plain])


def test_logprobs_belong_to_the_tokens(gemma2, random_params, make_inputs, full_logits, clock):
    params, inputs = random_params(gemma2), make_inputs(gemma2, PROMPTS)
    for row, (tokens, logprobs) in enumerate(search(gemma2, params, inputs, 4, 12, clock)[: len(PROMPTS)]):
        expected = jax.nn.log_softmax(full_logits(gemma2, params, inputs, row, tokens), axis=-1)
        np.testing.assert_allclose(logprobs, np.asarray(expected)[np.arange(len(tokens)), tokens], atol=1e-4)


def test_a_batch_equals_its_rows_alone_and_a_second_run_the_first(gemma2, random_params, make_inputs, clock):
    params = random_params(gemma2)
    together = search(gemma2, params, make_inputs(gemma2, PROMPTS), 4, 12, clock)
    again = search(gemma2, params, make_inputs(gemma2, PROMPTS), 4, 12, clock)
    for row in range(len(PROMPTS)):
        alone = search(gemma2, params, make_inputs(gemma2, PROMPTS, range(row, row + 1)), 4, 12, clock)
        np.testing.assert_array_equal(together[row][0], alone[0][0])
        np.testing.assert_array_equal(together[row][1], again[row][1])
