"""The ways to answer a group of rows, and which one is taken.

Axes: B rows, M tokens of an answer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from paligemma_jax.engine import steps
from paligemma_jax.engine.runner import Runner
from paligemma_jax.engine.sampling import StepConfig
from paligemma_jax.engine.steps import Params
from paligemma_jax.engine.strategies import beams, speculation
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tasks.prompts import Prompt

_STEPS = {"cpu": 2}  # decode steps between two looks at what is done: on CPU a step is dear and a look is cheap
_MANY_STEPS = 8  # elsewhere


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How a group of rows is answered: two functions of `jax.jit` over a state, and what to show of it.

    prefill(params, inputs, options, *extra, **prefill_static) and decode(params, state, **decode_static) give a state,
    view(state) its tokens [B, M], scores [B, M], step [B] and done [B].
    num_steps: of a call of `decode`; None when it is the tokens by which the furthest row has grown.
    """

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    view: Callable[[Any], tuple[Any, ...]]
    prefill_static: dict[str, Any]
    decode_static: dict[str, Any]
    extra: tuple[Any, ...] = ()
    num_steps: int | None = None


def choose_strategy(
    runner: Runner,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    config: StepConfig,
    num_tokens: int,
    num_slots: int,
) -> Strategy:
    """Beams, speculation or plain decoding, for rows whose options agree on that.

    Args:
      prompts: of the rows.
      options: of any of them.
      config, num_tokens, num_slots: of the state.
    """
    num_steps = _STEPS.get(runner.target.platform, _MANY_STEPS)
    size = {"config": config, "num_tokens": num_tokens, "num_slots": num_slots}
    decode = {"config": config, "num_steps": num_steps}
    if (num_beams := options.sampling.num_beams) > 1:
        size["num_beams"] = num_beams
        return Strategy(beams.prefill, beams.decode, lambda state: state.best, size, decode, (), num_steps)
    context = speculation.context(tokenizer, prompts)
    if num_drafts := speculation.choose_num_drafts(params, context, options.speculate, runner.table):
        size["num_drafts"], decode["kinds"] = num_drafts, context.kinds
        prefill, more, extra = speculation.prefill, speculation.decode, (context.text,)
        return Strategy(prefill, more, lambda state: _answers(state.state), size, decode, extra)
    return Strategy(steps.prefill, steps.decode, _answers, size, decode, (), num_steps)


def _answers(state: Any) -> tuple[Any, ...]:
    return state.tokens, state.scores, state.step, state.done
