"""Random inputs for the small geometries, a driver of the engine's states, and the whole network without a cache."""

import functools

import jax
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.engine import steps
from paligemma_jax.engine.generate import Group, Progress, answers
from paligemma_jax.engine.runner import Call, Runner
from paligemma_jax.engine.sampling import row_keys, row_options, step_config
from paligemma_jax.engine.steps import Inputs, select_rows
from paligemma_jax.engine.strategies import beams, speculation
from paligemma_jax.engine.strategies.strategy import Strategy
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch

NUM_TOKENS = 32  # tokens that the answers of a state have room for
_SHOWN = ("tokens", "scores", "step", "done")


def _make_batch(config, prompt_lengths, num_tokens=12) -> Batch:
    """One picture per row (soft tokens 4 i .. 4 i + 3), bos and random ids up to each row's length."""
    rng = np.random.default_rng(1)
    count, num_soft = len(prompt_lengths), config.vision.num_tokens
    length = np.array(prompt_lengths, np.int32)
    at = np.arange(num_tokens)[None]
    tokens = np.where(at < length[:, None], rng.integers(3, 90, (count, num_tokens)), config.pad_token_id)
    tokens[:, :num_soft], tokens[:, num_soft] = config.image_token_id, config.bos_token_id
    slots = np.where(at < num_soft, at + num_soft * np.arange(count)[:, None], -1)
    pixels = np.zeros((0, config.vision.image_size, config.vision.image_size, 3), np.float32)
    return Batch(pixels, tokens.astype(np.int32), slots.astype(np.int32), length, length)


@pytest.fixture(scope="session")
def make_inputs():
    """make_inputs(config, prompt_lengths, rows=all): engine inputs of prompts with random pictures and ids."""

    def make(config, prompt_lengths, rows=None) -> Inputs:
        batch = _make_batch(config, prompt_lengths)
        shape = (len(prompt_lengths), config.vision.num_tokens, config.text.width)
        return select_rows(batch, jax.random.normal(jax.random.key(2), shape), rows or range(len(prompt_lengths)))

    return make


@pytest.fixture(scope="session")
def runner() -> Runner:
    """Programs that all tests of the engine share."""
    return Runner(ops.Target("cpu"))


@pytest.fixture
def make_call(runner):
    """make_call(params): a call of the API with these parameters."""
    return functools.partial(Call, runner)


def _make_group(
    config, inputs, options, num_steps=5, requests=None, context=None, num_drafts=3, by_beams=False
) -> Group:
    """Rows with one option for all or one for each, answered plainly, by beams, or with drafts from a context."""
    count = len(inputs.tokens)
    each = list(options) if isinstance(options, list | tuple) else [options] * count
    seeds = [o.sampling.seed for o in each]
    rows = row_options(each, row_keys(seeds, requests or [str(i) for i in range(count)]), None)
    step = step_config(config, None, each, constrained=False)
    size = {"config": step, "num_tokens": NUM_TOKENS, "num_slots": inputs.tokens.shape[1] + NUM_TOKENS}
    decode = {"config": step, "num_steps": num_steps}

    def shown(state):
        return tuple(getattr(state, name) for name in _SHOWN)

    if by_beams:
        size["num_beams"] = each[0].sampling.num_beams
        strategy = Strategy(beams.prefill, beams.decode, lambda s: s.best, size, decode, (), num_steps)
    elif context is not None:
        size["num_drafts"], decode["kinds"] = num_drafts, context.kinds
        functions = speculation.prefill, speculation.decode
        strategy = Strategy(*functions, lambda s: shown(s.state), size, decode, (context.text,))
    else:
        strategy = Strategy(steps.prefill, steps.decode, shown, size, decode, (), num_steps)
    return Group(range(count), inputs, rows, strategy)


@pytest.fixture(scope="session")
def make_group():
    """make_group(config, inputs, options, ...): rows to answer.

    options: one for all rows, or one for each.
    num_steps: of a call of decode.
    requests: what the rows' keys are made of, by default their numbers.
    context: what drafts are copied from, if there are to be any.
    by_beams: search, with a single beam too.
    """
    return _make_group


@pytest.fixture
def answer(make_call):
    """answer(config, params, inputs, options, ...): all `Progress` of rows, arguments as for `make_group`."""

    def run(config, params, *args, **options) -> list[Progress]:
        return list(answers(make_call(params), _make_group(config, *args, **options)))

    return run


@pytest.fixture(scope="session")
def full_logits():
    """full_logits(config, params, inputs, row, answer): logits [len(answer) + 1, V] of a row, without a cache."""

    def compute(config, params, inputs, row, answer, num_tokens=32) -> np.ndarray:
        prefix = int(inputs.prefix_length[row])
        tokens, slots = np.zeros((1, num_tokens), np.int32), np.full((1, num_tokens), -1, np.int32)
        tokens[0, :prefix] = inputs.tokens[row, :prefix]
        tokens[0, prefix : prefix + len(answer)] = answer
        slots[0, :prefix] = inputs.image_slots[row, :prefix]
        lengths = np.array([prefix], np.int32), np.array([prefix + len(answer)], np.int32)
        logits = _logits(config, params, inputs.soft_tokens, tokens, slots, *lengths)
        return np.asarray(logits)[0, prefix - 1 : prefix + len(answer)]

    return compute


def _all_logits(config, params, *arrays):
    model = PaliGemma(config)
    hidden, _ = model.apply({"params": params}, *arrays, method="prefill")
    return model.apply({"params": params}, hidden, method="logits")


_logits = jax.jit(_all_logits, static_argnums=0)
