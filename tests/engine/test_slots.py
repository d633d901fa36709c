"""A server's state: requests of all kinds come into slots at any time and get the tokens of their answers alone."""

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.engine import steps
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.engine.sampling import StepConfig, row_keys, row_options
from paligemma_jax.engine.state import DecodeState, answer_size, empty, insert

HOT = {"temperature": 1.5, "seed": 3}
REQUESTS = [  # prompt, options, decode calls before it comes
    ("caption en", {"max_new_tokens": 14}, 0),
    ("detect a red circle", {"constrain": True, "max_new_tokens": 24}, 0),
    ("answer en how many", {"sampling": pj.Sampling(**HOT), "max_new_tokens": 9}, 0),
    ("segment a ; two blue squares", {"constrain": True, "sampling": pj.Sampling(**HOT), "max_new_tokens": 32}, 1),
    ("caption en", {"sampling": pj.Sampling(**HOT, top_k=7), "max_new_tokens": 12, "min_new_tokens": 12}, 2),
    ("detect red", {"max_new_tokens": 1}, 2),
    ("segment the circle", {"sampling": pj.Sampling(**HOT, top_p=0.6), "max_new_tokens": 11}, 4),
    ("what color is the circle", {"sampling": pj.Sampling(temperature=0.7, min_p=0.2), "max_new_tokens": 20}, 5),
]
ALONE = (3, 4)  # of these the answers alone are the API's too, each by programs of its own
NUM_SLOTS, STEPS = 4, 3


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def model(request, make_model) -> pj.PaliGemma:
    return make_model(request.param)


@pytest.fixture(scope="module")
def requests() -> list[pj.Request]:
    images = np.random.default_rng(0).integers(0, 256, (len(REQUESTS), 20, 30, 3), np.uint8)
    return [pj.Request.of(image, *request[:1], **request[1]) for image, request in zip(images, REQUESTS, strict=True)]


def all_options(model: pj.PaliGemma) -> StepConfig:
    """A step for requests of every kind."""
    return StepConfig(
        model.config,
        model.processor.tokenizer.loc_start,
        samples=True,
        filters=("top_k", "top_p", "min_p"),
        constrained=True,
        delayed=True,
    )


def prefix_of(model: pj.PaliGemma, request: pj.Request) -> DecodeState:
    batch = model.processor([list(request.images)], [request.prompt.text])
    soft_tokens = steps.run(model.params, batch.pixels, config=model.config, method="embed_image")
    inputs = steps.select_rows(batch, soft_tokens, range(1))
    allowed = request.prompt if request.options.constrain else None
    table = grammar.tables(model.processor.tokenizer, [allowed], model.config, min_nodes=64)
    keys = row_keys([request.options.sampling.seed], ["alone"])
    options = row_options([request.options], keys, table)
    return steps.prefill(model.params, inputs, options, config=all_options(model), num_tokens=answer_size(32))


def served(model: pj.PaliGemma, prefixes: list[DecodeState], num_slots: int) -> list[list[int]]:
    """Tokens of each request, answered in a few slots of one state, by a loop as a server has it."""
    config = all_options(model)
    state = empty(prefixes[0], num_slots, 64, config)
    answers: list[list[int]] = [[] for _ in prefixes]
    waiting, slots, calls = list(range(len(prefixes))), [None] * num_slots, 0
    while waiting or any(slot is not None for slot in slots):
        for slot in range(num_slots):
            if slots[slot] is None and waiting and REQUESTS[waiting[0]][2] <= calls:
                slots[slot] = waiting.pop(0)
                state = insert(state, np.array([slot], np.int32), prefixes[slots[slot]])
        state = steps.decode(model.params, state, config=config, num_steps=STEPS)
        calls += 1
        tokens, step, done = jax.device_get((state.tokens, state.step, state.done))
        for slot, index in enumerate(slots):
            if index is not None and done[slot]:
                answers[index], slots[slot] = tokens[slot, : step[slot]].tolist(), None
    return answers


def tokens_of(outputs: list[pj.Output]) -> list[list[int]]:
    return [output.tokens.tolist() for output in outputs]


def test_each_request_gets_the_tokens_of_its_answer_alone(model, requests):
    prefixes = [prefix_of(model, request) for request in requests]
    expected = served(model, prefixes, 1)  # one after the other
    assert len({tuple(tokens) for tokens in expected}) == len(requests)  # the requests do differ
    assert served(model, prefixes, NUM_SLOTS) == expected
    assert tokens_of(model.answer(requests)) == expected  # in one batch
    if model.config.text.version == 2:
        assert tokens_of(model.answer(requests, batch_size=5)) == expected
        assert [tokens_of(model.answer([requests[i]]))[0] for i in ALONE] == [expected[i] for i in ALONE]


def test_a_slot_beyond_the_end_drops_its_row_and_the_others_stay(model, requests):
    config = StepConfig(model.config, model.processor.tokenizer.loc_start)
    batch = model.processor(requests[0].images[0], ["caption en", "detect red"])
    soft_tokens = steps.run(model.params, batch.pixels, config=model.config, method="embed_image")
    options = row_options([pj.GenerateOptions(8)] * 2, row_keys([0, 0], ["a", "b"]), None)
    inputs = steps.select_rows(batch, soft_tokens, range(2))
    prefix = steps.prefill(model.params, inputs, options, config=config, num_tokens=32)
    state = empty(jax.eval_shape(lambda: prefix), 3, 64, config)
    assert state.done.all() and not state.step.any()
    state = insert(state, np.array([2, 7], np.int32), prefix)
    np.testing.assert_array_equal(state.done, [True, True, False])
    np.testing.assert_array_equal(state.tokens[2], prefix.tokens[0])
    state = steps.decode(model.params, state, config=config, num_steps=7)
    np.testing.assert_array_equal(state.step, [0, 0, 8])
    [alone] = model.generate(requests[0].images[0], "caption en", 8)
    assert state.tokens[2, : len(alone.tokens)].tolist() == alone.tokens.tolist()
