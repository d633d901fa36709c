"""What the host looks at between two programs, and how the programs make it.

Axes: R rows of the state, W tokens of a row that are shown, K most likely tokens, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.engine.sampling import TokenScores
from paligemma_jax.engine.state import DecodeState

MOST_TOP = 20  # of the most likely tokens, as in OpenAI's API


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogprobs:
    """The most likely tokens at some places [...], by the model's own distribution as in `TokenScores`.

    ids: i32 [..., K], the most likely first; of equals the lower id.
    logprobs: f32 [..., K].
    """

    ids: jax.Array
    logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """What the host looks at.

    tokens, scores: the last ones of each row [R, W].
    status: i32 [2, R], (step, done).
    top: the most likely tokens [W, R, K] where rows ask for them, else zeros, and None on the host. They begin with the
      first token that the program said, unlike `tokens`, which end with the last.
    """

    tokens: jax.Array
    scores: TokenScores
    status: jax.Array
    top: TopLogprobs | None

    def top_of(self, row: int, count: int) -> TopLogprobs:
        """The most likely tokens [count, K] in the places of the first tokens of a row."""
        return jax.tree.map(lambda x: x[:count, row], self.top)


def most_likely(logits: jax.Array, wanted: jax.Array) -> TopLogprobs:
    """The most likely tokens [..., K] under logits [..., V], or zeros: a branch, so who does not ask does not pay."""

    def ranked(logits: jax.Array) -> TopLogprobs:
        best, ids = lax.top_k(logits, min(MOST_TOP, logits.shape[-1]))
        return TopLogprobs(ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    def nothing(logits: jax.Array) -> TopLogprobs:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ranked, logits))

    return lax.cond(wanted, ranked, nothing, logits)


def show(state: DecodeState, width: int, top: TopLogprobs) -> Shown:
    """The last `width` tokens of each row."""
    columns = jnp.maximum(state.step[:, None] - width + jnp.arange(width)[None], 0)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, columns, axis=1)

    status = jnp.stack([state.step, state.done.astype(jnp.int32)])
    return Shown(take(state.tokens), jax.tree.map(take, state.scores), status, top)
